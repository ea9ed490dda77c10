"""Run a TensorRT engine: ``Session("net.engine").run(images)``, or `run_device` on what lies in the GPU's memory.

Threads: a session is used by one thread at a time, and different sessions run side by side. In every call the session's
CUDA context is current and, afterwards, the caller's again.
"""

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rd_deploy.chain import INPUT
from rd_deploy.common import UserError
from rd_deploy.export.files import OUTPUT
from rd_deploy.trt.arrays import DeviceArray, read_array, stream_handle
from rd_deploy.trt.device import LEGACY_STREAM, Gpu, no_gpu
from rd_deploy.trt.engine_file import EngineFile, read_engine
from rd_deploy.trt.flavours import context_bytes
from rd_deploy.trt.messages import Messages

MAX_GRAPHS = 16  # batch sizes whose CUDA graphs are kept; the one that was not used for longest goes first


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run. ``device_ms``: of the network alone, between two events on the GPU. ``host_ms``: by the
    host's clock from before the first call to after the last has finished, copies included where there are any.
    ``graph``: whether the network was the replay of a CUDA graph.
    """

    host_ms: float
    device_ms: float
    graph: bool


class Session:
    """An engine ready to run on one GPU.

    ``engine``: a path, or an `EngineFile`. ``device``: which GPU, as CUDA counts them. ``batch``: the most images per
    run, default the engine's maximum. ``cuda_graph``: record the network once per batch size and replay that; an
    engine that cannot be recorded is then an error. Raises `UserError` without a GPU, for a GPU that the engine is not
    for, and for what `read_engine` refuses.

    ``profile``: batch sizes that the engine takes; ``classes``: names of the logits; ``preprocessing``: makes images of
    photos, ``session.run(session.preprocessing.apply(photos))``.
    """

    def __init__(
        self,
        engine: str | Path | EngineFile,
        device: int = 0,
        batch: int | None = None,
        cuda_graph: bool = True,
    ):
        reason = no_gpu()
        if reason:
            raise UserError(reason)
        file = engine if isinstance(engine, EngineFile) else read_engine(engine)
        self.profile, self.classes, self.preprocessing = file.profile, file.classes, file.preprocessing
        self.batch, self.cuda_graph = _largest(file, batch), cuda_graph
        self._image_shape = file.input_shape
        self._gpu = Gpu(device)
        try:
            file.check_target(self._gpu.target)
            with self._gpu:
                self._prepare(file)
        except BaseException:
            self._gpu.close()
            raise
        self._running = threading.Lock()  # held during a call
        self._finalizer = weakref.finalize(self, _close_idle, self._gpu, self._running)

    def _prepare(self, file: EngineFile) -> None:
        gpu, images, logits = self._gpu, (self.batch, *self._image_shape), (self.batch, len(self.classes))
        self._images, self._logits = (gpu.allocate(int(np.prod(shape)) * 4) for shape in (images, logits))
        self._staged_images, self._staged_logits = gpu.pinned(images), gpu.pinned(logits)
        self._network = _Network(file, gpu)
        self._done = None  # the event at the end of the last run, whichever stream it was on

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @property
    def activation_bytes(self) -> int:
        """The GPU's memory for maps and workspaces, which all batch sizes share."""
        return self._network.activation_bytes

    def close(self) -> None:
        """Wait for what still runs and free everything; done as well when nobody has the session any more."""
        if self._finalizer.detach():
            with self._running:
                self._gpu.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Normalised float32 images (N, C, H, W) to float32 logits (N, classes), both in the host's memory.

        N: from the profile's minimum to ``batch``. Images of any strides are copied to page-locked memory, and from
        there to the GPU. Another type, shape or N is a `UserError`.
        """
        self._check_images(images)
        with self._open():
            self._ready(len(images))
            return self._host_run(images)[0]

    def run_timed(self, images: np.ndarray) -> tuple[np.ndarray, Timing]:
        """`run`, and how long it took from host to host; what is recorded first is not part of it."""
        self._check_images(images)
        with self._open():
            self._ready(len(images))
            start = time.perf_counter()
            logits, marks = self._host_run(images, timed=True)
            return logits, self._timing(start, marks)

    def time_device(self, count: int) -> Timing:
        """How long a run from ``images(count)`` to ``logits(count)`` takes, without any copies."""
        self._check_count(count)
        with self._open():
            self._ready(count)
            start, stream = time.perf_counter(), self._gpu.stream
            marks = self._launch(self.images(count), self.logits(count), stream, timed=True)
            stream.sync()
            return self._timing(start, marks)

    def images(self, count: int) -> DeviceArray:
        """The session's own memory for ``count`` images: fill it, and `run_device` on it replays a graph."""
        self._check_count(count)
        return DeviceArray(self._images, (count, *self._image_shape), None, self)

    def logits(self, count: int) -> DeviceArray:
        """The session's own memory for the logits of ``count`` images, which all runs write that are given no other."""
        self._check_count(count)
        return DeviceArray(self._logits, (count, len(self.classes)), None, self)

    def run_device(self, images: object, logits: object | None = None, stream: object | None = None) -> object:
        """Run on arrays in the GPU's memory, without a copy and without waiting for the end; returns the logits.

        ``images``: contiguous float32 (N, C, H, W) with ``__cuda_array_interface__``: of torch, pycuda, cupy, or
        `images`. ``logits``: (N, classes), written and returned; default, the session's own, whose values hold until
        its next run. ``stream``: a torch, pycuda, cupy or cuda-core stream, or a handle: the run is put there. Without
        one it is put on a stream of the session's, after all that is on the default stream now and before all that
        will be. A stream that an array itself names is treated like the default one, with or without ``stream``.

        A CUDA graph is bound to addresses: it is replayed for the session's own `images` and logits, and other arrays
        are run by TensorRT's ordinary launches. Raises `UserError` for arrays or a stream that do not fit.
        """
        with self._open():
            given = self._located(images, "images", (None, *self._image_shape))
            count = given.shape[0]
            target = self._located(
                self.logits(count) if logits is None else logits, "logits", (count, len(self.classes)), writes=True
            )
            on = self._gpu.stream if stream is None else self._gpu.stream_of(stream_handle(stream))
            around = self._around(on, {given.stream, target.stream, LEGACY_STREAM if stream is None else None})
            for other in around:
                on.wait(other)
            self._launch(given, target, on)
            for other in around:
                other.wait(self._done)
            return replace(target, stream=int(on.handle)) if logits is None else logits

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._running:
            if self.closed:
                raise UserError("this session is closed: make another one")
            with self._gpu:
                yield

    def _host_run(self, images: np.ndarray, timed: bool = False) -> tuple[np.ndarray, tuple | None]:
        """Logits in memory of their own, and the events around the network if ``timed``."""
        count, stream, gpu = len(images), self._gpu.stream, self._gpu
        self._after_last(stream)
        self._staged_images[:count] = images
        gpu.copy_in(self._images, self._staged_images[:count], stream)
        marks = self._launch(self.images(count), self.logits(count), stream, timed)
        gpu.copy_out(self._staged_logits[:count], self._logits, stream)
        stream.sync()
        return self._staged_logits[:count].copy(), marks

    def _launch(self, images: DeviceArray, logits: DeviceArray, on, timed: bool = False) -> tuple | None:
        """Put the network on a stream, after the last run, whose maps lie in the same memory."""
        own = (images.address, logits.address) == (self._images, self._logits)
        if own:
            self._ready(images.shape[0], after=on)
        self._after_last(on)
        begin = self._gpu.mark_time(on) if timed else None
        if own and self.cuda_graph:
            self._network.replay(images.shape[0], on)
        else:
            self._network.enqueue(images, logits, on)
        end = self._gpu.mark_time(on) if timed else None
        self._done = on.record(self._done)
        return (begin, end) if timed else None

    def _ready(self, count: int, after: object | None = None) -> None:
        """Record a batch size's graph unless it is there. It warms up, writing `logits`: ``after`` a stream's work."""
        if not self.cuda_graph or self._network.has(count):
            return
        stream = self._gpu.stream
        self._after_last(stream)
        if after is not None:
            stream.wait(after)
        self._network.record(self.images(count), self.logits(count))

    def _after_last(self, stream) -> None:
        if self._done is not None:
            stream.wait(self._done)

    def _timing(self, start: float, marks: tuple) -> Timing:
        """Called when the stream has got to the last mark."""
        begin, end = marks
        return Timing((time.perf_counter() - start) * 1e3, end - begin, self.cuda_graph)

    def _around(self, on, handles: set[int | None]) -> list:
        """The streams, other than the run's own, whose work the run comes after and before."""
        return [self._gpu.stream_of(handle) for handle in sorted(handles - {None, int(on.handle)})]

    def _check_images(self, images: object) -> None:
        if not isinstance(images, np.ndarray):
            hint = "; run_device takes it" if hasattr(images, "__cuda_array_interface__") else ""
            raise UserError(f"images must be a NumPy array, not {type(images).__name__}{hint}")
        self._check_shape(images.shape, "images", (None, *self._image_shape))
        if images.dtype != np.float32:
            raise UserError(f"images must be float32, not {images.dtype}; see Session.preprocessing")

    def _located(self, value: object, what: str, shape: tuple, writes: bool = False) -> DeviceArray:
        """An array in the GPU's memory of this shape (None: any number of images), in the session's context."""
        array = read_array(value, what, writes)
        self._check_shape(array.shape, what, shape)
        place = self._gpu.place(array.address)
        if place is None:
            raise UserError(f"{what} lies at {array.address:#x}, which is no memory of a GPU")
        ordinal, context = place
        if ordinal != self._gpu.ordinal:
            raise UserError(
                f"{what} is on GPU {ordinal}, the session on {self._gpu.ordinal}: make it with device={ordinal}"
            )
        if context not in (0, self._gpu.context):
            raise UserError(f"{what} is of another CUDA context than the session: make both in the same one")
        return array

    def _check_shape(self, shape: tuple[int, ...], what: str, wanted: tuple) -> None:
        if len(shape) != len(wanted) or any(
            size not in (None, found) for size, found in zip(wanted, shape, strict=True)
        ):
            raise UserError(f"{what} must be ({', '.join(str(size or 'N') for size in wanted)}), not {tuple(shape)}")
        self._check_count(shape[0])

    def _check_count(self, count: int) -> None:
        if not self.profile.minimum <= count <= self.batch:
            limit = "" if self.batch == self.profile.maximum else f", the engine at most {self.profile.maximum}"
            raise UserError(f"this session takes {self.profile.minimum} to {self.batch} images, not {count}{limit}")


