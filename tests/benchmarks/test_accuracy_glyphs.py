"""The data set of glyphs: fonts are judged by what they draw, no design is in two splits, all of it can be repeated."""

import hashlib
import json
import string
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from rd_deploy.common import UserError
from rd_train.data import load_dataset

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"))  # as the script has it

import glyph_fonts
import glyph_images
import glyphs
from glyph_fonts import CHARACTERS, Face

TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, STIX, Computer Modern
NAMES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf", "cmss10.ttf", "cmtt10.ttf", "cmr10.ttf")


def changed(path: Path, source: str = "DejaVuSans.ttf", *, family: str, drawn: tuple[str, str] = ("", "")) -> Path:
    """A font of matplotlib's under another name, which draws the characters drawn[0] as those of drawn[1]."""
    with TTFont(TTF / source) as font:
        for record in font["name"].names:
            if record.nameID in (1, 4, 16):
                record.string = family
        for table in font["cmap"].tables:
            before = dict(table.cmap)
            pairs = [(ord(new), ord(old)) for new, old in zip(*drawn, strict=True)]
            table.cmap.update({new: before[old] for new, old in pairs if old in before})
        font.save(path)
    return path


@pytest.fixture(scope="module")
def fonts(tmp_path_factory) -> Path:
    """Six designs, a copy under another name, and fonts that must not be used."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in NAMES:
        (folder / name).write_bytes((TTF / name).read_bytes())
    (folder / "same.ttf").write_bytes((TTF / NAMES[0]).read_bytes())
    changed(folder / "copy.ttf", family="Quite Another")
    changed(folder / "unicase.ttf", family="Unicase", drawn=(string.ascii_lowercase, string.ascii_uppercase))
    shuffled = CHARACTERS[17:] + CHARACTERS[:17]
    changed(folder / "cipher.ttf", "cmti10.ttf", family="Cipher", drawn=(CHARACTERS, shuffled))
    (folder / "symbols.ttf").write_bytes((TTF / "STIXSizOneSymReg.ttf").read_bytes())
    (folder / "broken.otf").write_bytes((TTF / NAMES[0]).read_bytes()[:3000])
    (folder / "text.ttf").write_bytes(b"<html>not found</html>")
    return folder


@pytest.fixture(scope="module")
def found(fonts) -> tuple[list[Face], list[int], dict[str, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyph_fonts, "LEGIBLE", 0.3)  # so few designs teach little of each other
        return glyph_fonts.find_faces(fonts)


def test_which_fonts_are_used_and_why_others_are_not(found):
    faces, _, unused = found
    used = {face.path.name for face in faces}
    assert used - {"same.ttf", NAMES[0]} == {*NAMES[1:], "copy.ttf"}
    assert len(used & {"same.ttf", NAMES[0]}) == 1
    reasons = {"the same file twice": 1, "one case only": 1, "characters that are not read": 1, "lacks characters": 1}
    assert unused == reasons | {"cannot be read": 2}
    assert [face.sha256 for face in faces] == sorted(face.sha256 for face in faces)
    assert faces[0].sha256 == hashlib.sha256(faces[0].path.read_bytes()).hexdigest()


def test_copies_are_found_by_what_they_draw_and_others_are_apart(found):
    faces, group, _ = found
    of = {face.family: number for face, number in zip(faces, group, strict=True)}
    assert of["Quite Another"] == of["DejaVu Sans"] == of["DejaVu Serif"]  # by drawing; by name
    assert len({of["DejaVu Sans"], of["STIXGeneral"], of["cmss10"]}) == 3
    renamed = [replace(face, family=f"{number} name") for number, face in enumerate(faces)]
    by_drawing = dict(zip((face.path.name for face in faces), glyph_fonts.groups(renamed), strict=True))
    same = next(name for name in ("same.ttf", NAMES[0]) if name in by_drawing)
    assert by_drawing["copy.ttf"] == by_drawing[same]
    assert by_drawing["DejaVuSerif.ttf"] != by_drawing[same]


def test_the_first_word_of_a_name():
    first = {"Liberation Sans": "liberation", "LiberationMono": "liberation", "GFS Didot": "gfs", "URWGothic": "urw"}
    first |= {"DejaVu Sans": "deja", "3270 Medium": "3270", "agave": "agave"}
    assert {name: glyph_fonts.first_word(name) for name in first} == first


def test_a_group_is_in_one_split_and_the_order_of_files_does_not_matter():
    zero = np.zeros((62, 256), np.float32)
    faces = [Face(Path(f"{n}"), hashlib.sha256(bytes([n])).hexdigest(), f"f{n}", "", zero) for n in range(200)]
    group = [n // 2 for n in range(200)]
    split = glyph_fonts.split_groups(faces, group, glyphs.SPLITS)
    assert all(split[n] == split[n + 1] for n in range(0, 200, 2))
    assert Counter(split) == {"train": 140, "val": 20, "test": 40}
    again = glyph_fonts.split_groups(faces[::-1], [99 - number for number in group[::-1]], glyphs.SPLITS)
    assert again == split[::-1]


def test_classes_are_emnists_by_merge_and_have_every_character_once():
    assert len(glyph_images.CLASSES) == 47
    assert sorted("".join(map(glyph_images.characters_of, glyph_images.CLASSES))) == sorted(CHARACTERS)
    assert glyph_images.characters_of("C") == "Cc"
    assert glyph_images.characters_of("a") == "a"


def test_a_character_covers_its_place_and_stands_out():
    face = Face(TTF / "DejaVuSans-Bold.ttf", "", "", "", np.zeros(0))
    covered = [glyph_images.coverage(face, "H", np.random.default_rng(seed)) for seed in range(40)]
    assert all(shape.shape == (32, 32) and shape.min() >= 0 and 0.95 < shape.max() <= 1 for shape in covered)
    assert all(60 < shape.sum() < 600 for shape in covered)
    assert np.mean(covered, axis=0)[12:20, 12:20].mean() > 2 * np.mean(covered, axis=0)[:3].mean()
    for seed in range(200):
        generator = np.random.default_rng(seed)
        below = glyph_images.background(generator)
        distance = np.sqrt(((below.mean(axis=(0, 1)) - glyph_images._ink(below, generator)) ** 2).mean(axis=2))
        assert below.shape == (32, 32, 3)
        assert distance.max() > glyph_images.CONTRAST - 30


@pytest.fixture
def small(fonts, found, tmp_path, monkeypatch):
    """The command on the fixture's fonts: it returns the written file."""
    monkeypatch.setattr(glyphs, "FEWEST_GROUPS", 3)
    monkeypatch.setattr(glyphs, "find_faces", lambda folder: found)
    monkeypatch.setattr(glyphs, "SPLITS", {"train": 0.4, "val": 0.3, "test": 0.3})

    def call(*flags: str) -> Path:
        flags = ["--fonts", str(fonts), "--out", str(tmp_path / "x" / "glyphs.npz"), *flags]
        flags += ["--train", "94", "--val", "47", "--test", "60"]
        monkeypatch.setattr(sys, "argv", ["glyphs.py", *flags])
        glyphs.command()
        return tmp_path / "x" / "glyphs.npz"

    return call


