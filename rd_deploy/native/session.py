"""The compiled engine from Python: `Network`, `Plan` and `Context` as in include/rd.h, and `Session`, all in one.

Threads: networks and plans are immutable and may be shared. A context serves one call at a time; a second call waits.
Contexts of one plan run at the same time. Calls release Python's lock. No context survives ``os.fork``.
"""

import ctypes
import enum
import json
import os
import threading
import weakref
from collections.abc import Callable
from ctypes import byref, c_double, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rd_deploy.common import UserError
from rd_deploy.cpus import available_threads
from rd_deploy.native import library as c
from rd_deploy.preprocessing import Preprocessing

ALIGNMENT = 64  # bytes, of a file in memory and of an arena


class Flag(enum.IntFlag):
    """Options of `Network.plan`."""

    NONE = 0
    TRACE_MEMORY = 1  # print the live set at each new maximum of the memory plan to stderr
    NO_WINOGRAD = 2  # direct 3x3 convolutions only
    UNFUSED = 4  # layer by layer: each convolution writes its map to the arena
    SMALL = 8  # less memory instead of less time


@dataclass(frozen=True)
class NetworkInfo:
    """``channels``, ``height``, ``width``: of an image. ``steps``: before fusion. ``weight_bytes``: as packed."""

    name: str
    precision: str
    channels: int
    height: int
    width: int
    classes: int
    steps: int
    weight_bytes: int


@dataclass(frozen=True)
class PlanInfo:
    """A plan's settings and memory.

    ``arena_bytes`` is all that a run writes, but for the logits: ``feature_map_bytes``, ``scratch_bytes`` (the threads'
    tiles and transforms) and ``alignment_bytes`` at the peak. ``weight_bytes``: in the file, as packed there;
    ``packed_bytes``: transformed or repacked for this plan, besides. ``macs``: multiply-accumulates per image of direct
    convolutions. ``steps``: after fusion.
    """

    batch: int
    threads: int
    channels: int
    height: int
    width: int
    classes: int
    steps: int
    arena_bytes: int
    feature_map_bytes: int
    scratch_bytes: int
    alignment_bytes: int
    weight_bytes: int
    packed_bytes: int
    macs: int
    isa: str


@dataclass(frozen=True)
class StepInfo:
    """A fused step, for the whole batch.

    ``macs``: multiply-accumulates of direct convolutions. ``flops``: operations really done in matrix products, of
    amx_bf16x2's three for each one alone. ``map_bytes``: feature maps read and written, each once. ``live_bytes``: of
    the arena while it runs.
    """

    name: str
    kernel: str
    macs: int
    flops: int
    weight_bytes: int
    map_bytes: int
    live_bytes: int


def version() -> str:
    """The compiled engine's version."""
    return c.library().rd_version().decode()


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build has and this CPU can run, best first; last what only its name chooses."""
    return tuple(c.library().rd_available_isas().decode().split(","))


def aligned_empty(size: int) -> np.ndarray:
    """``size`` bytes as the engine wants its memory, such as a context's arena: 64-byte aligned, not initialised."""
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


def measure_product(precision: str, threads: int, isa: str | None = None) -> float:
    """Operations per second (two per multiply-accumulate) of the matrix product on operands in the L1 cache.

    ``isa``: as in `Network.plan`. Takes about a second.
    """
    return _measured(c.library().rd_measure_product, _text(isa), precision.encode(), threads)


def measure_read(size: int, threads: int) -> float:
    """Bytes per second that ``threads`` threads read at once, each over and over its own share of ``size`` bytes."""
    return _measured(c.library().rd_measure_read, size, threads)


