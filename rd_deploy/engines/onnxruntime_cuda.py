"""ONNX Runtime's CUDA provider: cuDNN's convolutions, cuBLAS's products. No GPU has run it for us yet."""

from rd_deploy.engines.onnxruntime_gpu import ProviderEngine

# Convolutions channels-last, as tensor cores want them; cuDNN's algorithms timed, with all the workspace they ask for.
OPTIONS = {
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "enable_cuda_graph": "1",
    "arena_extend_strategy": "kSameAsRequested",
}


class OnnxRuntimeCuda(ProviderEngine):
    """ONNX Runtime's CUDA execution provider, fp16."""

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"

    def settings(self, device, stream: int) -> dict[str, str]:
        return {**OPTIONS, "device_id": str(device.index), "user_compute_stream": str(stream)}
