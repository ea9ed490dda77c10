"""ONNX Runtime's CUDA provider. Written against its documentation: never run by us yet.

It records and replays its own CUDA graph on a stream of ours and reads and writes torch's memory. Until a version
honours ``disable_synchronize_execution_providers`` for replays too, each one waits for the GPU, so that the next
launch is not hidden: that costs some microseconds per run, which matter at small batches only.
"""

import onnx

from rd_deploy.engines.base import Engine, Figure, Session, Unsupported, first_line
from rd_deploy.engines.device import DeviceEngine, DeviceSession
from rd_deploy.engines.half_onnx import IMAGES, LOGITS, half_onnx
from rd_deploy.engines.torch_cuda import TorchCuda

PROVIDER = "CUDAExecutionProvider"
# Convolutions channels-last, as tensor cores want them; cuDNN's algorithms timed, with all the workspace they ask for.
OPTIONS = {
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "enable_cuda_graph": "1",
    "arena_extend_strategy": "kSameAsRequested",
}


class OnnxRuntimeCudaSession(DeviceSession):
    """A float16 network in ONNX Runtime's CUDA provider; no node of it runs on the CPU."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        half = half_onnx(model, batch)
        classes = half.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        self._stream = self._torch.cuda.Stream()
        self._output = self._torch.zeros(batch, classes, dtype=self.dtype, device=self.device)
        before = self._taken()
        self._session = _session(half, self.device.index, self._stream.cuda_stream, threads)
        self._binding, self._options = self._bound(), _run_options()
        self._capture(self._forward, own_graph=True)
        self._torch.cuda.synchronize()
        self._memory = self._taken() - before

    def _bound(self):
        """The network's two tensors in torch's memory, for good."""
        batch, channels, height, width = self.shape
        binding, device = self._session.io_binding(), self.device.index
        images, logits = self.images.data_ptr(), self._output.data_ptr()
        half = onnx.TensorProto.FLOAT16
        binding.bind_input(IMAGES, "cuda", device, half, [batch, height, width, channels], images)
        binding.bind_output(LOGITS, "cuda", device, half, list(self._output.shape), logits)
        return binding

    def _forward(self):
        """On our stream, after what torch's current one holds and before what it gets next."""
        current = self._torch.cuda.current_stream()
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(self._binding, self._options)
        current.wait_stream(self._stream)
        return self._output

    def _taken(self) -> int:
        """Bytes of the GPU that are not free and not torch's."""
        free, total = self._torch.cuda.mem_get_info()
        return total - free - self._torch.cuda.memory_reserved()

    def _feature_maps(self) -> tuple[Figure, ...]:
        peak = max(0, self._memory - self.weight_bytes)
        how = "GPU memory taken by the session less its weights: arena, workspaces, graph; other processes disturb it"
        return (Figure("onnxruntime-cuda session", peak, how),)


class OnnxRuntimeCuda(DeviceEngine):
    """ONNX Runtime's CUDA execution provider, fp16."""

    name = "onnxruntime-cuda"
    package = "onnxruntime"
    extra = "gpu"

    def missing(self) -> str | None:
        return TorchCuda().missing() or Engine.missing(self) or _no_provider()

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        if precision != "fp16":
            raise Unsupported(f"our ONNX files for ONNX Runtime's CUDA provider are fp16, not {precision}")
        return OnnxRuntimeCudaSession(self, model, precision, threads, batch)


def _no_provider() -> str | None:
    import onnxruntime as ort

    if PROVIDER in ort.get_available_providers():
        return None
    return f"onnxruntime {ort.__version__} was built without CUDA: pip install onnxruntime-gpu in its place"


def _session(model: onnx.ModelProto, device: int, stream: int, threads: int):
    """A session all of whose nodes are on the GPU, or `Unsupported`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # a node left to the CPU is an error
    settings = {**OPTIONS, "device_id": str(device), "user_compute_stream": str(stream)}
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[(PROVIDER, settings)])
    except Exception as error:  # its exception classes share no public base
        raise Unsupported(f"ONNX Runtime's CUDA provider refuses the model: {first_line(error)}") from error
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDER:
        raise Unsupported("ONNX Runtime could not start its CUDA provider: its CUDA and cuDNN differ from torch's?")
    return session


def _run_options():
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
