"""The engines a benchmark can run, each in one file behind one interface (`rd_deploy.engines.base`)."""

from rd_deploy.common import UserError, nearest
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.engines.cuda import Cuda
from rd_deploy.engines.inductor_cuda import InductorCuda
from rd_deploy.engines.native import Native
from rd_deploy.engines.onnxruntime import OnnxRuntime
from rd_deploy.engines.onnxruntime_cuda import OnnxRuntimeCuda
from rd_deploy.engines.onnxruntime_rtx import OnnxRuntimeRtx
from rd_deploy.engines.onnxruntime_tensorrt import OnnxRuntimeTensorRt
from rd_deploy.engines.openvino import OpenVino
from rd_deploy.engines.tensorrt import TensorRt, TensorRtRtx
from rd_deploy.engines.torch import Torch
from rd_deploy.engines.torch_cuda import TorchCuda

ON_CPU = (Torch, OnnxRuntime, OpenVino, Native)
ON_ONNXRUNTIME = (OnnxRuntimeCuda, OnnxRuntimeTensorRt, OnnxRuntimeRtx)
ON_GPU = (TorchCuda, InductorCuda, *ON_ONNXRUNTIME, TensorRt, TensorRtRtx, Cuda)
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (*ON_CPU, *ON_GPU)}

__all__ = ["ENGINES", "Engine", "Figure", "Session", "Unsupported", "get_engine"]


def get_engine(name: str) -> Engine:
    """The engine of a name; an unknown name is a `UserError` with the nearest one."""
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}'{nearest(name, ENGINES)}")
    return ENGINES[name]()
