"""Feature-map ledger: how many bytes of feature maps an ONNX network needs while it runs, step by step.

It is analysis, not measurement: shapes come from shape inference, weights and workspace are left out, and every
convolution is one step together with its batch normalisation, activation and residual addition. `Policy` says where the
sum of a residual block goes:

``separate``  the convolution that adds the shortcut writes a new tensor (its input, the shortcut and the sum are live);
``in-place``  it accumulates into the shortcut's buffer where that is legal: nothing else still reads the shortcut, the
              convolution itself does not read it, and it is not the caller's input. Unfused sums and products likewise.

Under both policies a unary pointwise operator overwrites an operand that dies there, views (reshape, flatten, dropout)
cost nothing, and each block runs in the order of its branches that needs the least. Network inputs count until their
last reader, network outputs from their step to the end. Operators that are not known here are one step each, with all
their inputs and outputs live: an upper bound. A block fused into one kernel by an engine can need less.

**Order.** A step that every earlier step leads to, and that leads to every later step, has the same live tensors in
every order, so these steps cut the network into independent parts. Within a part, a dynamic programme over the sets of
steps already run finds the lowest peak exactly (what is live depends on the set only); ties go to the file's order. A
part too wide to search (`MAX_SEARCH`) keeps the file's order, and `Ledger.best_order` is then False.

**Shortcut-held.** Of the two operands of a residual addition (two computed tensors of equal shape), the one with fewer
steps between it and the network's input is the shortcut (at a tie, the second). A step whose results only shortcuts use
(a projection) belongs to the shortcut too. A tensor is held by shortcuts during a step if every use of it that is still
to come, this step's included, is by a shortcut. So is, during a fused addition that writes a new tensor, the operand it
adds, whichever branch came last: without the shortcut there would be one such tensor, not two. A buffer that is being
overwritten with the sum counts as the sum. Concatenations (U-Net, DenseNet) are not shortcuts in this sense.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError, Message

from rd_deploy.common import UserError, check_file

Policy = Literal["separate", "in-place"]

MAX_MODEL_BYTES = (2 << 30) - 1  # what protobuf can parse
MAX_SEARCH = 1_000_000  # sets of steps x steps that the search for the best order looks at, per part of the network
KEPT_WEIGHTS = 1024  # initializers of up to this many elements may decide shapes and are given to shape inference

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
SHAPE_ONLY = {"Shape", "Size"}  # they read no data, and with a fixed batch their results are constants
# What exporters compute shapes with; none of them makes much out of little (but for ConstantOfShape, checked there).
# fmt: off
SHAPE_MATHS = SHAPE_ONLY | {
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Floor", "Gather", "Identity", "Max", "Min",
    "Mod", "Mul", "Neg", "ReduceProd", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where",
}
# fmt: on
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}  # what pointwise operators and additions are fused into
# fmt: off
UNARY = {
    "Abs", "BatchNormalization", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
}
# fmt: on
# Unary when all operands but one are constants.
BINARY = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "PRelu"}
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


@dataclass(frozen=True)
class LedgerStep:
    """One fused step. Bytes for the whole batch.

    ``live_bytes``: all feature maps that exist while it runs: its inputs, its outputs and everything waiting.
    ``shortcut_bytes``: the part of them that only shortcuts still need. ``read_bytes``, ``written_bytes``: each input
    and output once.
    """

    name: str
    op: str
    live_bytes: int
    shortcut_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Ledger:
    """The feature maps of one network in the order of execution, under one policy; see the module's docstring.

    ``best_order``: False if a part of the network had too many orders to search and kept the file's order.
    """

    policy: Policy
    batch: int
    element_bytes: int
    steps: tuple[LedgerStep, ...]
    best_order: bool

    @property
    def _peak(self) -> LedgerStep:
        return max(self.steps, key=lambda step: (step.live_bytes, -step.shortcut_bytes))

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are live at once."""
        return self._peak.live_bytes

    @property
    def peak_step(self) -> str:
        """Name of the step that needs `peak_bytes`; of several, the first of those where shortcuts hold least."""
        return self._peak.name

    @property
    def shortcut_peak_bytes(self) -> int:
        """Bytes held by shortcuts at `peak_step`."""
        return self._peak.shortcut_bytes

    @property
    def shortcut_share(self) -> float:
        """Bytes held by shortcuts / live bytes, each summed over the steps: 0 to 1."""
        return sum(step.shortcut_bytes for step in self.steps) / sum(step.live_bytes for step in self.steps)

    @property
    def traffic_bytes(self) -> int:
        """Bytes of feature maps read and written by all steps (weights excluded)."""
        return sum(step.read_bytes + step.written_bytes for step in self.steps)


