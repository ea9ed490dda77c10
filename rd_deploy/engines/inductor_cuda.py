"""torch.compile on an NVIDIA GPU, as strong as the library allows, recorded as one CUDA graph.

The calls of `rd_deploy.engines.torch` are exported as one graph (BN is folded in the file already) and compiled for one
batch size with the options below: Triton's products and convolutions compete with cuBLAS's and cuDNN's for every
shape, 1x1 convolutions may be products with what follows fused into them, and weights are constants.
"""

import contextlib
import importlib
from collections.abc import Callable

import onnx

from rd_deploy.common import UserError, first_line
from rd_deploy.engines.base import Session
from rd_deploy.engines.device import DeviceEngine
from rd_deploy.engines.torch_cuda import TorchCudaSession

# On top of the mode: `freezing` makes constants of the weights, so that their layout is settled when compiling;
# `conv_1x1_as_mm` says for all shapes what autotuning would do for channels-last ones.
MODE = "max-autotune-no-cudagraphs"
OPTIONS = {"freezing": True, "conv_1x1_as_mm": True, "coordinate_descent_tuning": True}


class InductorCudaSession(TorchCudaSession):
    """The same calls, compiled."""

    def _prepare(self, model: onnx.ModelProto) -> Callable:
        _take_the_better_assembler(self._torch)
        settings = self._torch._inductor.list_mode_options(MODE) | OPTIONS
        return compiled(super()._prepare(model), self.images, settings)


def compiled(network: Callable, images, settings: dict) -> Callable:
    """``network`` for images like these, compiled. Exporting first makes buffers of the weights that its calls hold:
    only such can be frozen.

    Dynamo asks for `freezing` before it passes options on, so it must be set for everything that is compiled meanwhile,
    and only without gradients; the session runs in the mode of the call here, and nothing is compiled again.
    """
    import torch

    class Module(torch.nn.Module):
        def forward(self, x):
            return network(x)

    with torch.no_grad():
        exported = torch.export.export(Module().eval(), (images,), strict=False).module()
    found = torch.compile(exported, fullgraph=True, dynamic=False, options=settings)
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
        found(images)
    return found


def _take_the_better_assembler(torch) -> None:
    """The one that our own engine takes, if it is there: whatever the order of engines, both have the same."""
    from rd_deploy.triton_kernels.assembler import use_assembler

    major, minor = torch.cuda.get_device_capability()
    with contextlib.suppress(UserError):
        use_assembler(10 * major + minor)


class InductorCuda(DeviceEngine):
    """torch.compile in its slowest and best mode."""

    name = "inductor-cuda"

    def missing(self) -> str | None:
        return super().missing() or _no_triton()

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return InductorCudaSession(self, model, precision, threads, batch)


def _no_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"torch.compile needs triton ({first_line(error)}): install the one of this torch's release"
    return None
