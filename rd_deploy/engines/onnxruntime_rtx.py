"""ONNX Runtime with NVIDIA's plugin for TensorRT-RTX, which brings its own TensorRT-RTX. No GPU has run it for us yet.

A plugin is registered with ONNX Runtime when the process needs it, and offers the GPUs that it can use.
"""

import functools

from rd_deploy.engines.onnxruntime_gpu import ProviderEngine, reason

PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
# Memory of maps and workspaces is taken once, and not in every run.
OPTIONS = {"enable_cuda_graph": "1", "nv_persistent_context_memory": "1", "has_user_compute_stream": "1"}


class OnnxRuntimeRtx(ProviderEngine):
    """The NvTensorRTRTX execution provider, fp16 and bf16. The usual onnxruntime is enough for it."""

    name = "onnxruntime-rtx"
    package = PACKAGE
    extra = "onnxruntime-rtx"
    precisions = ("fp16", "bf16")
    provider = PROVIDER

    def no_provider(self) -> str | None:
        import torch

        failed = register()
        if failed:
            return failed
        if find_device(torch.cuda.current_device()) is None:
            major, minor = torch.cuda.get_device_capability()
            return f"{PROVIDER} does not offer the GPU here, sm_{major}{minor}: it takes sm_86, sm_89, sm_120 and later"
        return None

    def settings(self, device, stream: int) -> dict[str, str]:
        return {**OPTIONS, "user_compute_stream": str(stream)}  # which GPU: the device that `start` adds

    def start(self, model: bytes, options, settings: dict[str, str]):
        import onnxruntime as ort
        import torch

        options.add_provider_for_devices([find_device(torch.cuda.current_device())], settings)
        return ort.InferenceSession(model, options, enable_fallback=0)


@functools.cache
def register() -> str | None:
    """Register the plugin, once in a process; one line when ONNX Runtime cannot load it."""
    import onnxruntime as ort
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    try:
        ort.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's classes share no public base
        return f"onnxruntime {ort.__version__} cannot load {PACKAGE} {plugin.__version__}: {reason(error)}"
    return None


def find_device(index: int):
    """The plugin's OrtEpDevice of the CUDA device of this index, None when it offers none."""
    import onnxruntime as ort

    offered = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    where = {device.memory_info(ort.OrtDeviceMemoryType.DEFAULT).device_id: device for device in offered}
    return where.get(index)