def ledger(model: onnx.ModelProto, batch: int = 1, element_bytes: int = 4, policy: Policy = "separate") -> Ledger:
    """Count the feature maps of ``model`` at ``batch``, with every floating-point element in ``element_bytes`` bytes.

    Integer and boolean tensors keep their own size. A file with another fixed batch is re-inferred for this one.
    Raises `UserError` when a shape cannot be known before running, or the file cannot run at this batch.
    """
    if policy not in ("separate", "in-place"):
        raise UserError(f"policy '{policy}' is unknown (known: separate, in-place)")
    if batch < 1 or element_bytes not in (1, 2, 4, 8):
        raise UserError(f"batch {batch} and {element_bytes} bytes per element: need batch >= 1 and 1, 2, 4 or 8 bytes")
    graph = _fuse(*_infer(model, batch), element_bytes)
    order, best = _best_order(graph, policy)
    return Ledger(policy, batch, element_bytes, tuple(_walk(graph, policy, order)), best)


# Reading files ---------------------------------------------------------------------------------------------------


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file; raises `UserError` for anything that is not a sound network with fixed image size.

    Weights stored beside the file ("external data") must lie in its own folder; they are checked for presence and
    size, and not read, since only their shapes are needed here.
    """
    path = check_file(path, "ONNX file", MAX_MODEL_BYTES)
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is truncated; export or copy it again") from error
    if not model.graph.node or not model.graph.output:
        raise UserError(f"ONNX file {path} has no {'nodes' if model.graph.output else 'outputs'}; export it again")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise UserError(f"ONNX file {path} holds names that are not text; it is damaged, export or copy it again")
    for tensor in _stored_tensors(model):
        _check_external(tensor, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise UserError(f"ONNX file {path} is not valid ({_first_line(error)}); export it again") from error
    _file_batch(model)
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every string in a protobuf message; those that are not UTF-8 come out as bytes."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value
        elif kind.type == kind.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _texts(part)


def _stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a file can hold, in initializers and in attributes, at any depth of subgraphs."""

    def of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for part in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (part.values, part.indices)
                for graph in (attribute.g, *attribute.graphs):
                    yield from of_graph(graph)

    def of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for part in graph.sparse_initializer:
            yield from (part.values, part.indices)
        yield from of_nodes(graph.node)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse weights that lie outside the model's folder, are missing or are too short."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = entries.get("location", ""), path.resolve().parent
    if not location or "\0" in location or "\\" in location:
        raise UserError(f"ONNX file {path}: tensor '{tensor.name}' names no usable weight file; export it again")
    target = folder / location
    if folder not in target.resolve().parents:
        raise UserError(f"ONNX file {path} wants weights from outside its folder ({location!r}); it was refused")
    check_file(target, "weight file", 1 << 40)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as error:
        raise UserError(f"ONNX file {path}: tensor '{tensor.name}' has a bad offset or length") from error
    if min(offset, length) < 0 or offset + length > target.stat().st_size:
        raise UserError(f"weight file {target} is shorter than {path} says; copy it again")


# Shapes ----------------------------------------------------------------------------------------------------------


def _runtime_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that are not weights (old files list weights as inputs too)."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {part.values.name for part in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in weights]


