"""ONNX files, built node by node from the chain: no tracer, so the batch is exactly dynamic and no BN can remain.

The graph takes ``images`` (batch, C, H, W) float32 and gives ``logits`` (batch, classes) float32, whatever the
precision inside. The same chain gives the same bytes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, MaxPool, Step, round_to_bf16, weights
from rd_deploy.common import UserError, nearest
from rd_deploy.export import files
from rd_deploy.export.files import OUTPUT, Artefact, make_artefact
from rd_deploy.preprocessing import Preprocessing

FORMAT = "residual-distillation-onnx/1"
SUFFIX = ".onnx"
PACKAGES = ("residual-distillation", "numpy", "onnx", "onnxruntime", "torch")
# Opset 17 with IR 8 (2022): read by ONNX Runtime >= 1.12, TensorRT >= 8.6 and every OpenVINO 2023+. Convolutions and
# pools of bf16 are in ONNX since opset 22 (2024) only; Q/DQ of float8 since 19, its IR 9 (2023).
OPSETS = {"fp32": (17, 8), "fp16": (17, 8), "bf16": (22, 10), "int8": (19, 9), "fp8": (19, 9)}
# A protobuf message ends at 2 GiB; a little is left for names and metadata.
MAX_WEIGHT_BYTES = (2 << 30) - (16 << 20)
DTYPES = {
    "fp32": (np.float32, TensorProto.FLOAT),
    "fp16": (np.float16, TensorProto.FLOAT16),
    "bf16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
}
PRECISIONS = tuple(DTYPES)
KEY = "residual_distillation."


@dataclass(frozen=True)
class Metadata:
    """What travels inside the ONNX file. ``weights_sha256`` is `Chain.sha256`, the same in every precision."""

    name: str
    arch: dict
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    precision: str
    weights_sha256: str


# --- writing


def to_onnx(chain: Chain, precision: str = "fp32") -> onnx.ModelProto:
    """The checked ONNX model of a chain.

    ``fp16``, ``bf16``: weights, activations and arithmetic are of that type between a cast of the images and a cast of
    the logits, so that callers feed and read float32 either way. Raises `UserError` when a weight is out of the type's
    range, or the weights exceed what one ONNX file holds. int8 and fp8 need data: `rd_deploy.quantize`.
    """
    if precision not in DTYPES:
        raise UserError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
    dtype, element = DTYPES[precision]
    check_size(weight_bytes(chain, precision))
    chain.check()
    initializers = [_initializer(step, part, values, dtype) for step in chain.steps for part, values in weights(step)]
    return make_model(chain, precision, _nodes(chain, precision), initializers, _value_infos(chain, element))


def make_model(
    chain: Chain,
    precision: str,
    nodes: list[onnx.NodeProto],
    initializers: list[TensorProto],
    value_infos: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """The checked model of these nodes, from float32 images to float32 logits, with a chain's metadata."""
    graph = helper.make_graph(
        nodes,
        chain.name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *chain.input_shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", len(chain.classes)])],
        initializers,
        value_info=value_infos,
    )
    opset, ir_version = OPSETS[precision]
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
        producer_name="residual-distillation",
    )
    helper.set_model_props(model, _metadata_props(chain, precision))
    onnx.checker.check_model(model, full_check=True)
    return model


def check_size(size: int) -> None:
    """Raise `UserError` for more bytes of weights than one ONNX file holds."""
    if size > MAX_WEIGHT_BYTES:
        raise UserError(f"{size / 2**30:.1f} GiB of weights exceed the 2 GiB of one ONNX file; use a smaller width")


def weight_bytes(chain: Chain, precision: str) -> int:
    """Bytes of all weights and biases in a precision."""
    return chain.parameters() * np.dtype(DTYPES[precision][0]).itemsize


def make_tensor(name: str, values: np.ndarray, element: int) -> TensorProto:
    """An initializer of these values' bits (`numpy_helper` knows the types of ml_dtypes since onnx 1.19 only)."""
    return helper.make_tensor(name, element, values.shape, np.ascontiguousarray(values).tobytes(), raw=True)


def _initializer(step: Step, part: str, values: np.ndarray, dtype: type) -> TensorProto:
    with np.errstate(over="ignore"):
        rounded = (round_to_bf16(values) if dtype is ml_dtypes.bfloat16 else values).astype(dtype)
    if not np.isfinite(rounded).all():
        advice = "export with --precision fp32" if dtype is np.float16 else "train again"
        raise UserError(
            f"{step.name}.{part} reaches {np.abs(values).max():.3g}, more than {np.dtype(dtype).name} holds "
            f"({float(ml_dtypes.finfo(dtype).max):.3g}); {advice}"
        )
    return make_tensor(f"{step.name}.{part}", rounded, dict(DTYPES.values())[dtype])


def _nodes(chain: Chain, precision: str) -> list[onnx.NodeProto]:
    """The nodes of all steps; in fp16 and bf16 the steps run between two casts."""
    if precision == "fp32":
        names = {chain.steps[-1].name: OUTPUT}
        return [node for step in chain.steps for node in step_nodes(step, names)]
    half, last = f"{INPUT}_{precision}", chain.steps[-1].name
    last_half = f"{last}_{precision}" if last == OUTPUT else last  # a chain from a file of others may end so
    names = {INPUT: half, last: last_half}
    return [
        helper.make_node("Cast", [INPUT], [half], half, to=DTYPES[precision][1]),
        *(node for step in chain.steps for node in step_nodes(step, names)),
        helper.make_node("Cast", [last_half], [OUTPUT], OUTPUT, to=TensorProto.FLOAT),
    ]


