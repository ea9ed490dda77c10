"""Which fonts the data set of glyphs is drawn with, and how they are divided: no design is in two splits.

A face is used if it has every character, if upper and lower case are different drawings, and if its characters look
like those of other families. Faces belong together, in one split, if their names say so or if they draw alike: many
fonts are copies of others under another name.
"""

import hashlib
import logging
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Letters whose two cases no ordinary design draws alike.
DIFFERENT_CASES = "ABDEFGHNQRT"
SIDE = 16  # pixels of a character as it is compared
RENDER = 64  # pixels of an em when it is drawn for that
ALIKE = 0.90  # correlation of two drawings above which they are the same: of two cases of a letter
COPY = 0.97  # of all characters of two faces: copies and near-copies
LEGIBLE = 0.70  # share of a face's characters, case aside, that other groups' drawings recognise
REFERENCES = 150


@dataclass(frozen=True)
class Face:
    """One font file; ``drawings`` (62, 256): its characters in their boxes, of zero mean and unit length each."""

    path: Path
    sha256: str
    family: str
    style: str
    drawings: np.ndarray


def find_faces(folder: Path) -> tuple[list[Face], list[int], dict[str, int]]:
    """The usable faces below a folder, in the order of their digests, the group of each (`groups`), and how many files
    were not used, by reason.

    A character is read by comparison with other groups: where there are fewer than two, none is judged.
    """
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # of harmless flaws in tables that are not used
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf") and path.is_file())
    faces, unused = {}, {}
    for path in files:
        face = read_face(path)
        if isinstance(face, Face) and face.sha256 not in faces:
            faces[face.sha256] = face
        else:
            reason = face if isinstance(face, str) else "the same file twice"
            unused[reason] = unused.get(reason, 0) + 1
    kept = sorted(faces.values(), key=lambda face: face.sha256)
    for _ in range(2):  # the second time without the references that were illegible themselves
        group = groups(kept)
        if len(set(group)) < 2:
            break
        legible = legibility(kept, group) >= LEGIBLE
        if len(lost := np.flatnonzero(~legible)):
            unused["characters that are not read"] = unused.get("characters that are not read", 0) + len(lost)
        kept = [face for face, good in zip(kept, legible, strict=True) if good]
    return kept, groups(kept), unused


def read_face(path: Path) -> Face | str:
    """A face whose file and drawings are in order, or why it is not used."""
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            cmap, names = font.getBestCmap() or {}, font["name"]
            family = names.getBestFamilyName() or path.stem
            style = names.getBestSubFamilyName() or ""
        if any(ord(character) not in cmap for character in CHARACTERS):
            return "lacks characters"
        font = ImageFont.truetype(str(path), RENDER)
        drawings = np.stack([drawing(font, character) for character in CHARACTERS])
    except (OSError, TTLibError, KeyError, ValueError, AttributeError, AssertionError):
        return "cannot be read"
    if not (np.abs(drawings).sum(axis=1) > 0).all():
        return "lacks characters"
    alike = drawings @ drawings.T
    upper, lower = (
        [CHARACTERS.index(letter) for letter in text] for text in (DIFFERENT_CASES, DIFFERENT_CASES.lower())
    )
    if (alike[upper, lower] > ALIKE).sum() > 1:
        return "one case only"
    if (alike[:10][:, 10:].max(axis=1) > 0.999).sum() > 2:
        return "the same drawing for many characters"
    return Face(path, hashlib.sha256(path.read_bytes()).hexdigest(), family, style, drawings.astype(np.float32))


def drawing(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """A character stretched to its box, (SIDE * SIDE,), of zero mean and unit length; zero where nothing is drawn."""
    left, top, right, bottom = font.getbbox(character)
    if not (0 < right - left < 4 * RENDER and 0 < bottom - top < 4 * RENDER):
        return np.zeros(SIDE * SIDE)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
    box = image.getbbox()
    if box is None:
        return np.zeros(SIDE * SIDE)
    pixels = np.asarray(image.crop(box).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64).ravel()
    pixels -= pixels.mean()
    length = np.linalg.norm(pixels)
    return pixels / length if length > 0 else np.full(SIDE * SIDE, 1 / SIDE)  # a full box: an l or I without serifs


def first_word(family: str) -> str:
    """The first word of a family's name, without what stands glued to it: LiberationSans is Liberation."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", family)
    return words[0].lower() if words else family.lower()


def legibility(faces: list[Face], group: list[int]) -> np.ndarray:
    """For each face the share of its characters whose nearest drawing in OTHER groups is the same, case aside.

    The others are a fixed selection of groups, a face of each: its regular one if one is called so.
    """
    chosen: dict[int, Face] = {}
    for face, number in sorted(zip(faces, group, strict=True), key=lambda each: (each[0].style != "Regular", each[1])):
        chosen.setdefault(number, face)
    numbers = sorted(chosen, key=lambda number: hashlib.sha256(chosen[number].sha256.encode()).digest())
    numbers = numbers[:REFERENCES]
    reference = np.stack([chosen[number].drawings for number in numbers])  # groups, 62, pixels
    folded = np.array([ord(character.lower()) for character in CHARACTERS])
    shares = []
    for face, mine in zip(faces, group, strict=True):
        others = [place for place, number in enumerate(numbers) if number != mine]
        alike = face.drawings @ reference[others].reshape(-1, SIDE * SIDE).T
        read = folded[alike.argmax(axis=1) % len(CHARACTERS)]
        shares.append(float((_one_class(read) == _one_class(folded)).mean()))
    return np.array(shares)


def _one_class(codes: np.ndarray) -> np.ndarray:
    """Without the differences that no box shows: 0 is o, 1 and l are i."""
    codes = codes.copy()
    codes[codes == ord("0")] = ord("o")
    codes[(codes == ord("1")) | (codes == ord("l"))] = ord("i")
    return codes


def groups(faces: list[Face]) -> list[int]:
    """A number per face: equal for faces that share the first word of their family's name or draw alike."""
    parent = list(range(len(faces)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    named: dict[str, int] = {}
    for number, face in enumerate(faces):
        join(named.setdefault(first_word(face.family), number), number)
    flat = np.array([face.drawings.ravel() for face in faces])  # faces, 62 * pixels
    for number, row in enumerate(flat):
        for other in np.flatnonzero(flat[:number] @ row / len(CHARACTERS) > COPY):
            join(number, int(other))
    return [root(number) for number in range(len(faces))]


def split_groups(faces: list[Face], group: list[int], shares: dict[str, float]) -> list[str]:
    """The split of each face: groups in the order of a hash, each split filled to its share of the groups."""
    keys = {
        number: min(face.sha256 for face, mine in zip(faces, group, strict=True) if mine == number) for number in group
    }
    order = sorted(set(group), key=lambda number: hashlib.sha256(keys[number].encode()).digest())
    bounds = np.rint(np.cumsum(list(shares.values())) * len(order)).astype(int)
    split_of = {
        number: list(shares)[int(np.searchsorted(bounds, place, side="right"))] for place, number in enumerate(order)
    }
    return [split_of[number] for number in group]


def packages(paths: list[Path]) -> dict[str, str]:
    """``package version`` of each path that a Debian package owns; empty where there is no dpkg."""
    try:
        owners = subprocess.run(["dpkg-query", "-S", *map(str, paths)], capture_output=True, text=True).stdout
        listed = subprocess.run(
            ["dpkg-query", "-W", "-f=${Package} ${Version}\n"], capture_output=True, text=True
        ).stdout
    except OSError:
        return {}
    versions = dict(line.split(" ", 1) for line in listed.splitlines() if " " in line)
    found = (line.rsplit(": ", 1) for line in owners.splitlines() if ": " in line)
    return {path: f"{owner.split(':')[0]} {versions.get(owner.split(':')[0], '')}".strip() for owner, path in found}