def _file_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the file fixes, None if it is dynamic; refuses inputs with any other dynamic dimension."""
    inputs = _runtime_inputs(model)
    if not inputs:
        raise UserError("the ONNX network has no inputs; export it again")
    for value in inputs:
        if not value.type.tensor_type.HasField("shape"):
            raise UserError(f"input '{value.name}' has no shape; export the network with a fixed image size")
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value < 1:
                name = f" ('{dim.dim_param}')" if dim.dim_param else ""
                advice = "only the batch may be dynamic: export it with a fixed image size"
                raise UserError(f"input '{value.name}' has a dynamic dimension{name}; {advice}")
    first = inputs[0].type.tensor_type.shape.dim
    return first[0].dim_value or None if first else None


def _infer(model: onnx.ModelProto, batch: int) -> tuple[onnx.GraphProto, list[onnx.ValueInfoProto]]:
    """The graph with all shapes inferred at ``batch``, and its inputs without the weights."""
    fixed = _file_batch(model)
    inputs = [_at_batch(value, fixed, batch) for value in _runtime_inputs(model)]
    try:
        light = _shapes_only(model, inputs)
        light.graph.value_info.extend(_foreign_shapes(model, batch))
        if light.functions:
            light = onnx.inliner.inline_local_functions(light)
        return _infer_folding(light), inputs
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        advice = f"its batch is fixed at {fixed}: export it with a dynamic one" if fixed else "export it again"
        raise UserError(f"shapes do not fit at batch {batch} ({_first_line(error)}); {advice}") from error


def _infer_folding(model: onnx.ModelProto) -> onnx.GraphProto:
    """Shape inference that also works where shapes are computed by nodes (what tracing exporters write).

    ONNX's own inference does not know all arithmetic, so while shapes are missing, what is known is computed here.
    """
    while True:
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        shapes = _Shapes(graph, 1)
        if all(shapes.known(value.name) for value in graph.value_info) or not _fold(model, shapes):
            return graph


def _fold(model: onnx.ModelProto, shapes: "_Shapes") -> bool:
    """Replace the nodes whose small results are already known by constants; False if there are none."""
    graph = model.graph
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
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


def _constant_value(node: onnx.NodeProto, known: dict[str, np.ndarray], shapes: "_Shapes", opsets) -> np.ndarray | None:
    """The result of a node that does arithmetic on shapes, if it is known."""
    if not _is_standard(node) or node.op_type not in SHAPE_MATHS or len(node.output) != 1:
        return None
    if node.op_type in SHAPE_ONLY and shapes.known(node.input[0]):
        # The operator reads the shape only: a view of one element has it, and no memory.
        inputs = [np.broadcast_to(np.float32(0), shapes.dims(node.input[0]))]
    elif all(name in known for name in node.input if name):
        inputs = [known[name] for name in node.input if name]
    else:
        return None
    if node.op_type == "ConstantOfShape" and math.prod(inputs[0].tolist()) > KEPT_WEIGHTS:
        return None
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    values = [_declared(name, onnx.TensorProto.UNDEFINED, None) for name in names]
    single = onnx.helper.make_graph(
        [node], "one", values, [_declared(node.output[0], onnx.TensorProto.UNDEFINED, None)]
    )
    try:
        model = onnx.helper.make_model(single, opset_imports=list(opsets))
        return np.asarray(ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0])
    except Exception:  # the evaluator raises anything; the shape then stays unknown, which is reported as such
        return None


def _at_batch(value: onnx.ValueInfoProto, fixed: int | None, batch: int) -> onnx.ValueInfoProto:
    """An input with its first dimension set to ``batch`` if it is dynamic, or the batch that the file fixes."""
    changed = onnx.ValueInfoProto()
    changed.CopyFrom(value)
    for dim in changed.type.tensor_type.shape.dim[:1]:
        if dim.dim_value in (0, fixed):
            dim.dim_value = batch
    return changed


def _foreign_shapes(model: onnx.ModelProto, batch: int) -> Iterator[onnx.ValueInfoProto]:
    """The stored shapes of what operators of other domains make: nothing infers them. Only those led by the batch."""
    names = {name for node in model.graph.node if not _is_standard(node) for name in node.output}
    own = _runtime_inputs(model)[0].type.tensor_type.shape.dim
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.name in names and own and dims and dims[0] == own[0] and dims[0].WhichOneof("value"):
            yield _at_batch(value, own[0].dim_value or None, batch)


def _is_standard(node: onnx.NodeProto) -> bool:
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


class _Shapes:
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
        return elements * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


# From nodes to fused steps ---------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A node that computes on feature maps. ``operands``: the tensors it reads, seen through views, without weights."""

    proto: onnx.NodeProto
    position: int
    operands: list[str]
    outputs: list[str]

    @property
    def op(self) -> str:
        """The operator; one of another domain keeps its domain in front, so that no rule here mistakes it."""
        return self.proto.op_type if _is_standard(self.proto) else f"{self.proto.domain}.{self.proto.op_type}"