def test_the_file_is_a_data_set_and_says_what_it_is_made_of(small, tmp_path, capsys):
    path = small("--sheet", str(tmp_path / "sheets"))
    first = path.read_bytes()
    dataset = load_dataset("npz", path)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [94, 47, 60]
    assert (dataset.classes, dataset.preprocessing.size) == (glyph_images.CLASSES, 32)
    assert set(Counter(dataset.train.labels.tolist()).values()) == {2}
    with np.load(path, allow_pickle=False) as arrays:
        record = json.loads(str(arrays["metadata"]))
        assert glyphs.digest({name: arrays[name] for name in arrays.files if name != "metadata"}) == record["digest"]
    splits = {}
    for font in record["fonts"]:
        assert splits.setdefault(font["group"], font["split"]) == font["split"]
    assert set(splits.values()) == {"train", "val", "test"}
    assert len(record["fonts"]) == 7
    assert f"digest {record['digest'][:16]}" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheets" / "test.png").size == (1600, 1536)
    assert small().read_bytes() == first
    assert small("--seed", "1").read_bytes() != first


def test_too_few_fonts_are_refused_with_what_to_do(fonts, found, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "find_faces", lambda folder: found)
    with pytest.raises(UserError, match=r"fonts of 5 designs that can be used, and 50 are needed: install"):
        glyphs.build(fonts, {"train": 47, "val": 47, "test": 47}, 0)
    with pytest.raises(UserError, match="is no folder"):
        glyphs.build(tmp_path / "none", {}, 0)


@pytest.mark.parametrize(("files", "designs"), [([], 0), (["DejaVuSans.ttf", "DejaVuSans-Bold.ttf"], 1)])
def test_a_folder_of_no_fonts_or_of_one_family_is_refused_likewise(tmp_path, files, designs):
    for name in files:
        (tmp_path / name).write_bytes((TTF / name).read_bytes())
    with pytest.raises(UserError, match=f"fonts of {designs} designs that can be used, and 50 are needed: install"):
        glyphs.build(tmp_path, {"train": 47, "val": 47, "test": 47}, 0)


def test_the_packages_are_named_in_one_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glyphs.py", "--packages"])
    glyphs.command()
    command = capsys.readouterr().out
    assert command.startswith("apt-get install --no-install-recommends fonts-3270 ")
    assert command.count("\n") == 1
    assert len(command.split()) == len(set(command.split())) > 130
