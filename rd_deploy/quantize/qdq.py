"""ONNX with explicit Q/DQ: what is quantised, and with which scale, stands in the graph (int8, or float8 E4M3).

Placement is what TensorRT's guide on explicit quantization recommends: quantise what convolutions and the classifier
read, and nothing else, so that convolution, bias, ReLU and the next layer's Q can become one kernel with 8-bit maps in
and out (a max-pool in between commutes with Q). An addition can be part of that kernel if its other operand is 8-bit
too: there, and only there, a network with shortcuts needs Q/DQ that a plain one does not.

What is not quantised is float32, and so are the scales. With float16 scales TensorRT-RTX 1.7 builds the same layers and
plans the same memory, while ONNX Runtime 1.32 computes nonsense at its default settings: its pass
WeightBiasQuantization takes float16 biases for something else.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from rd_deploy.chain import Chain, Conv, Linear, Step, round_to
from rd_deploy.common import UserError, nearest
from rd_deploy.export.files import OUTPUT
from rd_deploy.export.onnx import check_size, make_model, make_tensor, step_nodes

ZERO = "zero"
# What TensorRT's float8 convolutions take: channels in whole vectors of 16. TensorRT-RTX 1.7 converts others (the first
# layer, of 1 or 3 channels) back to float and gains nothing but rounding.
FP8_CHANNELS = 16
E4M3 = (4, -9)  # significant bits, and the exponent of the least positive number


@dataclass(frozen=True)
class Kind:
    """An 8-bit type: a value is stored as ``dtype(value / scale)``, ``scale = range / largest``, symmetric around 0."""

    name: str
    dtype: type
    element: int
    largest: float


# int8 leaves -128 to activations that saturate: weights are symmetric. 448 is the largest number of E4M3.
KINDS = {
    "int8": Kind("int8", np.int8, TensorProto.INT8, 127.0),
    "fp8": Kind("fp8", ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN, 448.0),
}


# --- numbers


def scales(ranges: np.ndarray, kind: Kind) -> np.ndarray:
    """float32 scales of ranges (largest absolute values); 1 for a range of 0, where any scale is right."""
    smallest = float(np.finfo(np.float32).tiny)  # below it GPUs flush to zero
    return np.where(ranges > 0, np.maximum(ranges / kind.largest, smallest), 1.0).astype(np.float32)


def stored(values: np.ndarray, scale: np.ndarray, kind: Kind) -> np.ndarray:
    """``values / scale`` in the 8-bit type: rounded to nearest, ties to even, saturated."""
    quotient = np.clip(values / scale.astype(np.float64), -kind.largest, kind.largest)
    return (np.rint(quotient) if kind.name == "int8" else round_to(quotient, *E4M3)).astype(kind.dtype)


def stored_weight(weight: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, ...) in the 8-bit type, and its scale for each output channel, (out,)."""
    scale = scales(np.abs(weight).reshape(len(weight), -1).max(axis=1), kind)
    return stored(weight, scale.reshape(-1, *[1] * (weight.ndim - 1)), kind), scale


# --- what is quantised


def quantizable(chain: Chain, kind: Kind) -> tuple[str, ...]:
    """Names of the layers that are quantised unless they are kept."""
    return tuple(step.name for step in chain.steps if _fits(step, kind))


def _fits(step: Step, kind: Kind) -> bool:
    if isinstance(step, Conv) and kind.name == "fp8":
        return not any(channels % FP8_CHANNELS for channels in step.weight.shape[:2])
    return isinstance(step, Conv | Linear)


def check_keep(chain: Chain, kind: Kind, keep: Collection[str]) -> None:
    """Raise `UserError` for a name that is no layer, or when nothing remains to be quantised."""
    layers = quantizable(chain, kind)
    known = [step.name for step in chain.steps if isinstance(step, Conv | Linear)]
    for name in keep:
        if name not in known:
            raise UserError(f"--keep {name}: the network has no such layer{nearest(name, known)}")
    if not set(layers) - set(keep):
        reason = "--keep names every layer" if keep else f"no convolution has channels in multiples of {FP8_CHANNELS}"
        raise UserError(f"nothing remains to be quantised to {kind.name}: {reason}; use --precision fp16")


def quantized_tensors(chain: Chain, kind: Kind, keep: Collection[str] = ()) -> tuple[str, ...]:
    """The feature maps that get Q/DQ, in the order they are first read: each needs a range."""
    readers = [step for step in chain.steps if _fits(step, kind) and step.name not in keep]
    return tuple(dict.fromkeys(name for step in readers for name in _read(step)))


def _read(step: Step) -> Iterator[str]:
    yield step.source
    if isinstance(step, Conv) and step.add is not None:
        yield step.add


