"""A GPU and a TensorRT for tests: NumPy arrays are its memory, ONNX Runtime its kernels, and its streams are lazy.

Work that is put on a stream is done when somebody waits for it, no sooner, so a forgotten wait leaves old values. What
each piece of work reads and writes is also checked against everything put on other streams before: two accesses of
which none is ordered after the other are a `Race`. Freed memory becomes NaN, and using it is an error.
"""

import enum
import itertools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnxruntime

from rd_deploy.common import UserError
from rd_deploy.trt.device import LEGACY_STREAM

PRIMARY, FOREIGN = 0xA0, 0xB0  # handles of contexts: the primary one, and one that pycuda would make
SCRATCH = 4096


class Race(AssertionError):
    """Two accesses to the same memory, at least one of them a write, that nothing orders."""


class Block:
    """A piece of the GPU's memory, with the last write to it and the reads since, as (stream, tick)."""

    def __init__(self, size: int, ordinal: int, context: int):
        raw = np.full(size + 512, 0xFF, np.uint8)  # float32 of these bits are NaN
        start = -raw.ctypes.data % 256
        self.bytes, self.address = raw[start : start + size], raw.ctypes.data + start
        self.ordinal, self.context, self.alive = ordinal, context, True
        self.write, self.reads = None, {}


class World:
    """All memory, streams and contexts of a test. ``log``: what was put on which stream, in order."""

    def __init__(self):
        self.blocks, self.streams, self.contexts, self.log = [], {}, [], []
        self.pinned: list[np.ndarray] = []
        self.host = {}  # what the host has waited for: by stream, the last tick
        self._handles = itertools.count(0x100)
        self.legacy = Stream(self, LEGACY_STREAM, None)

    def stream(self, context: int = PRIMARY) -> "Stream":
        return Stream(self, next(self._handles), context)

    def allocate(self, size: int, ordinal: int = 0, context: int = PRIMARY) -> Block:
        self.blocks.append(Block(size, ordinal, context))
        return self.blocks[-1]

    def free(self, block: Block) -> None:
        block.bytes[:] = 0xFF
        block.alive = False

    def find(self, address: int, size: int = 1) -> Block | None:
        inside = (b for b in self.blocks if b.address <= address and address + size <= b.address + len(b.bytes))
        return next(inside, None)

    def floats(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        """The memory at an address, which must be somebody's."""
        size = int(np.prod(shape)) * 4
        block = self.find(address, size)
        assert block is not None, f"{size} bytes at {address:#x} are nobody's memory"
        assert block.alive, f"{address:#x} was freed"
        start = address - block.address
        return block.bytes[start : start + size].view(np.float32).reshape(shape)

    @property
    def live(self) -> int:
        return sum(block.alive for block in self.blocks) + len(self.pinned)

    def array(self, values: np.ndarray, **interface) -> "Array":
        """Memory of another library's that already holds these values."""
        block = self.allocate(values.nbytes, interface.pop("ordinal", 0), interface.pop("context", PRIMARY))
        block.bytes[:] = np.frombuffer(values.tobytes(), np.uint8)
        return Array(self, block.address, values.shape, interface)

    def check_current(self, context: int) -> None:
        assert self.contexts, "no CUDA context is current"
        assert self.contexts[-1] == context, "another CUDA context is current"


class Array:
    """Another library's array: ``interface`` replaces entries of its ``__cuda_array_interface__``."""

    def __init__(self, world: World, address: int, shape: tuple[int, ...], interface: dict):
        self.world, self.address, self.shape = world, address, shape
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "version": 3,
            **interface,
        }

    def fill(self, values: np.ndarray, stream: "Stream") -> None:
        """Copy values to it in a stream, as a kernel of that library would."""
        values, view = np.array(values), self.world.floats(self.address, self.shape)
        stream.put("fill", lambda: np.copyto(view, values), writes=[self.address])

    def read(self, stream: "Stream") -> np.ndarray:
        """What a library's kernel in a stream finds in it: copies, then waits."""
        found = np.empty(self.shape, np.float32)
        view = self.world.floats(self.address, self.shape)
        stream.put("read", lambda: np.copyto(found, view), reads=[self.address])
        stream.sync()
        return found


