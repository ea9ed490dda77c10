"""OpenVINO on the CPU."""

import numpy as np
import onnx

from rd_deploy.common import require
from rd_deploy.engines.base import Engine, Session, Unsupported

ELEMENT = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16")}  # the hint, and how OpenVINO prints its type
CONVOLUTIONS = ("Convolution", "GroupConvolution")


class OpenVinoSession(Session):
    """A network compiled by OpenVINO's CPU plugin: one stream, latency first."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        self._compiled = _compile(model, precision, threads)
        self._request = self._compiled.create_infer_request()
        _check_precision(self._compiled, precision)

    def _run(self, images: np.ndarray) -> np.ndarray:
        self._request.infer([images], share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)  # a copy: the request reuses its buffer

    def _feature_maps(self) -> tuple[int | None, str]:
        return None, "OpenVINO's CPU plugin publishes no activation memory"


def _compile(model: onnx.ModelProto, precision: str, threads: int):
    ov = require("openvino", "openvino")
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
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
    convolutions = executed_convolutions(compiled)
    wanted, printed = ELEMENT[precision]
    others = sorted(set(convolutions) - {wanted})
    if printed not in str(effective) or others:
        raise Unsupported(f"OpenVINO runs {', '.join(others) or effective} instead of {precision} on this CPU")


def executed_convolutions(compiled) -> list[str]:
    """The precision (``f32``, ``bf16``) each convolution of the executed graph really computes in."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ordered_ops()]
    return [_text(info["runtimePrecision"]) for info in infos if _text(info["layerType"]) in CONVOLUTIONS]


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

    def version(self) -> str:
        return require("openvino", self.extra).__version__.split("-")[0]

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return OpenVinoSession(self, model, precision, threads, batch)