def _close_idle(gpu: Gpu, running: threading.Lock) -> None:
    """Close what a session left, unless a call is running: at exit, a daemon thread may still be in one.

    Then nothing is freed below it, and the driver takes all of it back with the process. Otherwise closing is right
    even at exit: TensorRT's objects want to go in their order, in their context, after the work that they have queued.
    """
    if running.acquire(blocking=False):
        try:
            gpu.close()
        finally:
            running.release()  # a later call says that the session is closed


def _largest(file: EngineFile, batch: int | None) -> int:
    """The most images per run."""
    profile = file.profile
    if batch is None:
        return profile.maximum
    if not profile.minimum <= batch <= profile.maximum:
        raise UserError(
            f"batch {batch}: {file.path} takes {profile.minimum} to {profile.maximum}; {file.rebuild} rebuilds it"
        )
    return batch


class _Network:
    """A deserialised engine and its execution contexts, whose maps share one piece of the GPU's memory.

    A recorded graph is of one context, which must not change any more (NVIDIA's best practices), so each has its own;
    arrays that are not the session's go through one more, which is set anew for each run.
    """

    def __init__(self, file: EngineFile, gpu: Gpu):
        self._gpu, self._trt, self._messages = gpu, file.flavour.module, Messages(file.flavour.module)
        self._recorded: OrderedDict[int, _Execution] = OrderedDict()
        self._plain: _Execution | None = None
        gpu.on_close(self._close)
        checked = self._messages.checked
        self._runtime = checked(self._trt.Runtime(self._messages.logger), "start")
        self._engine = checked(self._runtime.deserialize_cuda_engine(file.content), f"load {file.path}")
        self._check_tensors(file)
        self.activation_bytes = checked(context_bytes(self._engine), "tell its device memory")
        self._memory = gpu.allocate(self.activation_bytes)
        self._options = self._context_options()

    def _check_tensors(self, file: EngineFile) -> None:
        engine, names = self._engine, {INPUT, OUTPUT}
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if found != names or any(engine.get_tensor_dtype(name) != self._trt.float32 for name in names):
            raise UserError(f"{file.path} does not read float32 {INPUT} and write float32 {OUTPUT}: {file.rebuild}")
        for name, wanted in ((INPUT, file.input_shape), (OUTPUT, (len(file.classes),))):
            found = tuple(engine.get_tensor_shape(name))[1:]
            if found != wanted:  # memory is allocated as the sidecar says, and TensorRT writes as the engine does
                raise UserError(
                    f"{file.path} has {name} of shape {found}, not {wanted} as its sidecar says: {file.rebuild}"
                )

    def _context_options(self):
        """How contexts are made: in our memory; where kernels are compiled at run time, for the very shape, once."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return strategy
        options = self._engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(strategy)
        if hasattr(options, "dynamic_shapes_kernel_specialization_strategy"):
            # Else a graph would keep the general kernels that run while those for the shape are compiled.
            eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            options.dynamic_shapes_kernel_specialization_strategy = eager
        if hasattr(options, "create_runtime_cache"):
            options.set_runtime_cache(options.create_runtime_cache())
        return options

    def has(self, count: int) -> bool:
        """Whether a graph is recorded for this batch size."""
        return count in self._recorded

    def record(self, images: DeviceArray, logits: DeviceArray) -> None:
        """Record a graph for arrays that stay where they are; runs once before, on the GPU's own stream."""
        stream, execution = self._gpu.stream, self._execution()
        execution.bind(images, logits)
        execution.enqueue(stream)  # shapes take effect and kernels are loaded, neither of which can be recorded
        stream.sync()
        execution.check_recordable(stream)
        while len(self._recorded) >= MAX_GRAPHS:  # none of them runs any more: the stream has waited for the last run
            self._recorded.popitem(last=False)[1].close()
        execution.graph = self._gpu.record(lambda: execution.enqueue(stream))
        self._recorded[images.shape[0]] = execution

    def replay(self, count: int, stream) -> None:
        self._recorded.move_to_end(count)
        self._recorded[count].graph.launch(stream)

    def enqueue(self, images: DeviceArray, logits: DeviceArray, stream) -> None:
        """Run on any arrays, without a graph."""
        self._plain = self._plain or self._execution()
        self._plain.bind(images, logits)
        self._plain.enqueue(stream)

    def _execution(self) -> "_Execution":
        context = self._messages.checked(self._engine.create_execution_context(self._options), "make a context")
        if self._memory:
            context.set_device_memory(self._memory, self.activation_bytes)
        return _Execution(context, self._messages)

    def _close(self) -> None:
        """Let go of everything in TensorRT's order: graphs and contexts, the engine, the runtime."""
        for execution in self._recorded.values():
            execution.close()
        self._recorded.clear()
        for name in ("_plain", "_options", "_engine", "_runtime"):
            setattr(self, name, None)


class _Execution:
    """An execution context, and the graph recorded from it if there is one."""

    def __init__(self, context, messages: Messages):
        self._context, self._checked, self._bound, self.graph = context, messages.checked, None, None

    def bind(self, images: DeviceArray, logits: DeviceArray) -> None:
        wanted = (images.shape, images.address, logits.address)
        if wanted == self._bound:
            return
        self._bound = None  # a failure below leaves it half set
        self._checked(self._context.set_input_shape(INPUT, images.shape), f"take images of shape {images.shape}")
        for name, array in ((INPUT, images), (OUTPUT, logits)):
            self._checked(self._context.set_tensor_address(name, array.address), f"use the memory of {name}")
        self._bound = wanted

    def enqueue(self, stream) -> None:
        self._checked(self._context.execute_async_v3(int(stream.handle)), "run the network")

    def check_recordable(self, stream) -> None:
        asked = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX's
        if asked is not None and not asked(int(stream.handle)):
            raise UserError(
                "TensorRT cannot record this engine as a CUDA graph: Session(..., cuda_graph=False) runs it"
            )

    def close(self) -> None:
        self.graph.close()
        self.graph = self._context = None