@dataclass
class _Sum:
    """A residual addition of the results of two products: whichever runs last does it."""

    ops: list[str]
    writes: list[str]


@dataclass
class _Step:
    """A node and what is fused into it. ``reads`` excludes ``addend``, the tensor that a fused addition adds."""

    name: str
    ops: list[str]
    position: int
    reads: list[str]
    writes: list[str]
    unary: bool = False
    overwrites: list[str] = field(default_factory=list)  # operands whose buffer may become the result's
    addend: str | None = None
    sum: _Sum | None = None
    partner: "_Step | None" = None  # the other product of `sum`
    on_shortcut: bool = False
    shortcut_operand: str | None = None  # of an addition in this step

    @property
    def can_add(self) -> bool:
        return self.ops[0] in PRODUCTS and self.addend is None and self.sum is None


def _computing_nodes(graph: onnx.GraphProto, inputs: set[str], shapes: _Shapes) -> tuple[list[_Node], dict[str, str]]:
    """The nodes that compute on feature maps, and for each feature map the tensor that holds its data (views share)."""
    holder, nodes = {name: name for name in inputs}, []
    for position, proto in enumerate(graph.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in proto.attribute):
            raise UserError(
                f"the ONNX network has control flow ({proto.op_type}), which the memory ledger cannot follow"
            )
        operands = list(dict.fromkeys(holder[name] for name in proto.input if name in holder))
        node = _Node(proto, position, operands, [name for name in proto.output if name])
        if not operands or node.op in SHAPE_ONLY:
            continue  # its results are constants
        if node.op in VIEWS and proto.input[0] in holder:
            if shapes.elements(proto.output[0]) != shapes.elements(proto.input[0]):
                advice = "export the network with a dynamic batch"
                raise UserError(f"{node.op} to '{proto.output[0]}' fits only the file's own batch; {advice}")
            holder[proto.output[0]] = holder[proto.input[0]]
            continue
        holder.update((name, name) for name in node.outputs)
        nodes.append(node)
    return nodes, holder


