"""Choosing kernels by measurement: every configuration of every way to fuse, timed and checked on the GPU at hand."""

from collections.abc import Callable
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from rd_deploy.chain import Chain
from rd_deploy.cuda.plan import Fusion, Piece, Plan, build_plan, configs, places
from rd_deploy.cuda.session import pack
from rd_deploy.engines.base import first_line
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.compile import Job, fill_cache
from rd_deploy.triton_kernels.launch import ELEMENT, Kernel, Launch, is_taken

COPIES = (20, 200)  # of weights, least and most
COLD = 1.5  # times the L2 cache: as many bytes of copies as surely drive each other out of it
STEADY_MS, SAMPLES = 5.0, 5  # of replays before those that count, and how many count
# Largest error of a kernel / largest value of its reference, in units of the precision's rounding: three products in a
# row round twice in between and once at the end, so a right kernel stays well below, and a wrong one far above.
UNITS = 8
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}

# Times are a card's and a kernel's, whatever network asks: sessions of one process share them.
_times: dict[tuple, float | None] = {}
_reasons: dict[tuple, str] = {}  # of None among the times


class Tuner:
    """A stopwatch for `build_plan`. ``rejected``: configurations that did not compile, fit or compute what they should.

    Weights are taken in turn from so many copies that the L2 cache cannot hold them, because in a network they come
    from DRAM (unless 200 copies are too few); maps are those that the launch before has just used, as there.
    """

    def __init__(self, chain: Chain, batch: int, precision: str, card: Card, device):
        import torch

        self.chain, self.batch, self.precision, self.card, self.device = chain, batch, precision, card, device
        self.rejected: list[str] = []
        self._types = {
            ELEMENT: torch.float16 if precision == "fp16" else torch.bfloat16,
            "fp32": torch.float32,
            "i32": torch.int32,
        }
        self._inputs: tuple[Kernel, dict, Any] | None = None  # of the kernel at work, and what it should make of them

    def plan(self, fusion: Fusion = "auto") -> Plan:
        """The fastest plan for this card."""
        pieces = [piece for ways in places(self.chain, self.batch) for way in ways for piece in way]
        kernels = [kernel for kernel in dict.fromkeys(piece.kernel for piece in pieces) if is_taken(kernel)]
        choices = [(kernel, config) for kernel in kernels for config in configs(kernel, self.card)]
        target = self.precision, self.card.capability
        for job, reason in fill_cache(Job(*choice, *target) for choice in choices if self._key(*choice) not in _times):
            self._reject(job.kernel, job.config, reason)
        plan = build_plan(self.chain, self.batch, self.card, fusion, self)
        self.rejected = [_reasons[self._key(*choice)] for choice in choices if self._key(*choice) in _reasons]
        self._inputs = None
        return plan

    def __call__(self, piece: Piece, config: Any) -> float | None:
        key = self._key(piece.kernel, config)
        if key not in _times:
            _times[key] = self._tried(piece, config)
        return _times[key]

    def _key(self, kernel: Kernel, config: Any) -> tuple:
        return kernel, config, self.precision, self.card, str(self.device)

    def _reject(self, kernel: Kernel, config: Any, reason: str) -> None:
        key = self._key(kernel, config)
        _times[key], _reasons[key] = None, f"{kernel} {config}: {reason}"

    def _tried(self, piece: Piece, config: Any) -> float | None:
        """Microseconds, or None if the configuration must not be used here."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        launch = piece.kernel.launch(config)
        try:
            operands = self._operands(piece, launch, config)
            launch.run(operands)
            off = self._error(operands["out"])
            if not off <= UNITS * ROUNDING[self.precision]:
                return self._reject(piece.kernel, config, f"wrong by {off:.2g} of the largest value")
            return measure_cold(launch, operands, list(pack(piece, self.precision, launch)), self.card)
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:  # the last: memory, the driver
            self._check_context(piece.kernel, config, error)
            return self._reject(piece.kernel, config, first_line(error))

    def _check_context(self, kernel: Kernel, config: Any, error: Exception) -> None:
        """A kernel that faults takes the GPU's context along: name it, since nothing can run after it."""
        import torch

        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            raise RuntimeError(f"{kernel} {config} broke the GPU's context: {error}") from error

    def _operands(self, piece: Piece, launch: Launch, config: Any) -> dict[str, Any]:
        import torch

        inputs, expected = self._reference(piece, launch)
        out = torch.full_like(expected, float("nan"), dtype=self._types[launch.tensors["out"]])
        scratch = {
            name: torch.zeros(count, dtype=self._types[kind], device=self.device)
            for name, (kind, count) in piece.kernel.scratch(config).items()
        }
        return inputs | scratch | {"out": out}

    def _reference(self, piece: Piece, launch: Launch) -> tuple[dict[str, Any], Any]:
        """Random inputs and real weights of a kernel, and what it should make of them, in float32."""
        import torch

        if self._inputs is None or self._inputs[0] != piece.kernel:
            self._inputs = None  # first let the last kernel's memory go
            shapes = self.chain.shapes()
            sources = {"x": piece.steps[0].source}
            if "add" in launch.tensors:
                sources["add"] = piece.steps[-1].add
            inputs = {name: self._random(shapes[tensor]) for name, tensor in sources.items()}
            for name, values in pack(piece, self.precision, launch).items():
                inputs[name] = torch.from_numpy(np.array(values)).to(self.device, self._types[launch.tensors[name]])
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                expected = piece.kernel.reference(**{name: tensor.float() for name, tensor in inputs.items()})
            self._inputs = piece.kernel, inputs, expected.contiguous()
        return self._inputs[1:]

    def _random(self, shape: tuple[int, ...]):
        """A map (N, H, W, C) such as ReLU leaves it: half zeros; small enough for sums within fp16."""
        import torch

        channels, height, width = [*shape, 1, 1][:3]
        generator = torch.Generator(self.device).manual_seed(0)
        size = (self.batch, height, width, channels)
        return torch.randn(size, generator=generator, device=self.device).relu_().to(self._types[ELEMENT])

    def _error(self, out) -> float:
        """Of the largest value; a reference of zeros alone wants zeros."""
        expected = self._inputs[2]
        largest = float(expected.abs().max())
        return float((out.float() - expected).abs().max()) / (largest or 1.0)


