"""ONNX Runtime's TensorRT provider: the whole network one TensorRT engine, built when loaded. No GPU has run it yet.

It links one major version of TensorRT (onnxruntime-gpu 1.31: TensorRT 10) and works with no other. With neither
``trt_fp16_enable`` nor its like the network is strongly typed: fp16 because the ONNX file says so. Caches are off by
default, and nothing here turns them on.
"""

import contextlib
import ctypes
import importlib
import re
from pathlib import Path

from rd_deploy.common import first_line
from rd_deploy.engines.onnxruntime_gpu import ProviderEngine

WORKSPACE_SHARE = 0.25  # of the GPU's memory: the most that a kernel may ask for; the provider's default is 1 GiB
# It takes True and False, and no 1 and 0. Level 5 of 5 compares the most kernels; 3 is the default.
OPTIONS = {"trt_cuda_graph_enable": "True", "trt_builder_optimization_level": "5"}
LIBRARY = Path("capi") / "libonnxruntime_providers_tensorrt.so"


class OnnxRuntimeTensorRt(ProviderEngine):
    """ONNX Runtime's TensorRT execution provider, fp16."""

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def no_provider(self) -> str | None:
        return super().no_provider() or _no_tensorrt()

    def settings(self, device, stream: int) -> dict[str, str]:
        import torch

        workspace = int(torch.cuda.get_device_properties(device).total_memory * WORKSPACE_SHARE)
        where = {"device_id": str(device.index), "user_compute_stream": str(stream)}
        return {**OPTIONS, "trt_max_workspace_size": str(workspace), **where}


def _no_tensorrt() -> str | None:
    """One line when the TensorRT that the provider links cannot be loaded."""
    import onnxruntime as ort

    with contextlib.suppress(Exception):  # not there, or broken: then loading below says what is missing
        importlib.import_module("tensorrt")  # pip puts its libraries where no loader looks: this loads them
    for name in linked_libraries(Path(ort.__file__).parent / LIBRARY):
        try:
            ctypes.CDLL(name)
        except OSError as error:
            fitting = f"tensorrt-cu{ort.cuda_version.split('.')[0]}=={name.rpartition('.')[2]}.*"
            what = f"onnxruntime {ort.__version__} needs its TensorRT ({first_line(error)})"
            return f"{what}: pip install '{fitting}'"
    return None


def linked_libraries(path: Path) -> list[str]:
    """TensorRT's libraries that a shared library names, such as ``libnvinfer.so.10``."""
    return sorted({name.decode() for name in re.findall(rb"libnv(?:infer|onnxparser)\.so\.\d+", path.read_bytes())})