class _Fusion:
    """Turns nodes, added in the file's order, into fused steps."""

    def __init__(self, nodes: list[_Node], inputs: set[str], outputs: set[str], shapes: _Shapes):
        self.steps: list[_Step] = []
        self._shapes = shapes
        self._depth = dict.fromkeys(inputs, 0)  # of a tensor: the most steps between it and the network's inputs
        self._maker: dict[str, _Step | _Sum] = {}  # what a further pointwise operator on a tensor is fused into
        self._readers: dict[str, int] = dict.fromkeys(outputs, 1)
        for name in (name for node in nodes for name in node.operands):
            self._readers[name] = self._readers.get(name, 0) + 1
        for node in nodes:
            self._add(node)

    def _add(self, node: _Node) -> None:
        if self._is_unary(node):
            self._add_unary(node)
        elif self._is_residual(node):
            self._add_residual(node)
        else:
            same_size = [name for name in node.operands if node.op in BINARY and self._fits(name, node.outputs[0])]
            self._new_step(node, overwrites=same_size)

    def _fits(self, operand: str, result: str) -> bool:
        return self._shapes.bytes(operand) == self._shapes.bytes(result)

    def _is_unary(self, node: _Node) -> bool:
        pointwise = node.op in UNARY or node.op in BINARY
        return (
            pointwise and len(node.operands) == len(node.outputs) == 1 and self._fits(node.operands[0], node.outputs[0])
        )

    def _is_residual(self, node: _Node) -> bool:
        dims = {self._shapes.dims(name) for name in (*node.proto.input, *node.proto.output)} if node.op == "Add" else ()
        return node.op == "Add" and len(node.operands) == 2 and len(dims) == 1

    def _new_step(self, node: _Node, **changes) -> _Step:
        name = node.proto.name or node.outputs[0]
        step = _Step(name, [node.op], node.position, list(node.operands), list(node.outputs), **changes)
        self.steps.append(step)
        depth = 1 + max(self._depth[operand] for operand in node.operands)
        self._depth.update(dict.fromkeys(node.outputs, depth))
        if node.op in PRODUCTS:
            self._maker[node.outputs[0]] = step
        return step

    def _fuse(self, maker: _Step | _Sum, node: _Node) -> None:
        """Let what makes the operand of a pointwise node make its result instead."""
        self._depth[node.outputs[0]] = max(self._depth[operand] for operand in node.operands)
        self._maker[node.outputs[0]] = maker
        maker.ops.append(node.op)
        maker.writes[0] = node.outputs[0]

    def _add_unary(self, node: _Node) -> None:
        maker = self._maker.get(node.operands[0])
        if maker and self._readers[node.operands[0]] == 1:
            self._fuse(maker, node)
        else:
            self._new_step(node, unary=True, overwrites=node.operands)

    def _add_residual(self, node: _Node) -> None:
        """Fuse the addition into the product that makes an operand, into both (the last one adds) if there are two."""
        first, second = node.operands
        shortcut = first if self._depth[first] < self._depth[second] else second
        products = [self._product(name) for name in (first, second)]
        if all(products):
            self._join(*products, node, shortcut)
        elif any(products):
            step, addend = (products[0], second) if products[0] else (products[1], first)
            step.addend = addend
            step.position = node.position  # it waits for the addend; nothing reads its result before here
            step.overwrites = [] if addend in step.reads else [addend]
            step.on_shortcut = shortcut != addend
            step.shortcut_operand = None if step.on_shortcut else addend
            self._fuse(step, node)
        else:
            self._new_step(node, overwrites=node.operands, shortcut_operand=shortcut)

    def _product(self, name: str) -> _Step | None:
        """The step that makes a tensor, if it can add and the tensor has no other reader."""
        maker = self._maker.get(name)
        return maker if isinstance(maker, _Step) and maker.can_add and self._readers[name] == 1 else None

    def _join(self, first: _Step, second: _Step, node: _Node, shortcut: str) -> None:
        total = _Sum([], [shortcut])
        for step, partner in ((first, second), (second, first)):
            step.sum, step.partner = total, partner
            step.on_shortcut = step.writes[0] == shortcut
        self._fuse(total, node)


