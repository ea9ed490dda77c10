"""What ONNX Runtime's providers for NVIDIA GPUs share: sessions in torch's memory that use nothing but the provider.

A provider records and replays a CUDA graph of its own, on a stream of ours. Versions before ONNX Runtime's pull request
28686 (2026) wait for the GPU after every replay whatever they are told, so that the next launch is not hidden: that
costs some microseconds per run, which matter at small batches only.
"""

import re
from abc import abstractmethod

import onnx

from rd_deploy.chain import INPUT
from rd_deploy.common import one_line
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.engines.device import DeviceEngine, DeviceSession, no_gpu
from rd_deploy.engines.half_onnx import count_classes, half_onnx
from rd_deploy.export.files import OUTPUT

NO_CPU = "session.disable_cpu_ep_fallback"  # a node that is left to the CPU is an error
LIST_NODES = "session.record_ep_graph_assignment_info"


class ProviderEngine(DeviceEngine):
    """A provider of ONNX Runtime, ``provider`` by its name there. The defaults are those of onnxruntime-gpu's own."""

    package = "onnxruntime"
    extra = "gpu"
    precisions = ("fp16",)
    provider: str

    def missing(self) -> str | None:
        """torch comes first: importing it loads the CUDA libraries that providers need."""
        return no_gpu() or Engine.missing(self) or self.no_provider()

    def no_provider(self) -> str | None:
        """One line when the ONNX Runtime that is installed lacks the provider or what it needs."""
        import onnxruntime as ort
        import torch

        if self.provider not in ort.get_available_providers():
            return f"onnxruntime {ort.__version__} was built without CUDA: pip install onnxruntime-gpu in its place"
        theirs, ours = ort.cuda_version.split(".")[0], torch.version.cuda.split(".")[0]
        if theirs != ours:
            return f"onnxruntime {ort.__version__} needs CUDA {theirs}, torch brings CUDA {ours}: install one that fits"
        return None

    @abstractmethod
    def settings(self, device, stream: int) -> dict[str, str]:
        """The provider's options for a torch device and a CUDA stream's address; it refuses names it does not know."""

    def start(self, model: bytes, options, settings: dict[str, str]):
        """An InferenceSession. ``enable_fallback``: by default it prints that it goes on with the CPU, and does."""
        import onnxruntime as ort

        return ort.InferenceSession(model, options, providers=[(self.provider, settings)], enable_fallback=0)

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return ProviderSession(self, model, precision, threads, batch)


class ProviderSession(DeviceSession):
    """A network in one provider; no node of it runs elsewhere."""

    def __init__(self, engine: ProviderEngine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        half, torch = half_onnx(model, batch, precision), self._torch
        self._stream = torch.cuda.Stream()
        self._output = torch.zeros(batch, count_classes(half), dtype=self.dtype, device=self.device)
        before = self._taken()
        settings = engine.settings(self.device, self._stream.cuda_stream)
        self._session = create_session(engine, half.SerializeToString(), settings, threads)
        self._binding, self._options = self._bound(half.graph.input[0].type.tensor_type.elem_type), _run_options()
        self._capture(self._forward, own_graph=True)
        torch.cuda.synchronize()
        self._memory = self._taken() - before

    def _bound(self, element: int):
        """The network's two tensors in torch's memory, for good."""
        batch, channels, height, width = self.shape
        binding, where = self._session.io_binding(), (self.device.type, self.device.index)
        images, logits = self.images.data_ptr(), self._output.data_ptr()
        binding.bind_input(INPUT, *where, element, [batch, height, width, channels], images)
        binding.bind_output(OUTPUT, *where, element, list(self._output.shape), logits)
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
        return (Figure(f"{self.engine.name} session", peak, how),)


def create_session(engine: ProviderEngine, model: bytes, settings: dict[str, str], threads: int):
    """An InferenceSession all of whose nodes are the provider's, or `Unsupported`."""
    try:
        session = engine.start(model, _session_options(threads, NO_CPU), settings)
    except Exception as error:  # its exception classes share no public base
        raise Unsupported(_refusal(engine, model, settings, threads, error)) from error
    if session.get_providers()[0] != engine.provider:
        raise Unsupported(_not_started(engine))
    return session


def _refusal(engine: ProviderEngine, model: bytes, settings: dict[str, str], threads: int, error: Exception) -> str:
    """Why there is no session.

    ONNX Runtime says the same of a provider that did not start and of one that leaves nodes to the CPU. A session that
    may use the CPU, and runs nothing, tells them apart.
    """
    if "fallback to CPU EP" not in str(error):
        return f"{engine.provider} cannot run the network: {reason(error)}"
    try:
        session = engine.start(model, _session_options(threads, LIST_NODES), settings)
    except Exception as other:
        return f"{engine.provider} cannot run the network: {reason(other)}"
    if engine.provider not in session.get_providers():
        return _not_started(engine)
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != engine.provider]
    left = sorted({node.op_type for part in parts for node in part.get_nodes()})
    return f"{engine.provider} leaves {', '.join(left)} to the CPU"


def _not_started(engine: ProviderEngine) -> str:
    return f"{engine.provider} did not start, ONNX Runtime's log says why: mostly a library of another version"


def reason(error: Exception) -> str:
    """What ONNX Runtime's exception says, in one line without folders and the C++ functions that it came through."""
    text = re.sub(r"/\S*/", "", one_line(error))
    last = re.sub(r"^.*(?:\[ONNXRuntimeError\] : \d+ : \w+ : |\[with [^]]*\] |&\) )", "", text)
    return last.split(" ; ")[0][:160] or type(error).__name__


def _session_options(threads: int, switch: str):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry(switch, "1")
    return options


def _run_options():
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