# --- the graph


def to_qdq(chain: Chain, ranges: Mapping[str, float], kind: str, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The checked ONNX model with Q/DQ: weights 8-bit with a scale per output channel, maps with one per tensor.

    ``ranges``: the largest absolute value of each of the `quantized_tensors`; what is beyond saturates. ``keep``:
    layers left in float32. The same arguments give the same bytes. Raises `UserError` for unknown names in ``keep``,
    and when a weight is beyond float32 or all of them exceed one ONNX file.
    """
    chain.check()
    check_keep(chain, KINDS[kind], keep)
    check_size(chain.parameters())  # at least a byte each; kept layers take four, and protobuf has the last word
    writer = _Writer(KINDS[kind], {chain.steps[-1].name: OUTPUT})
    for name in quantized_tensors(chain, KINDS[kind], keep):
        writer.add_scale(name, ranges[name])
    for step in chain.steps:
        writer.add(step, quantized=_fits(step, KINDS[kind]) and step.name not in keep)
    return make_model(chain, kind, writer.nodes, writer.initializers, [])


class _Writer:
    """Collects nodes and initializers of a graph. ``names``: renamed tensors."""

    def __init__(self, kind: Kind, names: dict[str, str]):
        self.kind, self.names = kind, names
        self.nodes: list[NodeProto] = []
        self.initializers = [make_tensor(ZERO, np.zeros((), kind.dtype), kind.element)]
        self.pairs: set[str] = set()

    def add_scale(self, name: str, largest: float) -> None:
        self._float(f"{name}/scale", scales(np.float64(largest), self.kind))

    def add(self, step: Step, quantized: bool) -> None:
        names, weight = dict(self.names), f"{step.name}.weight"
        if isinstance(step, Conv | Linear):
            self._float(f"{step.name}.bias", step.bias)
            names |= {name: self._pair(name) for name in _read(step)} if quantized else {}
            read = self._weight(step) if quantized else self._float(weight, step.weight)
        for node in step_nodes(step, names):
            node.input[:] = [read if name == weight else name for name in node.input]
            self.nodes.append(node)

    def _pair(self, name: str) -> str:
        """A feature map through Q and DQ; all its readers share the pair, so that it is stored once, as 8 bits."""
        if name not in self.pairs:
            self.pairs.add(name)
            operands = [f"{name}/scale", ZERO]
            self._node("QuantizeLinear", [name, *operands], f"{name}/q")
            self._node("DequantizeLinear", [f"{name}/q", *operands], f"{name}/dq")
        return f"{name}/dq"

    def _weight(self, step: Conv | Linear) -> str:
        """8-bit weights as they are stored, then DQ. (Float weights before Q and DQ give the same engine.)"""
        name, kind = f"{step.name}.weight", self.kind
        values, scale = stored_weight(step.weight, kind)
        self._float(f"{name}/scale", scale)
        self.initializers.append(make_tensor(f"{name}/q", values, kind.element))
        self.initializers.append(make_tensor(f"{name}/zero", np.zeros(len(scale), kind.dtype), kind.element))
        self._node("DequantizeLinear", [f"{name}/q", f"{name}/scale", f"{name}/zero"], f"{name}/dq", axis=0)
        return f"{name}/dq"

    def _node(self, operator: str, inputs: list[str], output: str, **attributes) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))

    def _float(self, name: str, values: np.ndarray) -> str:
        with np.errstate(over="ignore"):
            rounded = np.asarray(values, np.float32)
        if not np.isfinite(rounded).all():
            raise UserError(f"{name} is beyond float32; train again")
        self.initializers.append(make_tensor(name, rounded, TensorProto.FLOAT))
        return name


def qdq_counts(model: onnx.ModelProto) -> dict[str, int]:
    """How many Q and DQ nodes a model has, and where: DQ of weights, Q of feature maps, DQ that an Add reads."""
    nodes, constants = model.graph.node, {tensor.name for tensor in model.graph.initializer}
    dequantized = {node.output[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    weights = [node for node in dequantized.values() if node.input[0] in constants]
    added = [name for node in nodes if node.op_type == "Add" for name in node.input if name in dequantized]
    only_added = set(added) - {name for node in nodes if node.op_type != "Add" for name in node.input}
    return {
        "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in nodes),
        "dequantize_nodes": len(dequantized),
        "weights": len(weights),
        "feature_maps": len(dequantized) - len(weights),
        "added_operands": len(added),
        "feature_maps_only_added": len(only_added),
    }


def stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers of a `to_qdq` model: 8-bit weights, scales, biases and what was kept."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