# Liveness --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """Fused steps in the file's order. Sets of steps are bit masks.

    ``uses``, ``shortcut_uses``: for each tensor, the steps that read it, and those that do so as a shortcut.
    ``needs``: for each step, the steps that must run before it.
    """

    steps: list[_Step]
    inputs: set[str]
    outputs: set[str]
    bytes: dict[str, int]
    uses: dict[str, int]
    shortcut_uses: dict[str, int]
    needs: list[int]

    def remaining(self, name: str, done: int) -> int:
        """The uses of a tensor that are still to come."""
        return self.uses.get(name, 0) & ~done

    def size(self, names: Iterable[str]) -> int:
        return sum(self.bytes[name] for name in names)


def _fuse(graph: onnx.GraphProto, runtime_inputs: list[onnx.ValueInfoProto], element_bytes: int) -> _Graph:
    """The fused graph of an inferred ONNX graph."""
    shapes, inputs = _Shapes(graph, element_bytes), {value.name for value in runtime_inputs}
    nodes, holder = _computing_nodes(graph, inputs, shapes)
    outputs = {holder[value.name] for value in graph.output if value.name in holder}
    steps = sorted(_Fusion(nodes, inputs, outputs, shapes).steps, key=lambda step: step.position)
    if not steps:
        raise UserError("the ONNX network computes nothing from its inputs; export it again")
    index = {id(step): number for number, step in enumerate(steps)}
    uses: dict[str, int] = {}
    makers: dict[str, int] = {}
    for number, step in enumerate(steps):
        for name in (*step.reads, *([step.addend] if step.addend else [])):
            uses[name] = uses.get(name, 0) | 1 << number
        if step.sum:
            uses[step.writes[0]] = 1 << index[id(step.partner)]
            makers[step.sum.writes[0]] = makers.get(step.sum.writes[0], 0) | 1 << number
        else:
            makers.update(dict.fromkeys(step.writes, 1 << number))
    needs = [0] * len(steps)
    for number, step in enumerate(steps):
        for name in (*step.reads, *([step.addend] if step.addend else [])):
            needs[number] |= makers.get(name, 0)
    sizes = {name: shapes.bytes(name) for name in {*inputs, *makers, *uses}}
    return _Graph(steps, inputs, outputs, sizes, uses, _shortcut_uses(steps, uses), needs)


def _shortcut_uses(steps: list[_Step], uses: dict[str, int]) -> dict[str, int]:
    """For each tensor, its uses as the shortcut of an addition or by a step that lies on a shortcut."""
    found: dict[str, int] = {}
    for number in reversed(range(len(steps))):
        step = steps[number]
        if step.shortcut_operand and step.shortcut_operand not in (step.reads if step.addend else ()):
            found[step.shortcut_operand] = found.get(step.shortcut_operand, 0) | 1 << number
        if step.sum and step.on_shortcut:
            found[step.writes[0]] = uses[step.writes[0]]
        results = [name for name in step.writes if uses.get(name)]
        if step.on_shortcut or (results and all(found.get(name) == uses[name] for name in results)):
            for name in step.reads:
                found[name] = found.get(name, 0) | 1 << number
    return found


@dataclass(frozen=True)
class _Run:
    """One step as it runs after a given set of steps: the tensors read, written and live, ``reused`` excluded.

    ``addend``: what a fused addition adds; ``reused``: the operand whose buffer became the result's.
    """

    reads: list[str]
    writes: list[str]
    live: frozenset[str]
    addend: str | None
    reused: str | None


def _run(graph: _Graph, policy: Policy, number: int, done: int, live: frozenset[str]) -> _Run:
    """Run a step after the steps ``done``, which leave the tensors ``live``."""
    step = graph.steps[number]
    addend, writes, overwrites = step.addend, step.writes, step.overwrites
    if step.sum and graph.uses[step.writes[0]] & done:  # the partner has run: add its result to ours
        addend, writes = step.partner.writes[0], step.sum.writes
        overwrites = [addend]
    reads = list(dict.fromkeys([*step.reads, *([addend] if addend else [])]))
    legal = (
        name
        for name in overwrites
        if (step.unary or policy == "in-place")
        and name not in graph.inputs | graph.outputs
        and not graph.remaining(name, done | 1 << number)
    )
    reused = next(legal, None)
    return _Run(reads, writes, live.union(writes) - {reused}, addend, reused)


def _after(graph: _Graph, live: frozenset[str], done: int) -> frozenset[str]:
    """What stays of the live tensors once the steps ``done`` have run."""
    return frozenset(name for name in live if name in graph.outputs or graph.remaining(name, done))


def _best_order(graph: _Graph, policy: Policy) -> tuple[list[int], bool]:
    """The steps in the order with the lowest peak, part by part; False if a part was too wide to search."""
    order, done, best = [], 0, True
    live = _after(graph, frozenset(graph.inputs), 0)
    for part in _parts(graph):
        found = _search(graph, policy, part, done, live)
        best = best and found is not None
        for number in found or part:
            run = _run(graph, policy, number, done, live)
            done |= 1 << number
            live = _after(graph, run.live, done)
            order.append(number)
    return order, best


def _parts(graph: _Graph) -> list[list[int]]:
    """Cut the steps, in the file's order, before and after each step that is comparable with every other one.

    Step k is if each earlier step has a successor up to k, and each later step a predecessor from k on.
    """
    count = len(graph.steps)
    last_need = [needs.bit_length() - 1 for needs in graph.needs]
    first_use = [count] * count
    for number in reversed(range(count)):
        needs = graph.needs[number]
        while needs:
            first_use[needs.bit_length() - 1] = number
            needs ^= 1 << (needs.bit_length() - 1)
    earliest_later = [count] * (count + 1)  # of the steps from k on, the smallest last_need
    for number in reversed(range(count)):
        earliest_later[number] = min(earliest_later[number + 1], last_need[number])
    parts, reach, fresh = [], -1, True
    for number in range(count):
        cut = reach <= number and earliest_later[number + 1] >= number
        if cut or fresh:
            parts.append([])
        parts[-1].append(number)
        reach, fresh = max(reach, first_use[number]), cut
    return parts


def _search(graph: _Graph, policy: Policy, part: list[int], done: int, live: frozenset[str]) -> list[int] | None:
    """The order of a part with the lowest peak (ties: the file's order), or None if there are too many to look at.

    Dynamic programme over the sets of steps already run: for each, the lowest peak with which it can be reached.
    """
    states = {done: (0, (), live)}
    looked_at = 0
    for _ in part:
        reached: dict[int, tuple] = {}
        for before, (peak, order, now) in states.items():
            for number in part:
                if before >> number & 1 or graph.needs[number] & ~before:
                    continue
                run = _run(graph, policy, number, before, now)
                candidate = (max(peak, graph.size(run.live)), (*order, number))
                after = before | 1 << number
                if after not in reached:
                    looked_at += len(part)
                    reached[after] = (*candidate, _after(graph, run.live, after))
                elif candidate < reached[after][:2]:
                    reached[after] = (*candidate, reached[after][2])
                if looked_at > MAX_SEARCH:
                    return None
        states = reached
    return list(next(iter(states.values()))[1])


def _walk(graph: _Graph, policy: Policy, order: list[int]) -> Iterator[LedgerStep]:
    """The ledger's lines in the order given."""
    done, live = 0, _after(graph, frozenset(graph.inputs), 0)
    for number in order:
        step, run = graph.steps[number], _run(graph, policy, number, done, live)
        held = [name for name in run.live if _is_held(graph, run, name, number, done)]
        adds = run.writes is not step.writes
        op = "+".join([*step.ops, *(step.sum.ops if adds else [])])
        size = graph.size
        yield LedgerStep(step.name, op, size(run.live), size(held), size(run.reads), size(run.writes))
        done |= 1 << number
        live = _after(graph, run.live, done)


def _is_held(graph: _Graph, run: _Run, name: str, number: int, done: int) -> bool:
    """Whether a tensor that is live during step ``number``, run after ``done``, is held by shortcuts."""
    remaining = graph.remaining(name, done)
    if name in graph.outputs or not remaining:
        return False
    only_added = name == run.addend and name not in graph.steps[number].reads and remaining == 1 << number
    return only_added or not remaining & ~graph.shortcut_uses.get(name, 0)
