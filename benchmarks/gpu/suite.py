"""What all parts share: options, networks, sessions, the record, and what a dry run puts in their place."""

import gc
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx

from gpu import dry, reference
from gpu.record import Record
from rd_deploy.bench.agreement import random_images
from rd_deploy.chain import Chain
from rd_deploy.common import Stopped, UserError, first_line
from rd_deploy.engines import ON_ONNXRUNTIME
from rd_deploy.engines.base import Engine, Unsupported
from rd_deploy.engines.cuda import SETTINGS, Cuda
from rd_deploy.engines.device import DeviceSession
from rd_deploy.engines.inductor_cuda import InductorCuda
from rd_deploy.engines.tensorrt import TensorRt, TensorRtRtx
from rd_deploy.engines.torch_cuda import TorchCuda
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import chain_from_name
from rd_deploy.helper import Helper

OURS = "cuda"
# The slowest to load last: when the time runs out, the others are there.
ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (TorchCuda, Cuda, *ON_ONNXRUNTIME, TensorRt, TensorRtRtx, InductorCuda)
}
BATCHES = (32, 128, 1, 8, 256)  # in the order of what the targets are about
PRECISIONS = ("fp16", "bf16")
MODEL, COMPARE = "plain50", "resnet50"
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Row:
    """Something to measure. ``run`` returns what is to be kept; `Unsupported` and `UserError` from it mean skipped.

    ``kernels``: the precision whose kernels of ours it needs; they are compiled before it.
    """

    key: str
    run: Callable[[], dict]
    kernels: str | None = None