def array_of(world: World, value: object) -> Array:
    """What torch.as_tensor, cupy.asarray and the like make of an object: its memory, not a copy."""
    interface = value.__cuda_array_interface__
    assert (interface["version"], interface["strides"]) == (3, None)
    return Array(world, interface["data"][0], tuple(interface["shape"]), {})


class Mark:
    """A place in a stream."""

    def __init__(self, stream: "Stream"):
        self.stream, self.done, self.time = stream, False, None
        self.clock = dict(stream.clock)


class Event:
    def __init__(self):
        self.mark = None

    def __sub__(self, other: "Event") -> float:
        assert all((self.mark.done, other.mark.done)), "events that were not reached have no times"
        return self.mark.time - other.mark.time


class Stream:
    """A stream with cuda-core's methods."""

    def __init__(self, world: World, handle: int, context: int | None):
        self.world, self.handle, self.context = world, handle, context
        self.queue, self.clock, self.capture = deque(), {handle: 0}, None
        self.seconds = itertools.count()
        world.streams[handle] = self

    def put(self, name: str, work: Callable[[], None], reads=(), writes=()) -> None:
        if self.capture is not None:
            self.capture.append((name, work, reads, writes))
            return
        self.world.log.append((name, self.handle))
        self._tick()
        for address in reads:
            self._read(self.world.find(address))
        for address in writes:
            self._write(self.world.find(address))
        self.queue.append(work)

    def _tick(self) -> None:
        for handle, tick in self.world.host.items():
            self.clock[handle] = max(tick, self.clock.get(handle, 0))
        self.clock[self.handle] += 1

    def _after(self, access: tuple[int, int] | None) -> bool:
        return access is None or self.clock.get(access[0], 0) >= access[1]

    def _read(self, block: Block) -> None:
        if not self._after(block.write):
            raise Race(f"stream {self.handle:#x} reads what stream {block.write[0]:#x} writes")
        block.reads[self.handle] = self.clock[self.handle]

    def _write(self, block: Block) -> None:
        for access in (block.write, *block.reads.items()):
            if not self._after(access):
                raise Race(f"stream {self.handle:#x} writes what stream {access[0]:#x} uses")
        block.write, block.reads = (self.handle, self.clock[self.handle]), {}

    def record(self, event: Event | None = None, options: object | None = None) -> Event:
        assert self.capture is None, "an event in a recording"
        self._tick()
        event = event or Event()
        event.mark = mark = Mark(self)

        def reached() -> None:
            mark.done, mark.time = True, float(next(CLOCK))

        reached.mark = mark
        self.queue.append(reached)
        return event

    def wait(self, other: "Event | Stream") -> None:
        mark = (other.record() if isinstance(other, Stream) else other).mark
        for handle, tick in mark.clock.items():
            self.clock[handle] = max(tick, self.clock.get(handle, 0))
        self.queue.append(lambda: mark.stream.run_until(mark))

    def run_until(self, mark: Mark | None) -> None:
        while self.queue and not (mark is not None and mark.done):
            self.queue.popleft()()

    def sync(self) -> None:
        assert self.capture is None, "a wait in a recording"
        self.run_until(None)
        for handle, tick in self.clock.items():
            self.world.host[handle] = max(tick, self.world.host.get(handle, 0))


CLOCK = itertools.count()


class Graph:
    def __init__(self, work: list[tuple]):
        self.work, self.closed = work, False

    def launch(self, stream: Stream) -> None:
        assert not self.closed, "a graph that was closed"
        reads = [address for _, _, addresses, _ in self.work for address in addresses]
        writes = [address for _, _, _, addresses in self.work for address in addresses]
        stream.put("graph", self._run, reads, writes)

    def _run(self) -> None:
        assert not self.closed, "a graph that was closed before it had run"
        for _, work, _, _ in self.work:
            work()

    def close(self) -> None:
        self.closed = True


