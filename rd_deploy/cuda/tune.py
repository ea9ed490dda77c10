"""Choosing kernels by measurement: every configuration of every way to fuse, timed and checked on the GPU at hand."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rd_deploy.chain import Chain
from rd_deploy.cuda.plan import Fusion, Piece, Plan, build_plan, places
from rd_deploy.cuda.session import has_weights, pack
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.compile import Job, fill_cache
from rd_deploy.triton_kernels.launch import ELEMENT, Kernel, Launch

REPEATS, SAMPLES = 20, 5  # launches in the graph that times one, and replays of it
# Largest error of a kernel / largest value of its reference, in units of the precision's rounding: three products in a
# row round twice in between and once at the end, so a right kernel stays well below, and a wrong one far above.
UNITS = 8
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}


class Tuner:
    """A stopwatch for `build_plan`. ``rejected``: configurations that did not compile, fit or compute what they should.

    Weights are taken in turn from as many copies as there are launches in a graph, so that they come from DRAM as in
    a network; maps are those that the launch before has just used, as there.
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
        self._times: dict[tuple[Kernel, Any], float | None] = {}
        self._expected: dict[Kernel, tuple[dict, Any]] = {}

    def plan(self, fusion: Fusion = "auto") -> Plan:
        """The fastest plan for this card."""
        pieces = [piece for ways in places(self.chain, self.batch) for way in ways for piece in way]
        kernels = dict.fromkeys(piece.kernel for piece in pieces if _takes(piece.kernel))
        target = self.precision, self.card.capability
        jobs = [Job(kernel, config, *target) for kernel in kernels for config in kernel.configs(self.card)]
        self.rejected += fill_cache(jobs)
        return build_plan(self.chain, self.batch, self.card, fusion, self)

    def __call__(self, piece: Piece, config: Any) -> float | None:
        key = piece.kernel, config
        if key not in self._times:
            self._times[key] = self._tried(piece, config)
        return self._times[key]

    def _tried(self, piece: Piece, config: Any) -> float | None:
        """Microseconds, or None if the configuration must not be used here."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        launch = piece.kernel.launch(config)
        try:
            operands = self._operands(piece, launch, config)
            launch.run(operands)
        except (OutOfResources, CompilationError, PTXASError) as error:
            return self._reject(piece, config, str(error).strip().splitlines()[0][:160])
        error = self._error(piece, operands)
        if not error <= UNITS * ROUNDING[self.precision]:
            return self._reject(piece, config, f"wrong by {error:.2g} of the largest value")
        copies = [self._other_weights(operands, piece) for _ in range(REPEATS)]
        return measure(lambda index: launch.run(copies[index]), REPEATS)

    def _reject(self, piece: Piece, config: Any, reason: str) -> None:
        self.rejected.append(f"{piece.kernel} {config}: {reason}")

    def _operands(self, piece: Piece, launch: Launch, config: Any) -> dict[str, Any]:
        import torch

        operands, expected = self._reference(piece, launch)
        out = torch.full_like(expected, float("nan"), dtype=self._types[launch.tensors["out"]])
        scratch = {
            name: torch.zeros(count, dtype=self._types[kind], device=self.device)
            for name, (kind, count) in piece.kernel.scratch(config).items()
        }
        return operands | scratch | {"out": out}

    def _reference(self, piece: Piece, launch: Launch) -> tuple[dict[str, Any], Any]:
        """Random inputs and real weights of a kernel, and what it should make of them, in float32."""
        import torch

        if piece.kernel not in self._expected:
            shapes = self.chain.shapes()
            inputs = {"x": piece.steps[0].source}
            if "add" in launch.tensors:
                inputs["add"] = piece.steps[-1].add
            operands = {name: self._random(shapes[tensor]) for name, tensor in inputs.items()}
            for name, values in pack(piece, self.precision, launch).items():
                kind = self._types[launch.tensors[name]]
                operands[name] = torch.from_numpy(np.array(values)).to(self.device, kind)
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                expected = piece.kernel.reference(**{name: tensor.float() for name, tensor in operands.items()})
            self._expected[piece.kernel] = operands, expected.contiguous()
        return self._expected[piece.kernel]

    def _random(self, shape: tuple[int, ...]):
        """A map (N, H, W, C) such as ReLU leaves it: half zeros."""
        import torch

        channels, height, width = [*shape, 1, 1][:3]
        generator = torch.Generator(self.device).manual_seed(0)
        size = (self.batch, height, width, channels)
        return torch.randn(size, generator=generator, device=self.device).relu_().to(self._types[ELEMENT])

    def _error(self, piece: Piece, operands: dict[str, Any]) -> float:
        expected = self._expected[piece.kernel][1]
        return float((operands["out"].float() - expected).abs().max() / expected.abs().max())

    def _other_weights(self, operands: dict[str, Any], piece: Piece) -> dict[str, Any]:
        if not any(has_weights(step) for step in piece.steps):
            return operands
        maps = ("x", "add", "out", *piece.kernel.scratch(piece.kernel.configs(self.card)[0]))
        return {name: tensor if name in maps else tensor.clone() for name, tensor in operands.items()}


def _takes(kernel: Kernel) -> bool:
    from rd_deploy.common import UserError

    try:
        kernel.check()
    except UserError:
        return False
    return True


def measure(enqueue: Callable[[int], None], repeats: int = REPEATS, samples: int = SAMPLES) -> float:
    """Microseconds of one ``enqueue(index)`` on the GPU: median of replays of a graph of ``repeats`` of them."""
    import torch

    graph = record(lambda: [enqueue(index) for index in range(repeats)])
    times = []
    for _ in range(samples + 1):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / repeats)
    return float(np.median(times[1:]))  # the first replay uploads the graph


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
