"""The GPU below a TensorRT session: contexts and memory by cuda.bindings, streams, events and graphs by cuda-core.

Everything happens in the CUDA context that was current when the session was made (pycuda's, say), else in the GPU's
primary one, which torch and cupy use. cuda-core's ``Device.set_current()`` puts the primary context in the place of the
current one, and what a ``Device`` allocates goes there: so contexts and memory are the driver's own calls here.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from types import ModuleType

import numpy as np

from rd_deploy.common import UserError, one_line

NO_GPU = "running a TensorRT engine needs an NVIDIA GPU and driver; none is visible ({})"
NO_CUDA_CORE = "running a TensorRT engine needs cuda-core, which is not usable here ({}): pip install cuda-core"
LEGACY_STREAM = 1  # the driver's handle of the default stream, which 0 stands for as well
MAX_STREAMS = 16  # callers' streams that are remembered


def no_gpu() -> str | None:
    """One line when no TensorRT engine can run here. Ask before TensorRT: its runtime may crash without a driver."""
    try:
        driver, _ = _driver(), _core()
    except UserError as reason:
        return str(reason)
    try:
        error = driver.cuInit(0)[0] or driver.cuDeviceGetCount()[0]
        count = 0 if error else driver.cuDeviceGetCount()[1]
    except Exception:  # which one, when there is no libcuda, depends on the version of cuda-bindings
        return NO_GPU.format("the driver's library, libcuda, cannot be loaded")
    if error:
        return NO_GPU.format(f"the driver says {_name(error)}")
    return None if count else NO_GPU.format("the driver lists no GPU")


def _name(error) -> str:
    return getattr(error, "name", f"error {error}")  # a plain number when the driver is newer than cuda-bindings


def _core() -> ModuleType:
    """cuda-core, which was ``cuda.core.experimental`` before it was ``cuda.core``."""
    reason = "it has no Stream"
    for name in ("cuda.core", "cuda.core.experimental"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reason = one_line(error)
            continue
        if hasattr(module, "Stream"):
            return module
    raise UserError(NO_CUDA_CORE.format(reason))


def _driver() -> ModuleType:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UserError(NO_CUDA_CORE.format(one_line(error))) from error


class Gpu:
    """One GPU and all that a session holds of it; ``with gpu:`` makes its context current, and the caller's after that.

    ``ordinal``: which GPU, as CUDA counts them. ``target``: its compute capability, such as ``sm89``. ``context``: the
    handle of the context that it works in. ``stream``: its own stream, which does not wait for the default one.
    Streams, events and graphs are cuda-core's. Raises `UserError` for a GPU that is not there.
    """

    def __init__(self, ordinal: int = 0):
        self._driver, self._core = _driver(), _core()
        self._streams, self._owned = {}, contextlib.ExitStack()
        self._device = self._find(ordinal)
        self.ordinal = ordinal
        self.target = f"sm{self._attribute('MAJOR')}{self._attribute('MINOR')}"
        name = "timing_enabled" if hasattr(self._core.EventOptions, "timing_enabled") else "enable_timing"
        self._timed = self._core.EventOptions(**{name: True})
        self._context, self._primary = self._choose_context()
        self.context = int(self._context)
        try:
            with self:
                self.stream = self._own_stream()
        except BaseException:
            self.close()
            raise

    def _find(self, ordinal: int):
        self._call("start", self._driver.cuInit, 0)
        count = self._call("count its GPUs", self._driver.cuDeviceGetCount)
        if not 0 <= ordinal < count:
            raise UserError(f"there is no GPU {ordinal}; those visible here are 0 to {count - 1}")
        return self._call("open the GPU", self._driver.cuDeviceGet, ordinal)

    def _attribute(self, part: str) -> int:
        kind = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}")
        return self._call("describe the GPU", self._driver.cuDeviceGetAttribute, kind, self._device)

    def _choose_context(self) -> tuple[object, bool]:
        """The current context if it is of this GPU, else the primary one, and whether that must be released."""
        driver = self._driver
        current = self._call("ask for the context", driver.cuCtxGetCurrent)
        if int(current) and int(self._call("ask for the GPU", driver.cuCtxGetDevice)) == int(self._device):
            return current, False
        return self._call("open the primary context", driver.cuDevicePrimaryCtxRetain, self._device), True

    def _own_stream(self):
        flag = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = self._call("make a stream", self._driver.cuStreamCreate, int(flag))
        self.on_close(self._driver.cuStreamDestroy, stream)
        return self._core.Stream.from_handle(int(stream))

    def __enter__(self) -> "Gpu":
        self._call("enter the context", self._driver.cuCtxPushCurrent, self._context)
        return self

    def __exit__(self, *exception) -> None:
        self._driver.cuCtxPopCurrent()

    def on_close(self, function: Callable, *arguments) -> None:
        """What to call when the GPU is closed, in its context, the last one first."""
        self._owned.callback(function, *arguments)

    def close(self) -> None:
        """Wait for all work in the context, then free everything; does nothing the second time."""
        if self._context is None:
            return
        with self, self._owned:
            self._driver.cuCtxSynchronize()
        if self._primary:
            self._driver.cuDevicePrimaryCtxRelease(self._device)
        self._context = None

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of the GPU's memory, 256-byte aligned, not initialised; 0 for no bytes."""
        if not size:
            return 0
        address = self._call(f"give {size:,} bytes of the GPU's memory", self._driver.cuMemAlloc, size)
        self.on_close(self._driver.cuMemFree, address)
        return int(address)

    def pinned(self, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array in page-locked memory, which copies to and from the GPU need to be asynchronous."""
        size = int(np.prod(shape)) * 4
        address = self._call(f"give {size:,} bytes of page-locked memory", self._driver.cuMemAllocHost, size)
        self.on_close(self._driver.cuMemFreeHost, address)
        return np.frombuffer((ctypes.c_byte * size).from_address(address), np.float32).reshape(shape)

    def copy_in(self, address: int, array: np.ndarray, stream) -> None:
        """Copy a contiguous array to the GPU, in the order of the stream; the array must stay as it is until then."""
        source, size = array.ctypes.data, array.nbytes
        self._call("copy to the GPU", self._driver.cuMemcpyHtoDAsync, address, source, size, stream.handle)

    def copy_out(self, array: np.ndarray, address: int, stream) -> None:
        """Copy from the GPU to a contiguous array, which holds the values once the stream has got there."""
        target, size = array.ctypes.data, array.nbytes
        self._call("copy from the GPU", self._driver.cuMemcpyDtoHAsync, target, address, size, stream.handle)

    def place(self, address: int) -> tuple[int, int] | None:
        """The ordinal of the GPU and the handle of the context that memory is of; None for memory CUDA does not know.

        The handle is 0 for memory of no one context, such as that of a pool.
        """
        kinds = self._driver.CUpointer_attribute
        error, ordinal = self._driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        if error:
            return None
        error, context = self._driver.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_CONTEXT, address)
        return int(ordinal), 0 if error or context is None else int(context)

    def stream_of(self, handle: int):
        """A caller's stream. Raises `UserError` when it is of another context, where it cannot be waited for."""
        if handle not in self._streams:
            context = self._call("find the stream", self._driver.cuStreamGetCtx, handle)
            if int(context) != self.context:
                raise UserError("the stream is of another CUDA context than the session: make both in the same one")
            if len(self._streams) >= MAX_STREAMS:
                self._streams.clear()
            self._streams[handle] = self._core.Stream.from_handle(handle)
        return self._streams[handle]

    def mark_time(self, stream):
        """An event at this place of the stream; once reached, ``later - earlier`` are the milliseconds between two."""
        return stream.record(options=self._timed)

    def record(self, work: Callable[[], object]):
        """A CUDA graph of what ``work`` puts on `stream`, instead of running it. Raises `UserError` if that fails."""
        builder = self.stream.create_graph_builder()
        try:
            # Of this thread alone: others may allocate meanwhile, which a global recording would make an error.
            builder.begin_building(mode="thread_local")
            work()
            return builder.end_building().complete()
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)[:160]
            raise UserError(f"cannot be recorded as a CUDA graph ({reason}): cuda_graph=False runs without") from error
        finally:
            with contextlib.suppress(Exception):  # ends a recording that failed; there is nothing more to say of it
                builder.close()

    def _call(self, what: str, function: Callable, *arguments):
        """A driver call's one result, or `UserError` with the driver's name of what went wrong."""
        error, *values = function(*arguments)
        if error:
            raise UserError(f"CUDA cannot {what}: {_name(error)}")
        return values[0] if values else None