def step_nodes(step: Step, names: dict[str, str]) -> list[onnx.NodeProto]:
    """One step as ONNX nodes; ``names`` renames tensors. The step's last node writes the tensor of its name."""
    source, output = names.get(step.source, step.source), names.get(step.name, step.name)
    if isinstance(step, Conv):
        return _conv_nodes(step, source, names.get(step.add, step.add), output)
    if isinstance(step, MaxPool):
        return [helper.make_node("MaxPool", [source], [output], step.name, **_window(step, step.kernel, step.kernel))]
    if isinstance(step, GlobalAveragePool):
        pooled = f"{step.name}/pool"
        return [
            helper.make_node("GlobalAveragePool", [source], [pooled], pooled),
            helper.make_node("Flatten", [pooled], [output], step.name, axis=1),
        ]
    inputs = [source, f"{step.name}.weight", f"{step.name}.bias"]
    return [helper.make_node("Gemm", inputs, [output], step.name, transB=1)]


def _conv_nodes(step: Conv, source: str, added: str | None, output: str) -> list[onnx.NodeProto]:
    operators = ["Conv", *(["Add"] if added else []), *(["Relu"] if step.relu else [])]
    nodes, tensor = [], source
    for operator in operators:
        inputs = {"Conv": [f"{step.name}.weight", f"{step.name}.bias"], "Add": [added], "Relu": []}[operator]
        attributes = _window(step, *step.weight.shape[2:]) if operator == "Conv" else {}
        name = f"{step.name}/{operator.lower()}"
        result = output if operator == operators[-1] else name
        nodes.append(helper.make_node(operator, [tensor, *inputs], [result], name, **attributes))
        tensor = result
    return nodes


def _window(step: Conv | MaxPool, height: int, width: int) -> dict:
    return {"kernel_shape": [height, width], "strides": [step.stride] * 2, "pads": [step.padding] * 4}


def _value_infos(chain: Chain, element: int) -> list[onnx.ValueInfoProto]:
    """Shapes of the steps' tensors, which the checker compares with its own."""
    shapes = chain.shapes()
    return [
        helper.make_tensor_value_info(step.name, element, ["batch", *shapes[step.name]]) for step in chain.steps[:-1]
    ]


def _metadata_props(chain: Chain, precision: str) -> dict[str, str]:
    values = {
        "arch": json.dumps(chain.arch, sort_keys=True),
        "classes": json.dumps(list(chain.classes)),
        "format": FORMAT,
        "name": chain.name,
        "precision": precision,
        "preprocessing": json.dumps(chain.preprocessing.to_dict(), sort_keys=True),
        "weights_sha256": chain.sha256(),
    }
    return {KEY + name: value for name, value in values.items()}


def make_onnx(
    path: str | Path, chain: Chain, precision: str = "fp32", verify: Callable[[bytes], dict] | None = None
) -> Artefact:
    """The ONNX file of a chain, and its sidecar, ready to be written to ``path`` (.onnx) and beside it (.json).

    ``verify`` gets the file's bytes; what it returns becomes the sidecar's ``parity``, and it may raise.
    """
    return artefact_of(path, chain, precision, to_onnx(chain, precision), weight_bytes(chain, precision), verify)


def artefact_of(
    path: str | Path,
    chain: Chain,
    precision: str,
    model: onnx.ModelProto,
    weight_size: int,
    verify: Callable[[bytes], dict] | None,
    particular: dict | None = None,
) -> Artefact:
    """Any ONNX model of a chain as `make_onnx` makes it; ``particular``: further entries of its sidecar."""
    path = check_target(path)
    content = model.SerializeToString(deterministic=True)
    entries = {"opset": OPSETS[precision][0], "weight_bytes": weight_size} | (particular or {})
    return make_artefact(path, sidecar_path(path), content, chain, precision, verify, entries, PACKAGES)


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of an ONNX file lies."""
    return path.with_suffix(".json")


def check_target(path: str | Path) -> Path:
    """The output path, if it ends in .onnx, can be written and nothing of others is in the way: before the work."""
    path = Path(path)
    files.check_target(path, SUFFIX, sidecar_path(path))
    return path


# --- reading


def read_metadata(model: onnx.ModelProto) -> Metadata:
    """What `to_onnx` put into a model, validated; `UserError` for a model that is not ours or was damaged."""
    values = {entry.key.removeprefix(KEY): entry.value for entry in model.metadata_props if entry.key.startswith(KEY)}
    if values.get("format") != FORMAT:
        raise UserError(f"the ONNX model carries no {FORMAT} metadata; make it with rd-export")
    names = ("arch", "classes", "name", "precision", "preprocessing", "weights_sha256")
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"the ONNX model's metadata lacks {', '.join(missing)}; export it again")
    arch, classes = _json(values, "arch", dict), _json(values, "classes", list)
    if not (classes and all(isinstance(name, str) for name in classes)):
        raise UserError("the ONNX model's class names must be strings; export it again")
    if values["precision"] not in OPSETS or not re.fullmatch("[0-9a-f]{64}", values["weights_sha256"]):
        raise UserError("the ONNX model's precision or hash of the weights is damaged; export it again")
    preprocessing = Preprocessing.from_dict(_json(values, "preprocessing", dict))
    return Metadata(values["name"], arch, preprocessing, tuple(classes), values["precision"], values["weights_sha256"])


def _json(values: dict[str, str], name: str, kind: type) -> dict | list:
    try:
        value = json.loads(values[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"the ONNX model's metadata '{name}' is not JSON; export it again") from error
    if not isinstance(value, kind):
        raise UserError(f"the ONNX model's metadata '{name}' is not a JSON {kind.__name__}; export it again")
    return value