class Network:
    """A .rdp file, validated; make one with `load` or `from_bytes`."""

    def __init__(self, handle: c_void_p, memory: np.ndarray | None):
        self._handle, self._memory = handle, memory
        _when_unused(self, _free, c.library().rd_network_free, handle, memory)

    @classmethod
    def load(cls, path: str | Path) -> "Network":
        """Map a .rdp file. Raises `UserError` when it is missing or damaged, `Unsupported` for what cannot run."""
        name = os.fsencode(path)
        if b"\0" in name:
            raise UserError("a file's name holds no zero character")
        return cls(_made(c.library().rd_network_load, name), None)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "Network":
        """The same for a file in memory, which is copied."""
        content = memoryview(data).cast("B")
        memory = aligned_empty(len(content))
        memory.data[:] = content
        return cls(_made(c.library().rd_network_from_memory, memory.ctypes.data, len(memory)), memory)

    @cached_property
    def info(self) -> NetworkInfo:
        return c.converted(_filled(c.library().rd_network_get_info, c.CNetworkInfo, self._handle), NetworkInfo)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits."""
        name = c.library().rd_network_class
        return tuple(name(self._handle, index).decode() for index in range(self.info.classes))

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What turns images into the network's input: ``network.preprocessing.apply(uint8 images)``."""
        return Preprocessing.from_dict(self.description["preprocessing"])  # the C interface has it in float32

    @property
    def description(self) -> dict:
        """The file's JSON description."""
        size = c_size_t()
        start = c.library().rd_network_json(self._handle, byref(size))
        return json.loads(ctypes.string_at(start, size.value))

    def plan(
        self,
        batch: int = 1,
        threads: int | None = None,
        isa: str | None = None,
        flags: Flag = Flag.NONE,
        image_size: tuple[int, int] | None = None,
    ) -> "Plan":
        """Make the network ready for ``batch`` images per run.

        ``threads``: default, the CPUs that this process may use. ``isa``: one of `available_isas`; default, RD_ISA of
        the environment, else the best. ``image_size``: (height, width), default as in the file. Raises `UserError`, or
        `Unsupported` when this CPU cannot.
        """
        height, width = image_size or (0, 0)
        numbers = {"batch": batch, "threads": available_threads() if threads is None else threads}
        numbers |= {"height": height, "width": width, "flags": int(flags)}
        for name, value in numbers.items():
            if not 0 <= value < 1 << 32:
                raise UserError(f"{name} {value} is out of range")
        options = c.COptions(**numbers, isa=_text(isa))
        return Plan(_made(c.library().rd_plan_create, self._handle, byref(options)), self._memory)


class Plan:
    """A network made ready; made by `Network.plan`, which may be let go."""

    def __init__(self, handle: c_void_p, memory: np.ndarray | None):
        self._handle, self._memory = handle, memory
        _when_unused(self, _free, c.library().rd_plan_free, handle, memory)

    @cached_property
    def info(self) -> PlanInfo:
        return c.converted(_filled(c.library().rd_plan_get_info, c.CPlanInfo, self._handle), PlanInfo)

    @cached_property
    def steps(self) -> tuple[StepInfo, ...]:
        """The fused steps in order."""
        read, count = c.library().rd_plan_get_step, self.info.steps
        return tuple(c.converted(_filled(read, c.CStepInfo, self._handle, i), StepInfo) for i in range(count))

    def context(self, arena: np.ndarray | None = None) -> "Context":
        """Threads and memory to run with. ``arena``: what to use, such as ``aligned_empty(plan.info.arena_bytes)``."""
        return Context(self, arena)


