"""PyTorch eager on an NVIDIA GPU: the calls of `rd_deploy.engines.torch`, channels-last, recorded as one CUDA graph.

cuDNN times all its algorithms for every shape before the graph is recorded (``cudnn.benchmark``), which keeps its
choice.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import onnx

from rd_deploy.engines.base import Engine, Figure, Session, image_input
from rd_deploy.engines.device import DeviceEngine, DeviceSession
from rd_deploy.engines.torch import run_calls, translate


class TorchCudaSession(DeviceSession):
    """An ONNX graph as torch calls in float16 or bfloat16."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        with self._searching():
            self._network = self._prepare(model)
            self._capture(self._forward)

    def _searching(self) -> AbstractContextManager:
        """cuDNN times its algorithms; 0: all of them, and not only the ten that it would guess to be fastest."""
        cudnn = self._torch.backends.cudnn
        return cudnn.flags(
            enabled=True, benchmark=True, benchmark_limit=0, deterministic=False, allow_tf32=cudnn.allow_tf32
        )

    def _prepare(self, model: onnx.ModelProto) -> Callable:
        """A function from images to logits, both on the device."""
        calls = translate(model, self.dtype, self.device)
        source, output = image_input(model).name, model.graph.output[0].name
        return lambda images: run_calls(calls, {source: images}, output)

    def _forward(self):
        return self._network(self.images)

    def _feature_maps(self) -> tuple[Figure, ...]:
        """A run outside the graph: the graph has taken the same memory for good when it was recorded."""
        with self._searching():
            return (allocated_by(self._forward, f"{self.engine.name} allocator"),)


def allocated_by(forward: Callable[[], object], source: str) -> Figure:
    """The most that torch's allocator had handed out at once while ``forward`` ran, above what it held before.

    Weights and images are held before. The kernels' workspaces, which come from the same allocator, are counted.
    """
    import torch

    with torch.inference_mode():
        forward()  # libraries that choose kernels at their first call have chosen
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return Figure(source, peak, "most bytes allocated at once in a run, with workspaces and logits")


class TorchCuda(DeviceEngine):
    """PyTorch eager, channels-last."""

    name = "torch-cuda"

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return TorchCudaSession(self, model, precision, threads, batch)
