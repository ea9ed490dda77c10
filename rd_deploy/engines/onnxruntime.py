"""ONNX Runtime on the CPU."""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx

from rd_deploy.common import first_line
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported

PATTERNS = "memory patterns off (the timed session has them on)"


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

    def _feature_maps(self) -> tuple[Figure, ...]:
        """Run a second, profiled session whose tensors are allocated one by one, and read its arena's statistics."""
        with tempfile.TemporaryDirectory() as folder:
            options = _options(self.threads)
            options.enable_profiling, options.enable_mem_pattern = True, False
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _session(self._model, options)
            session.run(self._output, {self._input: np.zeros(self.shape, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return arena_figures(events)


def arena_figures(events: list[dict]) -> tuple[Figure, ...]:
    """Two accounts of one profiled run, each above what the session held before its first kernel.

    ``requested``: the most bytes asked for and live after a kernel. ``arena``: the arena's own peak, in chunks as it
    rounds them and with what a kernel asks for and gives back while it runs.
    """
    stats = [event["args"] for event in events if event.get("cat") == "Node" and "args" in event]
    stats = [args for args in stats if "mem_in_use_peak" in args]
    if not stats:
        reason = "this ONNX Runtime's profile has no memory statistics (1.32 has)"
        return (Figure("onnxruntime requested", None, reason),)
    live = [int(args["mem_bytes_requested_in_use"]) for args in stats]
    requested = max(live) - live[0] + int(stats[0]["mem_requested_in_use_delta"])
    how = f"most bytes requested and live after a kernel, {PATTERNS}"
    return (Figure("onnxruntime requested", requested, how), _arena_peak(stats))


def _arena_peak(stats: list[dict]) -> Figure:
    """The peak counts from the session's beginning: it is the run's own only if it grew, or is what is now in use."""
    first, peak = stats[0], int(stats[-1]["mem_in_use_peak"])
    in_use = int(first["mem_bytes_in_use"])
    if peak == int(first["mem_in_use_peak"]) > in_use:
        return Figure("onnxruntime arena", None, "the arena's peak may be that of loading the network")
    how = f"the arena's peak, with the kernels' scratch and rounded to its chunks, {PATTERNS}"
    return Figure("onnxruntime arena", peak - in_use + int(first["mem_in_use_delta"]), how)


class OnnxRuntime(Engine):
    """ONNX Runtime's CPU execution provider, all graph optimisations on."""

    name = "onnxruntime"
    package = "onnxruntime"
    extra = None

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
