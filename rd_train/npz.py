"""Reader of image sets in MedMNIST's layout: one NumPy archive with three splits; nothing in it is unpickled.

The file comes from outside: sizes and types are checked before an array is made, and nothing is read beyond them.
"""

import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rd_deploy.common import UserError, check_file, one_line
from rd_train.formats import MAX_BYTES, read_promised

PARTS = ("train", "val", "test")
MAX_CLASSES = 100_000


def read_npz(path: str | Path) -> dict:
    """Images and labels of each part of an image set, and the names of its classes.

    ``{"train": (images, labels), "val": ..., "test": ..., "classes": [...]}``: images uint8 (N, H, W, C) with C 1 or 3,
    labels int64 (N,). In the file: ``PART_images`` uint8 (N, H, W) or (N, H, W, C), ``PART_labels`` whole numbers (N,)
    or (N, 1), and it may have ``classes``, text (K,); without, they are called 0, 1, ... Other arrays are not read.
    """
    path = check_file(path, "image set", max_bytes=4 * MAX_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            found = {name: _read(archive, member, path) for name, member in members.items()}
        names = None if "classes" not in found else _names(found["classes"], path)
    except UserError:
        raise
    except Exception as error:  # a hostile file can raise anything from zipfile and from NumPy's parser of headers
        reason = one_line(error)[:100]
        raise UserError(f"{path} is no NumPy archive of plain arrays ({reason}); download or make it again") from error
    parts = {part: _pair(found, part, path) for part in PARTS}
    if len({images.shape[1:] for images, _ in parts.values()}) > 1:
        shapes = ", ".join(f"{part} {images.shape[1:]}" for part, (images, _) in parts.items())
        raise UserError(f"{path}: the images of its parts differ in shape ({shapes}); give the arrays of one data set")
    return {**parts, "classes": names or [str(label) for label in range(int(parts["train"][1].max()) + 1)]}


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members that are read, each there once and of an allowed size."""
    wanted = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name not in (*wanted, "classes"):
            continue
        if name in found:
            raise UserError(f"{path} holds {name} twice; make it again")
        if member.file_size > MAX_BYTES:
            raise UserError(f"{path}: {name} has {member.file_size:,} bytes, more than the {MAX_BYTES:,} that are read")
        found[name] = member
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{path} has no {missing[0]}: it needs {', '.join(wanted)}, as MedMNIST's files have them")
    return found


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """One array: its header must promise exactly the bytes that follow, of whole numbers or text."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype.kind not in "uiU" or dtype.hasobject:
            raise UserError(f"{path}: {member.filename} holds {dtype}, not whole numbers; make it again")
        size = math.prod(shape) * dtype.itemsize
        if not 0 < size <= member.file_size:
            raise UserError(f"{path}: {member.filename} promises {size:,} bytes and has fewer; download it again")
        data = read_promised(stream, size)
    if len(data) != size:
        raise UserError(f"{path}: {member.filename} should hold {size:,} bytes, and does not; download it again")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type, as NumPy's format describes them (versions 1 and 2)."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of NumPy's format")
    return readers[version](stream)


def _pair(found: dict[str, np.ndarray], part: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = found[f"{part}_images"], found[f"{part}_labels"]
    grey = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or grey.ndim != 4 or grey.shape[3] not in (1, 3) or 0 in grey.shape:
        raise UserError(
            f"{path}: {part}_images must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), "
            f"not {images.dtype} {images.shape}"
        )
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "ui":
        raise UserError(
            f"{path}: {part}_labels must be one whole number per image, (N,) or (N, 1), "
            f"not {labels.dtype} {labels.shape}; sets with several labels per image are not supported"
        )
    if len(flat) != len(grey):
        raise UserError(f"{path}: {len(grey):,} {part} images but {len(flat):,} labels; make it again")
    if flat.min() < 0 or flat.max() >= MAX_CLASSES:
        raise UserError(f"{path}: {part}_labels must lie in 0 to {MAX_CLASSES - 1:,}, not {flat.min()} to {flat.max()}")
    return np.ascontiguousarray(grey), flat.astype(np.int64)


def _names(names: np.ndarray, path: Path) -> list[str]:
    if names.dtype.kind != "U" or names.ndim != 1 or not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f"{path}: classes must be texts of shape (K,), not {names.dtype} {names.shape}")
    texts = names.tolist()
    if len(set(texts)) != len(texts) or not all(text and text.isprintable() for text in texts):
        raise UserError(f"{path}: classes must be different names of printable characters; make it again")
    return texts
