"""Readers of the IDX and CIFAR files; the files come from outside, so sizes are checked before anything is read."""

import gzip
import io
import math
import pickle
import pickletools
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, ClassVar

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
    data = read_promised(stream, size)
    if len(data) != size:
        more = "more" if len(data) > size else f"only {len(data):,}"
        raise UserError(f"IDX file {path} should hold {size:,} bytes but holds {more}; download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_promised(stream: BinaryIO, size: int) -> bytearray:
    """What follows in a stream whose header promises ``size`` bytes; shorter or longer if the header lied.

    Read in pieces, since a header may promise more than there is memory for, and at most one piece beyond ``size``.
    """
    data = bytearray()
    while len(data) <= size and (chunk := stream.read(1 << 20)):
        data += chunk
    return data


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


class _Stored:
    """Stands in for whatever a CIFAR pickle may construct: it keeps what it was given and runs nothing.

    Having its own ``__setstate__`` also means that a pickle cannot set attributes of the class.
    """

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _CifarUnpickler(pickle.Unpickler):
    """Reads plain containers and the description of a NumPy array; any other name in the file is refused."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return _Stored


def read_cifar_pickle(path: str | Path) -> dict[str, object]:
    """The dictionary in a file of CIFAR's Python version, its keys as text, its arrays not decoded yet.

    Not even NumPy's own constructors run: arrays are checked and built by `read_cifar_batch`.
    """
    path = check_file(path, "CIFAR file", max_bytes=1 << 28)
    try:
        data = path.read_bytes()
        _check_memo(data)
        values = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can raise anything from the unpickler
        raise UserError(f"CIFAR file {path} was refused ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a CIFAR file: it holds no dictionary; download it again")
    return {_text(key): value for key, value in values.items()}


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that numbers what it remembers beyond its own length: the unpickler makes room for all below."""
    for code, number, _ in pickletools.genops(data):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > len(data):
            raise pickle.UnpicklingError(f"it remembers {number:,} things")


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def read_cifar_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels int64 (N,) from one batch file of CIFAR's Python version.

    Format: https://www.cs.toronto.edu/~kriz/cifar.html (rows of 3072 bytes: red, green, blue plane, each 32 x 32).
    """
    values = read_cifar_pickle(path)
    labels, pixels = values.get(label_key), _stored_bytes(values.get("data"))
    whole = isinstance(labels, list) and all(type(label) is int and 0 <= label < 100 for label in labels)
    if not whole or pixels is None or not labels or len(pixels) != 3072 * len(labels):
        raise UserError(f"{path} is not a CIFAR batch: it needs '{label_key}' and 3072 bytes of 'data' for each")
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _stored_bytes(array: object) -> bytes | None:
    """The bytes of a pickled uint8 array in C order (NumPy's state: version, shape, dtype, Fortran order, bytes)."""
    state = getattr(array, "state", None)
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, _, dtype, fortran, data = state
    kind = getattr(dtype, "arguments", ())[:1]
    return data if kind in ((b"u1",), ("u1",)) and not fortran and isinstance(data, bytes) else None


def read_cifar_names(path: Path, key: str) -> list[str]:
    """The class names from ``batches.meta`` (CIFAR-10) or ``meta`` (CIFAR-100)."""
    names = read_cifar_pickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise UserError(f"{path} does not list '{key}'; download it again")
    return [_text(name) for name in names]