@dataclass
class Suite:
    """One sitting. ``minutes``: for each part; ``seconds``: of sampling per comparison; ``threads``: on the CPU;
    ``total``: minutes for all parts together. ``patience``: seconds for one configuration of a kernel.
    """

    record: Record
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    engines: tuple[str, ...]
    minutes: float
    seconds: float
    threads: int
    dry: bool = False
    total: float = float("inf")
    patience: float = 60.0
    _began: float = field(default_factory=time.monotonic)
    _compiled: dict[str, dict] = field(default_factory=dict)
    _images: dict[int, np.ndarray] = field(default_factory=dict)
    _references: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    _chains: dict[str, Chain] = field(default_factory=dict)
    _models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    _sessions: dict[tuple, tuple[DeviceSession, float]] = field(default_factory=dict)
    _dry_sessions: dict[tuple, tuple[DeviceSession, float]] = field(default_factory=dict)

    @property
    def settings(self) -> list[tuple[str, int]]:
        """(precision, batch), the most important first."""
        return [(precision, batch) for precision in self.precisions for batch in self.batches]

    @property
    def checked(self) -> tuple[str, ...]:
        """Networks that are checked for correctness."""
        return (MODEL, COMPARE) if self.dry else (MODEL, COMPARE, "plain18")

    @cached_property
    def card(self):
        """The card's limits, for plans."""
        from rd_deploy.cuda.device import current_card
        from rd_deploy.triton_kernels.cards import get_card

        return get_card("h100") if self.dry else current_card()

    @cached_property
    def device(self):
        import torch

        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    def chain(self, network: str) -> Chain:
        """Calibrated random weights, 224x224."""
        if network not in self._chains:
            self._chains[network] = dry.chain(network) if self.dry else chain_from_name(network)
        return self._chains[network]

    def model(self, network: str) -> onnx.ModelProto:
        if network not in self._models:
            self._models[network] = to_onnx(self.chain(network))
        return self._models[network]

    def images(self, batch: int) -> np.ndarray:
        """The same random ones for everything: zeros would draw less power, and clocks would rise."""
        if batch not in self._images:
            self._images[batch] = random_images(batch, self.chain(MODEL).input_shape)
        return self._images[batch]

    def reference(self, network: str, batch: int) -> np.ndarray:
        """What an engine should make of these images."""
        if (network, batch) not in self._references:
            self._references[network, batch] = reference.logits(self.model(network), self.images(batch), self.device)
        return self._references[network, batch]

    def engine(self, name: str) -> Engine:
        return dry.DryTorch() if self.dry and name == TorchCuda.name else ENGINES[name]()

    def apart(self, function: Callable) -> AbstractContextManager:
        """``function`` in a process that may die (`Helper`); in a dry run as it is."""
        return nullcontext(function) if self.dry else Helper(function, self.patience)

    def timed(self, call: Callable[[], object]) -> Callable[[], object]:
        """What is timed for ``call``: itself, but in a dry run."""
        return dry.stand_in(call) if self.dry else call

    def prepare(self, precision: str) -> None:
        """Compile our kernels, once a sitting."""
        from gpu.precompile import compile_all

        if precision not in self._compiled:
            self._compiled[precision] = compile_all(self, precision)
            self.record.sittings[-1].setdefault("compiled", []).append(self._compiled[precision])
            self.record.save()

    def compile_seconds(self, network: str, precision: str, batch: int) -> float | None:
        """A network's share, by its number of kernels, of what `prepare` took in this sitting."""
        done = self._compiled.get(precision)
        return None if done is None else done["seconds"] * done["needs"].get(f"{network}/{batch}", 0) / done["jobs"]

    def load(self, engine: str, network: str, precision: str, batch: int) -> tuple[DeviceSession, float]:
        """A new session and the seconds that loading took, kernels chosen included.

        Other engines compile in this time too; ours has compiled before, in parallel for all networks
        (`compile_seconds`). In a dry run one of our engine's is made once for all parts.
        """
        key = (engine, network, precision, batch, *(os.environ.get(name) for name in SETTINGS))
        if key in self._dry_sessions:
            return self._dry_sessions[key]
        chosen = self.engine(engine)
        reason = chosen.missing()
        if reason:
            raise Unsupported(reason)
        if engine == OURS:
            self.prepare(precision)
        model, start = self.model(network), time.perf_counter()
        try:
            session = chosen.load(model, precision, self.threads, batch)
        except Unsupported as reason:
            if engine != OURS:
                raise
            raise RuntimeError(str(reason)) from reason  # it can run these networks: this is a failure
        seconds = time.perf_counter() - start
        say(f"  {engine} {precision} batch {batch}: loaded {network} in {seconds:.1f} s")
        if self.dry and engine == OURS:
            self._dry_sessions[key] = session, seconds
        return session, seconds

    def session(self, engine: str, network: str, precision: str, batch: int) -> tuple[DeviceSession, float]:
        """The same as `load`, kept until `keep` lets it go; it has run on `images`, which `enqueue` reads from then on.

        Wrong logits are a `RuntimeError`: their time would mean nothing.
        """
        key = (engine, network, precision, batch)
        if key not in self._sessions:
            session, seconds = self.load(*key)
            _, faults = reference.check(session, self.images(batch), self.reference(network, batch), engine == OURS)
            if faults:
                raise RuntimeError(f"wrong logits of {network} at batch {batch}: {'; '.join(faults)}")
            self._sessions[key] = session, seconds
        return self._sessions[key]

    def keep(self, keys: Iterable[tuple]) -> None:
        """Let go of all sessions but these, and of their memory."""
        wanted = set(keys)
        self._sessions = {key: value for key, value in self._sessions.items() if key in wanted}
        free()

    def run(self, part: str, rows: Iterable[Row]) -> None:
        """Measure the rows of a part that are not there yet, or were sampled for fewer seconds than now, within its
        minutes and those of all parts.
        """
        deadline = min(time.monotonic() + 60 * self.minutes, self._began + 60 * self.total)
        for row in rows:
            if self.record.finished(row.key, self.seconds):
                continue
            start = time.perf_counter()
            result = self._attempt(row, deadline)
            if result["status"] == "not measured":
                self.record.add(row.key, result)
                continue
            broken = result["status"] in ("failed", "skipped") and self._broken()
            result |= {"status": "failed"} if broken else {}
            result["seconds"] = round(time.perf_counter() - start, 2)
            self.record.add(row.key, result)
            say(f"{row.key}: {result['status']}{_reason(result)} ({result['seconds']:.1f} s)")
            if broken:
                raise Stopped(f"{row.key} broke the GPU's context: run the same command again for the rest", code=1)
        self.keep(())

    def _attempt(self, row: Row, deadline: float) -> dict:
        try:
            if row.kernels and time.monotonic() < deadline:
                self.prepare(row.kernels)
            if time.monotonic() >= deadline:
                return {"status": "not measured", "reason": OUT_OF_TIME}
            return {"status": "measured", **row.run()}
        except (Unsupported, UserError) as reason:
            return {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # one row's failure must not cost the others
            return {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}

    def _broken(self) -> bool:
        from rd_deploy.cuda.trial import context_is_lost

        return not self.dry and context_is_lost()


def free() -> None:
    """Give back what nothing uses any more."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(text: str) -> None:
    print(text, flush=True)


def _reason(result: dict) -> str:
    return f": {result['reason']}" if "reason" in result else ""