class Context:
    """Runs a plan; made by `Plan.context`. Calls from several threads wait for each other."""

    def __init__(self, plan: Plan, arena: np.ndarray | None = None):
        pointer, size = (None, 0) if arena is None else (_pointer(arena, writes=True), arena.nbytes)
        self.info = plan.info
        self._handle = _made(c.library().rd_context_create, plan._handle, pointer, size)
        self._lock, self._process = threading.Lock(), os.getpid()
        # Here, too: at exit the finaliser's own references go, while a daemon thread in a call keeps this object.
        self._kept = (plan._memory, arena)
        _when_unused(self, _free, c.library().rd_context_free, self._handle, self._kept)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.info.batch, self.info.channels, self.info.height, self.info.width)

    def run(self, images: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Normalised images, `input_shape`, to float32 logits (batch, classes), written to ``out`` if given.

        Contiguous float32 images are read where they lie; others are copied.
        """
        images, logits = self._images(images), self._logits(out)
        self._call(c.library().rd_context_run, _pointer(images), _pointer(logits, writes=True))
        return logits

    def profile(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The logits, and the seconds of each of the plan's steps."""
        images, logits, seconds = self._images(images), self._logits(None), np.empty(self.info.steps)
        self._call(c.library().rd_context_profile, *map(_pointer, (images, logits, seconds)))
        return logits, seconds

    def _call(self, function: Callable, *pointers: int) -> None:
        if os.getpid() != self._process:  # as the engine says, too, but a call under way may have held the lock
            raise UserError("this context was made before the process forked, without its threads: make another one")
        with self._lock:
            function(self._handle, *pointers)

    def _images(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.shape != self.input_shape or images.dtype.kind != "f":
            hint = "; see Network.preprocessing" if images.dtype.kind != "f" else ""
            raise UserError(f"images must be float32 {self.input_shape}, not {images.dtype} {images.shape}{hint}")
        return np.require(images, np.float32, ("C_CONTIGUOUS", "ALIGNED"))

    def _logits(self, out: np.ndarray | None) -> np.ndarray:
        shape = (self.info.batch, self.info.classes)
        if out is None:
            return np.empty(shape, np.float32)
        if out.shape != shape or out.dtype != np.float32 or not out.flags.carray:
            raise UserError(f"out must be a contiguous, writable float32 array of shape {shape}")
        return out


class Session:
    """A .rdp file ready to run: ``Session("net.rdp").run(images)``.

    ``network``: a path, or a file's bytes. ``threads``, ``isa``, ``flags``: as in `Network.plan`; `Flag.SMALL` takes
    less memory and more time.
    """

    def __init__(
        self,
        network: str | Path | bytes,
        batch: int = 1,
        threads: int | None = None,
        isa: str | None = None,
        flags: Flag = Flag.NONE,
    ):
        made = Network.from_bytes(network) if isinstance(network, bytes) else Network.load(network)
        self.preprocessing, self.classes = made.preprocessing, made.classes
        self._context = made.plan(batch, threads, isa, flags=flags).context()
        self.info = self._context.info

    def run(self, images: np.ndarray) -> np.ndarray:
        """Normalised images (N, C, H, W), any N from 1 on, to float32 logits (N, classes).

        They run in batches; a last, smaller one is filled up with zeros, and takes as long as a whole one.
        ``session.run(session.preprocessing.apply(photos))`` takes uint8 images (N, H, W, C) of any size.
        """
        images, (batch, *shape) = np.asarray(images), self._context.input_shape
        if not images.size or list(images.shape[1:]) != shape:
            raise UserError(f"images must be (N, {', '.join(map(str, shape))}), N at least 1, not {images.shape}")
        logits = np.empty((len(images), self.info.classes), np.float32)
        left = len(images) % batch
        for start in range(0, len(images) - left, batch):
            self._context.run(images[start : start + batch], out=logits[start : start + batch])
        if left:
            last = np.zeros((batch, *shape), images.dtype)
            last[:left] = images[-left:]
            logits[-left:] = self._context.run(last)[:left]
        return logits


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _measured(function: Callable, *arguments) -> float:
    """What a function of the interface measures: its last argument."""
    result = c_double()
    function(*arguments, byref(result))
    return result.value


def _made(function: Callable, *arguments) -> c_void_p:
    """The object that a function of the interface makes: its last argument."""
    handle = c_void_p()
    function(*arguments, byref(handle))
    return handle


def _filled(function: Callable, structure: type[ctypes.Structure], *arguments) -> ctypes.Structure:
    """The structure that a function of the interface fills: its last argument."""
    result = structure()
    function(*arguments, byref(result))
    return result


def _pointer(array: np.ndarray, writes: bool = False) -> int:
    if writes and not (array.flags.writeable and array.flags.c_contiguous):
        raise UserError("the engine needs memory that is contiguous and can be written")
    return array.ctypes.data


def _when_unused(owner: object, function: Callable, *arguments) -> None:
    """Call when nobody has the object any more, but not at exit.

    The system takes the memory back then, and a daemon thread may still be in a call that uses it.
    """
    weakref.finalize(owner, function, *arguments).atexit = False


def _free(function: Callable, handle: c_void_p, kept: object) -> None:
    """``kept`` is memory that the object uses: it lives until here."""
    function(handle)