class FakeGpu:
    """`rd_deploy.trt.device.Gpu` in a `World`: the same methods, which a test compares."""

    world: World = None  # of the test that runs
    target = "sm89"
    count = 2
    records = True  # whether graphs can be recorded

    def __init__(self, ordinal: int = 0):
        if not 0 <= ordinal < self.count:
            raise UserError(f"there is no GPU {ordinal}; those visible here are 0 to {self.count - 1}")
        self.ordinal, self._closing, self._open = ordinal, [], True
        self.context = self.world.contexts[-1] if self.world.contexts else PRIMARY
        self.stream = self.world.stream(self.context)

    def __enter__(self) -> "FakeGpu":
        self.world.contexts.append(self.context)
        return self

    def __exit__(self, *exception) -> None:
        assert self.world.contexts.pop() == self.context

    def on_close(self, function: Callable, *arguments) -> None:
        self._closing.append((function, arguments))

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        with self:
            for stream in list(self.world.streams.values()):
                stream.sync()
            for function, arguments in reversed(self._closing):
                function(*arguments)

    def allocate(self, size: int) -> int:
        self.world.check_current(self.context)
        if not size:
            return 0
        block = self.world.allocate(size, self.ordinal, self.context)
        self.on_close(self.world.free, block)
        return block.address

    def pinned(self, shape: tuple[int, ...]) -> np.ndarray:
        self.world.check_current(self.context)
        array = np.full(shape, np.nan, np.float32)
        self.world.pinned.append(array)
        self.on_close(self._unpin, array)
        return array

    def _unpin(self, array: np.ndarray) -> None:
        self.world.pinned = [other for other in self.world.pinned if other is not array]
        array[:] = np.nan

    def copy_in(self, address: int, array: np.ndarray, stream: Stream) -> None:
        self._check_copy(array)
        view = self.world.floats(address, array.shape)
        stream.put("copy in", lambda: np.copyto(view, array), writes=[address])

    def copy_out(self, array: np.ndarray, address: int, stream: Stream) -> None:
        self._check_copy(array)
        view = self.world.floats(address, array.shape)
        stream.put("copy out", lambda: np.copyto(array, view), reads=[address])

    def _check_copy(self, array: np.ndarray) -> None:
        self.world.check_current(self.context)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert any(np.shares_memory(array, pinned) for pinned in self.world.pinned), "a copy of pageable memory waits"

    def place(self, address: int) -> tuple[int, int] | None:
        self.world.check_current(self.context)
        block = self.world.find(address)
        return None if block is None else (block.ordinal, block.context)

    def stream_of(self, handle: int) -> Stream:
        stream = self.world.streams[handle]
        if stream.context not in (None, self.context):
            raise UserError("the stream is of another CUDA context than the session: make both in the same one")
        return stream

    def mark_time(self, stream: Stream) -> Event:
        return stream.record()

    def record(self, work: Callable[[], object]) -> Graph:
        self.world.check_current(self.context)
        if not self.records:
            raise UserError("cannot be recorded as a CUDA graph (no): cuda_graph=False runs without")
        self.stream.capture = recorded = []
        try:
            work()
        finally:
            self.stream.capture = None
        return Graph(recorded)


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 1


class Specialization(enum.Enum):
    LAZY = 0
    EAGER = 1


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 2


class ILogger:
    def __init__(self):
        pass

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


ILogger.Severity = Severity


