"""Shapes of an ONNX network's tensors at a given batch, known before it runs.

ONNX's own shape inference does most of it. Here a fixed batch is changed, large weights are left out, and shapes
that the network computes from shapes (what tracing exporters write) are folded to constants.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper

from rd_deploy.common import UserError, first_line
from rd_deploy.onnx_files import fixed_batch, runtime_inputs

KEPT_WEIGHTS = 1024  # initializers of up to this many elements may decide shapes and are given to shape inference
SHAPE_ONLY = {"Shape", "Size"}  # they read no data, and with a fixed batch their results are constants
# What exporters compute shapes with. Those that can make much out of little have a bound in `_most_elements`.
# fmt: off
BROADCASTING = {"Add", "Div", "Equal", "Max", "Min", "Mod", "Mul", "Sub", "Where"}
SHAPE_MATHS = SHAPE_ONLY | BROADCASTING | {
    "Cast", "Concat", "Constant", "ConstantOfShape", "Floor", "Gather", "Identity", "Neg", "ReduceProd", "Reshape",
    "Slice", "Sqrt", "Squeeze", "Unsqueeze",
}
# fmt: on
TEXT = onnx.TensorProto.STRING  # no shape is made of it, and NumPy makes all strings as long as the longest
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


class Shapes:
    """Shapes and sizes of the tensors of an inferred graph."""

    def __init__(self, graph: onnx.GraphProto, element_bytes: int):
        self._types = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
        self._element_bytes = element_bytes

    def known(self, name: str) -> bool:
        """Whether every dimension is known before running."""
        kind = self._types.get(name)
        if not kind or not kind.tensor_type.HasField("shape"):
            return False
        return all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in kind.tensor_type.shape.dim)

    def dims(self, name: str) -> tuple[int, ...]:
        """The shape, or a `UserError` if it is not known before running."""
        if not self.known(name):
            advice = "fold its constants (onnxsim) or export it with fixed shapes"
            raise UserError(f"the shape of tensor '{name}' cannot be known before the network runs; {advice}")
        return tuple(dim.dim_value for dim in self._types[name].tensor_type.shape.dim)

    def elements(self, name: str) -> int:
        return math.prod(self.dims(name))

    def bytes(self, name: str) -> int:
        elements, kind = self.elements(name), self._types[name].tensor_type.elem_type
        if kind in FLOATS:
            return elements * self._element_bytes
        try:
            return elements * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        except KeyError as error:
            raise UserError(
                f"tensor '{name}' has no type that ONNX knows ({kind}); export the network again"
            ) from error


def infer_shapes(model: onnx.ModelProto, batch: int) -> onnx.GraphProto:
    """The graph with its shapes inferred at ``batch``, local functions inlined and large weights among its inputs.

    Raises `UserError` when the network cannot run at this batch.
    """
    fixed = fixed_batch(model)
    inputs = [_at_batch(value, fixed, batch) for value in runtime_inputs(model)]
    try:
        light = _shapes_only(model, inputs)
        light.graph.value_info.extend(_foreign_shapes(model, batch))
        if light.functions:
            light = onnx.inliner.inline_local_functions(light)
        return _infer_folding(light)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        advice = f"its batch is fixed at {fixed}: export it with a dynamic one" if fixed else "export it again"
        raise UserError(f"shapes do not fit at batch {batch} ({first_line(error)}); {advice}") from error


def _infer_folding(model: onnx.ModelProto) -> onnx.GraphProto:
    """Shape inference that also works where shapes are computed by nodes (what tracing exporters write).

    ONNX's own inference does not know all arithmetic, so while shapes are missing, what is known is computed here.
    """
    while True:
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        shapes = Shapes(graph, 1)
        if all(shapes.known(value.name) for value in graph.value_info) or not _fold(model, shapes):
            return graph


def _fold(model: onnx.ModelProto, shapes: Shapes) -> bool:
    """Replace the nodes whose small results are already known by constants; False if there are none."""
    graph = model.graph
    numbers = (tensor for tensor in graph.initializer if tensor.data_type != TEXT)
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in numbers}
    left = []
    for node in graph.node:
        value = _constant_value(node, known, shapes, model.opset_import)
        if value is None or value.size > KEPT_WEIGHTS:
            left.append(node)
        else:
            known[node.output[0]] = value
            graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
    changed = len(left) < len(graph.node)
    del graph.node[:]
    graph.node.extend(left)
    return changed


def _constant_value(node: onnx.NodeProto, known: dict[str, np.ndarray], shapes: Shapes, opsets) -> np.ndarray | None:
    """The result of a node that does arithmetic on shapes, if it is known."""
    if not is_standard(node) or node.op_type not in SHAPE_MATHS or len(node.output) != 1 or _holds_text(node):
        return None
    if node.op_type in SHAPE_ONLY and shapes.known(node.input[0]):
        # The operator reads the shape only: a view of one element has it, and no memory.
        inputs = [np.broadcast_to(np.float32(0), shapes.dims(node.input[0]))]
    elif all(name in known for name in node.input if name):
        inputs = [known[name] for name in node.input if name]
    else:
        return None
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    values = [_declared(name, onnx.TensorProto.UNDEFINED, None) for name in names]
    single = onnx.helper.make_graph(
        [node], "one", values, [_declared(node.output[0], onnx.TensorProto.UNDEFINED, None)]
    )
    try:
        if _most_elements(node, inputs) > KEPT_WEIGHTS:
            return None
        model = onnx.helper.make_model(single, opset_imports=list(opsets))
        return np.asarray(ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0])
    except Exception:  # the evaluator raises anything; the shape then stays unknown, which is reported as such
        return None


def _holds_text(node: onnx.NodeProto) -> bool:
    """Whether a constant is made of strings."""
    constants = node.attribute if node.op_type in ("Constant", "ConstantOfShape") else ()
    return any(value.s or value.strings or value.t.data_type == TEXT for value in constants)


def _most_elements(node: onnx.NodeProto, inputs: list[np.ndarray]) -> int:
    """A bound on a result's elements, before it is computed: a file of a few kilobytes could ask for gigabytes."""
    if node.op_type in SHAPE_ONLY:
        return inputs[0].ndim
    if node.op_type in BROADCASTING:
        return math.prod(np.broadcast_shapes(*(value.shape for value in inputs)))
    if node.op_type == "ConstantOfShape":
        return math.prod(inputs[0].tolist())
    if node.op_type == "Gather":
        data, indices = inputs
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        return data.size // max(1, data.shape[axis]) * indices.size
    sizes = [value.size for value in inputs]
    return sum(sizes) if node.op_type == "Concat" else max(sizes, default=0)


def _at_batch(value: onnx.ValueInfoProto, fixed: int | None, batch: int) -> onnx.ValueInfoProto:
    """An input with its first dimension set to ``batch`` if it is dynamic, or the batch that the file fixes."""
    changed = onnx.ValueInfoProto()
    changed.CopyFrom(value)
    for dim in changed.type.tensor_type.shape.dim[:1]:
        if dim.dim_value <= 0 or dim.dim_value == fixed:
            dim.dim_value = batch
    return changed


def _foreign_shapes(model: onnx.ModelProto, batch: int) -> Iterator[onnx.ValueInfoProto]:
    """The stored shapes of what operators of other domains make: nothing infers them. Only those led by the batch."""
    names = {name for node in model.graph.node if not is_standard(node) for name in node.output}
    own = runtime_inputs(model)[0].type.tensor_type.shape.dim
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.name in names and own and dims and dims[0] == own[0] and dims[0].WhichOneof("value"):
            yield _at_batch(value, own[0].dim_value or None, batch)


def is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def _shapes_only(model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """A copy to infer shapes on: the large weights are declared and left out, and so are all stored shapes."""
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))  # from 4 on, weights need not be inputs
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = "shapes"
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(inputs)
    for tensor in model.graph.initializer:
        stored = tensor.data_location != onnx.TensorProto.EXTERNAL
        if stored and math.prod(tensor.dims) <= KEPT_WEIGHTS:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(_declared(tensor.name, tensor.data_type, tensor.dims))
    for part in model.graph.sparse_initializer:
        light.graph.input.append(_declared(part.values.name, part.values.data_type, part.dims))
    for value in model.graph.output:
        light.graph.output.append(_declared(value.name, value.type.tensor_type.elem_type, None))
    return light


def _declared(name: str, data_type: int, dims: Iterable[int] | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, data_type, None if dims is None else list(dims))
