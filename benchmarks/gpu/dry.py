"""What a dry run puts in place of the real things: small networks, torch on the CPU, and calls that do nothing."""

import time
from collections.abc import Callable
from dataclasses import replace

import onnx

from rd_deploy.chain import Chain, Linear
from rd_deploy.engines.device import DeviceSession
from rd_deploy.engines.torch_cuda import TorchCuda, TorchCudaSession
from rd_deploy.export.source import source_from_name

KEPT = ("layer1.0", "layer2.0")
PAUSE = 2e-4  # seconds: what a stand-in takes


def chain(network: str) -> Chain:
    """The first block of the first two stages, a quarter as wide, 16x16: Triton's interpreter takes seconds even so."""
    whole = source_from_name(network, 16, classes=10, width=0.25).chain
    last = next(step.name for step in reversed(whole.steps) if step.name.startswith(f"{KEPT[-1]}."))
    channels = whole.shapes()[last][0]
    kept, ends = [], {}
    for step in whole.steps:
        if step.name.startswith("layer") and not step.name.startswith(KEPT):
            ends[step.name] = kept[-1].name  # who reads what is left out reads the end of what is kept
            continue
        linked = {"source": ends.get(step.source, step.source)}
        if isinstance(step, Linear):
            linked["weight"] = step.weight[:, :channels]
        kept.append(replace(step, **linked))
    return replace(whole, steps=tuple(kept))


class DryTorchSession(TorchCudaSession):
    """The session of torch-cuda on the CPU."""

    def _find_device(self):
        return self._torch.device("cpu")

    def _capture(self, forward, own_graph: bool = False) -> None:
        def replay() -> None:
            with self._torch.inference_mode():
                self.logits = forward()

        self._replay = replay
        replay()


class DryTorch(TorchCuda):
    """torch-cuda on the CPU."""

    def missing(self) -> str | None:
        return None

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> DeviceSession:
        return DryTorchSession(self, model, precision, threads, batch)


def stand_in(call: Callable[[], object]) -> Callable[[], None]:
    """In place of ``call``, which ran when its session was loaded: Triton's interpreter takes seconds for it."""
    return lambda: time.sleep(PAUSE)
