"""Our compiled engine on an NVIDIA GPU: the fused chain in Triton kernels (`rd_deploy.cuda`), one CUDA graph.

Settings, from the environment: RD_FUSION=auto|always|never, RD_TUNE=1|0 (measure every kernel on this GPU when a
network is loaded, or trust the model), RD_PDL=auto|1|0 (programmatic dependent launch; auto: if it measures faster).
With TRITON_INTERPRET=1 the kernels run in Triton's interpreter on the CPU: right, and thousands of times slower.
"""

import os

import numpy as np
import onnx

from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.engines.device import DeviceEngine, DeviceSession, no_gpu


class CudaSession(DeviceSession):
    """A network planned for the GPU at hand. ``rejected``: configurations that the tuner would not use."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        settings = {name: setting(name) for name in SETTINGS}
        self._interpreted = is_interpreted()
        try:
            self._prepare(chain_from_onnx(model), settings)
        except UserError as reason:  # the settings are checked: it is the network or the GPU
            raise Unsupported(str(reason)) from reason

    def _prepare(self, chain, settings: dict[str, str]) -> None:
        from rd_deploy.cuda.device import current_card
        from rd_deploy.cuda.plan import build_plan
        from rd_deploy.cuda.session import Program
        from rd_deploy.cuda.tune import Tuner
        from rd_deploy.triton_kernels.cards import get_card

        torch, self.rejected, pdl = self._torch, [], settings["RD_PDL"]
        if self._interpreted or settings["RD_TUNE"] == "0":
            card = get_card("h100") if self._interpreted else current_card()
            self.plan, self.tuned = build_plan(chain, self.batch, card, settings["RD_FUSION"]), False
        else:
            with Tuner(chain, self.batch, self.precision, current_card(), self.device) as tuner:
                self.plan, self.tuned = tuner.plan(settings["RD_FUSION"]), True
                if pdl == "auto" and True in self._pdl(pdl) and not tuner.overlaps(self.plan):
                    pdl = "0"
            self.rejected = tuner.rejected
        self.logits = torch.zeros(self.batch, len(chain.classes), device=self.device)
        images = self.images.permute(0, 2, 3, 1)  # as the kernels see them: channels-last memory
        if not self._interpreted:
            self._compile(pdl)
        programs = {
            overlap: Program(self.plan, self.precision, images, self.logits, overlap) for overlap in self._pdl(pdl)
        }
        self.pdl = self._choose(programs)
        self.program = programs[self.pdl]

    def _compile(self, wanted: str) -> None:
        """The plan's kernels, in parallel, where the tuner has not compiled them."""
        from rd_deploy.triton_kernels.compile import Job, fill_cache

        target = self.precision, self.plan.card.capability
        chosen = [(step.piece.kernel, step.config) for step in self.plan.steps]
        failed = fill_cache(Job(*choice, *target, pdl) for pdl in self._pdl(wanted) for choice in dict.fromkeys(chosen))
        if failed:
            (job, reason), *_ = failed
            raise UserError(f"{len(failed)} kernels do not compile, the first: {job.kernel} {job.config}: {reason}")

    def _pdl(self, wanted: str) -> tuple[bool, ...]:
        """Which kinds of launch to try."""
        from rd_deploy.triton_kernels.launch import FIRST_PDL

        able = not self._interpreted and self.plan.card.capability >= FIRST_PDL
        if wanted == "1" and not able:
            raise UserError("RD_PDL=1 needs a GPU of sm_90 or later")
        return {"0": (False,), "1": (True,), "auto": (False, True) if able else (False,)}[wanted]

    def _choose(self, programs: dict) -> bool:
        """Whether launches overlap: what runs faster and computes the same, bit for bit."""
        if self._interpreted:
            self._replay = programs[False].run
            return False
        times, replays, logits = {}, {}, {}
        for pdl, program in programs.items():
            replays[pdl], times[pdl], logits[pdl] = self._recorded(program)
        if len(times) == 2 and not self._torch.equal(logits[False], logits[True]):
            self.rejected.append("programmatic dependent launch: logits differ from those of plain launches")
            times.pop(True)
        best = min(times, key=times.get)
        self._replay = replays[best]
        return best

    def _recorded(self, program):
        """A program's graph as a call, its time in microseconds, and the logits of fixed random images."""
        from rd_deploy.cuda.tune import measure, record

        torch = self._torch
        with torch.inference_mode():
            graph = record(program.run)
            self.images.copy_(torch.randn(self.shape, generator=torch.Generator().manual_seed(0)))
            us = measure(lambda index: program.run(), repeats=5)
            graph.replay()
            return graph.replay, us, self.logits.clone()

    def _find_device(self):
        return self._torch.device("cpu") if is_interpreted() else super()._find_device()

    @property
    def variant(self) -> str:
        if self._interpreted:
            return "interpreter"
        how = "tuned" if self.tuned else "by the model"
        return f"{self.plan.card.name}, {how}{', PDL' if self.pdl else ''}"

    def _run(self, images: np.ndarray) -> np.ndarray:
        if not self._interpreted:
            return super()._run(images)
        self.images.copy_(self._torch.from_numpy(images))
        self.enqueue()
        return self.logits.numpy().copy()

    def profile(self) -> list[float]:
        """Seconds of each step, in the plan's order: each launch alone, repeated in a graph, its weights from DRAM."""
        from time import perf_counter

        from rd_deploy.cuda.tune import measure_cold

        seconds = []
        for bound in self.program.launches:
            if self._interpreted:
                start = perf_counter()
                bound.launch.run(bound.operands)
                seconds.append(perf_counter() - start)
            else:
                us = measure_cold(bound.launch, bound.operands, bound.weights, self.plan.card)
                seconds.append(us * 1e-6)
        return seconds

    def _feature_maps(self) -> tuple[Figure, ...]:
        maps = "most bytes of feature maps at once, by the plan of its one arena, without images and logits"
        arena = "all memory that a run writes, but for the logits: with partial sums and alignment"
        return (
            Figure("cuda maps", self.plan.feature_map_bytes, maps),
            Figure("cuda arena", self.plan.arena_bytes, arena),
        )


SETTINGS = {"RD_FUSION": ("auto", "always", "never"), "RD_TUNE": ("1", "0"), "RD_PDL": ("auto", "1", "0")}


def setting(name: str) -> str:
    """A setting from the environment, its first value by default; another value is a `UserError`."""
    known = SETTINGS[name]
    value = os.environ.get(name, known[0])
    if value not in known:
        raise UserError(f"{name}={value}: give {' or '.join(known)}")
    return value


def is_interpreted() -> bool:
    from rd_deploy.triton_kernels.launch import INTERPRETED

    return INTERPRETED


class Cuda(DeviceEngine):
    """The compiled engine for NVIDIA GPUs of sm_80 and later."""

    name = "cuda"
    package = "triton"
    extra = "cuda"

    def missing(self) -> str | None:
        reason = Engine.missing(self)
        return reason or (None if is_interpreted() else no_gpu())

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return CudaSession(self, model, precision, threads, batch)
