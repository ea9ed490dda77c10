"""Readers of the IDX and CIFAR files; the files come from outside, so sizes are checked before anything is read."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rd_deploy.common import UserError, check_file

MAX_BYTES = 2 << 30  # of one uncompressed file
FILE_ERRORS = (OSError, EOFError, zlib.error)


def find_idx(folder: Path, part: str, kind: str) -> Path | None:
    """The IDX file of ``part`` (train, t10k) and ``kind`` (images, labels) in ``folder``, gzipped or not."""
    digits = {"images": 3, "labels": 1}[kind]
    names = [f"{part}-{kind}{dot}idx{digits}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """A uint8 array of ``dimensions`` axes from an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    The length must be exactly what the header says, and at most 2 GiB.
    """
    path = check_file(path, "IDX file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            return _read_idx(stream, path, dimensions)
    except FILE_ERRORS as error:
        raise UserError(f"IDX file {path} cannot be read ({error}); download it again") from error


def _read_idx(stream: BinaryIO, path: Path, dimensions: int) -> np.ndarray:
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions; download it again")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise UserError(f"IDX file {path} says it holds {shape} bytes, outside 1 to {MAX_BYTES:,}; download it again")
    data = bytearray()
    while len(data) <= size and (chunk := stream.read(1 << 20)):  # in pieces: the header may promise more than there is
        data += chunk
    if len(data) != size:
        more = "more" if len(data) > size else f"only {len(data):,}"
        raise UserError(f"IDX file {path} should hold {size:,} bytes but holds {more}; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_idx_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 1) and labels int64 (N,) of ``part`` (train or t10k)."""
    paths = [find_idx(folder, part, kind) for kind in ("images", "labels")]
    for path, name in zip(paths, ("images-idx3", "labels-idx1"), strict=True):
        if path is None:
            raise UserError(f"{folder} has no {part}-{name}-ubyte or {part}-{name}-ubyte.gz; give their folder")
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images):,} {part} images but {len(labels):,} labels; download them again")
    return images[..., None], labels.astype(np.int64)
