"""ONNX Runtime on the CPU."""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx

from rd_deploy.engines.base import Engine, Session, Unsupported, first_line


class OnnxRuntimeSession(Session):
    """A network in ONNX Runtime's CPU provider."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        self._model = model.SerializeToString()
        self._session = _session(self._model, _options(threads))
        self._input = self._session.get_inputs()[0].name
        self._output = [self._session.get_outputs()[0].name]

    def _run(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(self._output, {self._input: images})[0]

    def _feature_maps(self) -> tuple[int | None, str]:
        """Run a second, profiled session whose tensors are allocated one by one, and read its arena's live bytes."""
        with tempfile.TemporaryDirectory() as folder:
            options = _options(self.threads)
            options.enable_profiling, options.enable_mem_pattern = True, False
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._model, options)
            session.run(self._output, {self._input: np.zeros(self.shape, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return arena_peak(events)


def arena_peak(events: list[dict]) -> tuple[int | None, str]:
    """Peak of (live arena bytes after a kernel) - (live bytes before the first kernel), from a profile of one run."""
    stats = [event["args"] for event in events if event.get("cat") == "Node" and "args" in event]
    stats = [args for args in stats if "mem_bytes_requested_in_use" in args]
    if not stats:
        return None, "this ONNX Runtime's profile has no memory statistics (1.32 has)"
    live = [int(args["mem_bytes_requested_in_use"]) for args in stats]
    before = live[0] - int(stats[0]["mem_requested_in_use_delta"])
    return max(live) - before, "profiler: most arena bytes requested and live after a kernel, above those before a run"


class OnnxRuntime(Engine):
    """ONNX Runtime's CPU execution provider, all graph optimisations on."""

    name = "onnxruntime"
    package = "onnxruntime"
    extra = None

    def version(self) -> str:
        import onnxruntime

        return onnxruntime.__version__

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        if precision != "fp32":
            raise Unsupported(f"ONNX Runtime's CPU provider has no {precision} convolution")
        return OnnxRuntimeSession(self, model, precision, threads, batch)


def _options(threads: int):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Idle workers spin after a run by default and would steal cores from whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _session(model: bytes, options):
    import onnxruntime as ort

    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes share no public base
        raise Unsupported(f"ONNX Runtime refuses the model: {first_line(error)}") from error
