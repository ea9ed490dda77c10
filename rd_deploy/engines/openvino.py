"""OpenVINO on the CPU."""

import numpy as np
import onnx

from rd_deploy.common import require
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported

ELEMENT = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16")}  # the hint, and how OpenVINO prints its type
ARITHMETIC = ("Convolution", "GroupConvolution", "MatMul", "FullyConnected")


class OpenVinoSession(Session):
    """A network compiled by OpenVINO's CPU plugin: one stream, latency first."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        self._compiled = _with_threads(model, precision, threads)
        self._request = self._compiled.create_infer_request()
        _check_precision(self._compiled, precision)

    def _run(self, images: np.ndarray) -> np.ndarray:
        self._request.infer([images], share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)  # a copy: the request reuses its buffer

    def _feature_maps(self) -> tuple[Figure, ...]:
        return (Figure("openvino", None, "OpenVINO's CPU plugin publishes no activation memory"),)


def _with_threads(model: onnx.ModelProto, precision: str, threads: int):
    """Compiled for exactly this many threads.

    For low latency the plugin leaves a core's second hardware thread idle, and says nothing when it takes fewer threads
    than it was told: so ask it, and allow the second hardware threads only where the cores are too few.
    """
    for both in (False, True):
        compiled = _compile(model, precision, threads, both)
        used = compiled.get_property("INFERENCE_NUM_THREADS")
        if used == threads:
            return compiled
    raise Unsupported(f"OpenVINO runs {used} threads instead of {threads} here: choose --threads {used}")


def _compile(model: onnx.ModelProto, precision: str, threads: int, hyper_threading: bool):
    ov = require("openvino", "openvino")
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": hyper_threading,
        "INFERENCE_PRECISION_HINT": ELEMENT[precision][0],
    }
    try:
        core = ov.Core()
        return core.compile_model(core.read_model(model.SerializeToString()), "CPU", config)
    except Exception as error:  # RuntimeError or its own classes, by version
        raise Unsupported(f"OpenVINO refuses the model: {_last_line(error)}") from error


def _check_precision(compiled, precision: str) -> None:
    """A CPU without bf16 units makes the plugin fall back to float32: refuse rather than measure that."""
    effective = compiled.get_property("INFERENCE_PRECISION_HINT")
    executed = executed_arithmetic(compiled)
    wanted, printed = ELEMENT[precision]
    others = sorted(set(executed) - {wanted})
    if not executed:
        raise Unsupported(
            f"OpenVINO's executed graph has no convolution and no MatMul: nothing to show it runs {precision}"
        )
    if printed not in str(effective) or others:
        raise Unsupported(f"OpenVINO runs {', '.join(others) or effective} instead of {precision} on this CPU")


def executed_arithmetic(compiled) -> list[str]:
    """The precision (``f32``, ``bf16``) each executed convolution and matrix product really computes in."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ordered_ops()]
    return [_text(info["runtimePrecision"]) for info in infos if _text(info["layerType"]) in ARITHMETIC]


def _text(value) -> str:
    return value.astype(str) if hasattr(value, "astype") else str(value)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


class OpenVino(Engine):
    """OpenVINO's CPU plugin."""

    name = "openvino"
    package = "openvino"
    extra = "openvino"

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return OpenVinoSession(self, model, precision, threads, batch)
