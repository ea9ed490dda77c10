"""Arrays in a GPU's memory as all libraries exchange them: the CUDA Array Interface, up to version 3.

An array says where it lies, its shape, type and strides, and, from version 3 on, which stream it may be in use on:
https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html
"""

from dataclasses import dataclass

import numpy as np

from rd_deploy.common import UserError, one_line
from rd_deploy.trt.device import LEGACY_STREAM

NEWEST = 3  # the newest version of the interface that is understood
ALIGNMENT = 256  # bytes: what TensorRT asks of every address
STREAM_ATTRIBUTES = ("cuda_stream", "handle", "ptr")  # torch, pycuda, cupy


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous float32 array in a GPU's memory: ``torch.as_tensor`` and ``cupy.asarray`` take it without a copy.

    ``stream``: handle of the stream that it may be in use on, or None. ``owner``: whose memory it is, kept alive; an
    owner that has been closed makes the array unusable.
    """

    address: int
    shape: tuple[int, ...]
    stream: int | None
    owner: object
    read_only: bool = False

    @property
    def __cuda_array_interface__(self) -> dict:
        if getattr(self.owner, "closed", False):
            raise UserError("this memory was its session's, which is closed: copy what you need before")
        return {
            "shape": self.shape,
            "typestr": np.dtype(np.float32).str,
            "data": (self.address, self.read_only),
            "strides": None,
            "stream": self.stream,
            "version": NEWEST,
        }


def read_array(value: object, what: str, writes: bool = False) -> DeviceArray:
    """What lies behind an object's ``__cuda_array_interface__``; nothing is copied. Raises `UserError`.

    ``what``: its name in messages. ``writes``: refuse memory that must not be written. The memory's place is not
    checked here.
    """
    interface = _interface(value, what)
    version, stream = interface.get("version"), interface.get("stream")
    if type(version) is not int or not 0 <= version <= NEWEST:
        raise UserError(f"{what} has version {version} of __cuda_array_interface__; this reads those up to {NEWEST}")
    shape, (address, read_only) = tuple(interface["shape"]), interface["data"]
    _check_layout(interface, shape, what)
    if not address or address % ALIGNMENT:
        raise UserError(f"{what} must start at a multiple of {ALIGNMENT} bytes, not at {address or 0:#x}: copy it")
    if writes and read_only:
        raise UserError(f"{what} is read-only: give memory that can be written")
    if stream is not None and (type(stream) is not int or stream <= 0):
        raise UserError(f"{what} names the stream {stream!r}, which the interface forbids: 1 is the default one")
    return DeviceArray(int(address), shape, stream, value, bool(read_only))


def _interface(value: object, what: str) -> dict:
    try:
        interface = value.__cuda_array_interface__
    except AttributeError as error:
        hint = "run() takes NumPy arrays" if isinstance(value, np.ndarray) else "torch, pycuda and cupy make such"
        raise UserError(
            f"{what} must be in a GPU's memory, with __cuda_array_interface__, unlike {type(value).__name__}; {hint}"
        ) from error
    except RuntimeError as error:  # torch, of a tensor that requires a gradient: it says to use detach()
        raise UserError(f"{what} cannot be used: {one_line(error)}") from error
    missing = [name for name in ("shape", "typestr", "data") if name not in interface]
    if missing:
        raise UserError(f"{what} has a __cuda_array_interface__ without {', '.join(missing)}")
    return interface


def _check_layout(interface: dict, shape: tuple[int, ...], what: str) -> None:
    if np.dtype(interface["typestr"]) != np.float32:
        raise UserError(f"{what} must be float32, not {np.dtype(interface['typestr'])}: cast it on the GPU")
    if interface.get("mask") is not None:
        raise UserError(f"{what} is masked: give an array without a mask")
    strides = interface.get("strides")
    if strides is not None and not _contiguous(shape, tuple(strides)):
        raise UserError(f"{what} must be contiguous (NCHW, in C order), not with strides {tuple(strides)}: copy it")


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides in bytes are those of C order; a dimension of one element may have any."""
    expected = 4
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def stream_handle(stream: object) -> int:
    """A stream's handle: of an int, a torch, pycuda, cupy or cuda-core stream, or anything with ``__cuda_stream__``."""
    if hasattr(stream, "__cuda_stream__"):
        handle = stream.__cuda_stream__()[1]
    else:
        names = [name for name in STREAM_ATTRIBUTES if hasattr(stream, name)]
        handle = getattr(stream, names[0]) if names else stream
    if type(handle) is not int or handle < 0:
        raise UserError(f"stream must be a CUDA stream or its handle, not {type(stream).__name__} {stream!r:.60}")
    return handle or LEGACY_STREAM