def measure_cold(launch: Launch, operands: dict[str, Any], weights: list[str], card: Card) -> float:
    """Microseconds of a launch that finds its operands' maps where the last launch left them, but not its weights."""
    size = sum(operands[name].nbytes for name in weights)
    least, most = COPIES
    count = min(max(least, ceil(COLD * card.l2_bytes / size)), most) if size else 1
    copies = [operands | {name: operands[name].clone() for name in weights} for _ in range(count)]
    return measure(lambda index: launch.run(copies[index % count]), max(least, count))


def measure(enqueue: Callable[[int], None], repeats: int = COPIES[0]) -> float:
    """Microseconds of one ``enqueue(index)`` on the GPU: median of replays of a graph of ``repeats`` of them.

    Replays are queued one behind the other with events in between, so that the host's part of launching a graph hides
    behind the replay before, and begin when the clocks have had a few milliseconds to rise.
    """
    import torch

    graph = record(lambda: [enqueue(index) for index in range(repeats)])
    once = _elapsed(torch, graph, 2)[-1]
    warm = min(200, ceil(STEADY_MS / max(once, 1e-3)))
    times = _elapsed(torch, graph, warm + SAMPLES)[warm:]
    return float(np.median(times)) * 1e3 / repeats


def _elapsed(torch, graph, replays: int) -> list[float]:
    """Milliseconds from replay to replay."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def record(calls: Callable[[], object]):
    """A CUDA graph of what ``calls`` enqueues, after one run of it outside."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph
