"""A data set in colour that needs no download site: characters in hundreds of fonts, tested on fonts never seen.

    python benchmarks/accuracy/glyphs.py --out runs/glyphs.npz [--sheet sheets/] [--fonts /usr/share/fonts]
    python benchmarks/accuracy/glyphs.py --packages      # the command that installs the fonts on Debian

32x32 RGB in MedMNIST's layout (`rd-train --data npz --data-dir runs/glyphs.npz`): 20,000 training, 4,000 validation and
8,000 test images of 47 classes, EMNIST's "by merge": digits and letters, with both cases of C I J K L M O P S U V W X
Y Z in one class. No design is in two splits: families, and families that draw alike under other names, are kept
together. What remains alike in many fonts is 0 and O, and 1, I and l (half of class L). If nothing at all told these
apart, one class in 47 would be lost to 0 and O and one to 1, I and l, and 95.7% would be the best possible; besides, a
neighbour, noise or little contrast hide some characters.

The same fonts, of the same versions of Pillow and FreeType, give the same file, byte for byte. What it was made of (the
SHA-256, package and split of each font) and the digest of its arrays are in it, as JSON in ``metadata``.
"""

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
from glyph_fonts import Face, find_faces, packages, split_groups
from glyph_images import CLASSES, SIZE, characters_of, image
from PIL import Image, features

from rd_deploy.common import UserError, atomic_path, one_line, run_command

PACKAGES = """
3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania
adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana aenigma agave allerta anonymous-pro apropal
arapey arkpandora averia-gwf averia-sans-gwf averia-serif-gwf b612 babelstone-modern bajaderka beteckna blankenburg
cabin cabinsketch cantarell cardo century-catalogue cherrybomb clear-sans cmu comfortaa comic-neue compagnon
courier-prime croscore crosextra-caladea crosextra-carlito dejavu-core dejavu-extra dosis dustin ebgaramond
ecolier-court elstob engadget essays1743 eurofurence f500 fantasma fantasque-sans fanwood ferrite-core firacode
freefont-ttf gamaliel georgewilliams gfs-artemisia gfs-bodoni-classic gfs-didot gfs-neohellenic gnutypewriter go
gotico-antiqua goudybookletter hack havana hermit inconsolata inter isabella jetbrains-mono junction junicode jura karla
karmilla klaudia-berenika kristi lato league-mono league-spartan levien-museum levien-typoscript liberation lindenhill
linuxlibertine lmodern lobster lobstertwo manrope millimetre monofur monoid mononoki mplus national-park ocr-a ocr-b
okolaks oldstandard open-sans opendin opendyslexic osifont oxygen paratype play povray prociono quattrocento quicksand
radisnoir roadgeek roboto-slab roboto-unhinted rocknroll routed-gothic sil-andika sil-charis sil-gentiumplus
solide-mirage sora staypuft stick summersby texgyre tiresias tomsontalks triod-postnaja tuffy ubuntu-title urw-base35
vollkorn yanone-kaffeesatz
"""
SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the groups of fonts
FEWEST_GROUPS = 50


def draw_split(faces: list[Face], group: list[int], count: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, 32, 32, 3) and uint8 (count, 1): every class as often, within one where it cannot be.

    A group of fonts is as likely as another, however many faces it has. Image i depends on the faces, ``seed`` and i.
    """
    members: dict[int, list[Face]] = {}
    for face, number in zip(faces, group, strict=True):
        members.setdefault(number, []).append(face)
    of_group = list(members.values())
    images, labels = np.empty((count, SIZE, SIZE, 3), np.uint8), np.empty((count, 1), np.uint8)
    order = np.random.default_rng([*seed, count]).permutation(count)
    for number in range(count):
        generator = np.random.default_rng([*seed, number])
        label = int(order[number]) % len(CLASSES)
        chosen = of_group[generator.integers(len(of_group))]
        face = chosen[generator.integers(len(chosen))]
        characters = characters_of(CLASSES[label])
        images[number] = image(face, characters[generator.integers(len(characters))], generator)
        labels[number] = label
    return images, labels


def build(fonts: Path, counts: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """All arrays of the file."""
    if not fonts.is_dir():
        raise UserError(f"--fonts {fonts} is no folder; name one with font files")
    faces, group, unused = find_faces(fonts)
    if len(set(group)) < FEWEST_GROUPS:
        raise UserError(
            f"{fonts} has fonts of {len(set(group))} designs that can be used, and {FEWEST_GROUPS} are needed: "
            "install those that --packages names"
        )
    split = split_groups(faces, group, SPLITS)
    arrays: dict[str, np.ndarray] = {}
    for number, part in enumerate(SPLITS):
        mine = [place for place, name in enumerate(split) if name == part]
        drawn = draw_split(
            [faces[place] for place in mine], [group[place] for place in mine], counts[part], (seed, number)
        )
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = drawn
    arrays["classes"] = np.array(CLASSES)
    owners = packages([face.path for face in faces])
    listed = [
        {
            "file": face.path.relative_to(fonts).as_posix(),
            "sha256": face.sha256,
            "package": owners.get(str(face.path)),
            "family": face.family,
            "style": face.style,
            "group": number,
            "split": part,
        }
        for face, number, part in zip(faces, group, split, strict=True)
    ]
    record = {"seed": seed, "digest": digest(arrays), "unused": unused, "fonts": listed}
    record |= {"pillow": PIL.__version__, "freetype": features.version("freetype2"), "numpy": np.__version__}
    return arrays | {"metadata": np.array(json.dumps(record))}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def contact_sheet(arrays: dict[str, np.ndarray], part: str) -> Image.Image:
    """Twelve images of each class, a row a class, in two columns of rows, three times as large."""
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"][:, 0]
    half = -(-len(CLASSES) // 2)
    sheet = Image.new("RGB", (25 * SIZE, half * SIZE))
    for label in range(len(CLASSES)):
        for place, number in enumerate(np.flatnonzero(labels == label)[:12]):
            sheet.paste(Image.fromarray(images[number]), ((label // half * 13 + place) * SIZE, label % half * SIZE))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def command() -> None:
    """Draw, write, say what was made of what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs.npz"))
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of each split to this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", action="store_true", help="say how to install the fonts, and stop")
    for part, count in (("train", 20_000), ("val", 4_000), ("test", 8_000)):
        parser.add_argument(f"--{part}", type=int, default=count, help=f"images of that split ({count:,})")
    options = parser.parse_args()
    if options.packages:
        print("apt-get install --no-install-recommends", *(f"fonts-{name}" for name in PACKAGES.split()))
        return
    counts = {part: getattr(options, part) for part in SPLITS}
    if min(counts.values()) < len(CLASSES):
        raise UserError(f"each split needs at least {len(CLASSES)} images, one of each class")
    arrays = build(options.fonts, counts, options.seed)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    for part in SPLITS if options.sheet else ():
        options.sheet.mkdir(parents=True, exist_ok=True)
        contact_sheet(arrays, part).save(options.sheet / f"{part}.png")
    say(options.out, json.loads(str(arrays["metadata"])), counts)


def say(path: Path, record: dict, counts: dict[str, int]) -> None:
    """What was made of what."""
    fonts = record["fonts"]
    for part, count in counts.items():
        mine = [font for font in fonts if font["split"] == part]
        groups = len({font["group"] for font in mine})
        print(f"{part:5} {count:6,} images in {len(mine)} fonts of {groups} designs")
    reasons = Counter(record["unused"]).most_common()
    print(f"not used: {one_line(', '.join(f'{count} {reason}' for reason, count in reasons)) or 'none'}")
    print(f"wrote {path}, digest {record['digest'][:16]}")


if __name__ == "__main__":
    sys.exit(run_command("glyphs", command))