def fake_trt(world: World, minimum: int, maximum: int, rtx: bool = False) -> SimpleNamespace:
    """A TensorRT module whose engines are ONNX files. ``rtx``: with runtime configurations, as TensorRT-RTX has."""
    state = SimpleNamespace(world=world, minimum=minimum, maximum=maximum, rtx=rtx, alive=set(), capturable=True)

    class Runtime(Living):
        def __init__(self, logger: ILogger):
            super().__init__(state, logger)

        def deserialize_cuda_engine(self, content: bytes):
            if not content.startswith(b"\x08"):
                self.logger.log(Severity.ERROR, "magic tag\n  does not match")
                return None
            return (RtxEngine if rtx else Engine)(state, self.logger, content)

    return SimpleNamespace(
        ILogger=ILogger,
        Runtime=Runtime,
        float32="float32",
        ExecutionContextAllocationStrategy=Strategy,
        DynamicShapesKernelSpecializationStrategy=Specialization,
        state=state,
        __version__="1.0",
    )


class Living:
    """An object of TensorRT's; ``state.alive`` counts them, to find what is not let go."""

    def __init__(self, state: SimpleNamespace, logger: ILogger):
        self.state, self.logger = state, logger
        state.alive.add(id(self))

    def __del__(self):
        self.state.alive.discard(id(self))


class Engine(Living):
    num_io_tensors = 2
    device_memory_size_v2 = SCRATCH
    dtypes = ("float32", "float32")

    def __init__(self, state: SimpleNamespace, logger: ILogger, content: bytes):
        super().__init__(state, logger)
        self.ort = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.dtypes[("images", "logits").index(name)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (value,) = [x for x in (*self.ort.get_inputs(), *self.ort.get_outputs()) if x.name == name]
        return tuple(size if isinstance(size, int) else -1 for size in value.shape)

    def create_execution_context(self, strategy: Strategy) -> "Context":
        assert strategy is Strategy.USER_MANAGED
        return Context(self)


class RtxEngine(Engine):
    def create_runtime_config(self) -> "RuntimeConfig":
        return RuntimeConfig()

    def create_execution_context(self, options: "RuntimeConfig") -> "Context":
        assert options.strategy is Strategy.USER_MANAGED
        assert options.dynamic_shapes_kernel_specialization_strategy is Specialization.EAGER
        assert options.cache is not None
        return RtxContext(self)


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
    strategy, cache = Strategy.STATIC, None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self.cache = cache
        return True


class Context(Living):
    """An execution context: its work reads the images' memory when the stream gets there, and uses its scratch memory.

    As in TensorRT, what was recorded is void once the context is set to anything else: it writes NaN.
    """

    def __init__(self, engine: Engine):
        super().__init__(engine.state, engine.logger)
        self.engine, self.addresses, self.shape, self.memory = engine, {}, None, None
        self.version, self.settled = 0, None  # settled: the version that has run outside a recording

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= SCRATCH
        assert self.state.world.find(memory, SCRATCH) is not None
        self.memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        assert isinstance(shape, tuple)
        if not self.state.minimum <= shape[0] <= self.state.maximum:
            self.logger.log(Severity.ERROR, f"shape {shape} is outside the profile")
            return False
        self.shape, self.version = shape, self.version + 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in ("images", "logits")
        assert memory % 256 == 0
        self.addresses[name], self.version = memory, self.version + 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        world = self.state.world
        stream = world.streams[stream_handle]
        world.check_current(stream.context or world.contexts[-1])
        assert None not in (self.memory, self.shape)
        assert len(self.addresses) == 2
        if stream.capture is None:
            self.settled = self.version
        elif self.settled != self.version:
            self.logger.log(Severity.ERROR, "deferred work in a recording")
            return False
        writes = [self.addresses["logits"], self.memory]
        stream.put("network", self._work(stream.capture is not None), [self.addresses["images"]], writes)
        return True

    def _work(self, recorded: bool) -> Callable[[], None]:
        world, version, shape, addresses = self.state.world, self.version, self.shape, dict(self.addresses)

        def work() -> None:
            (values,) = self.engine.ort.run(None, {"images": world.floats(addresses["images"], shape)})
            void = recorded and version != self.version
            world.floats(addresses["logits"], values.shape)[:] = np.nan if void else values

        return work


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return self.state.capturable and stream in self.state.world.streams
