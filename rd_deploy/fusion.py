"""From ONNX nodes to fused steps: what an engine runs as one kernel is one step.

A convolution (or another product) is one step together with its batch normalisation, activation and residual addition.
Views (reshape, flatten, dropout) are no steps. Operators that are not known here are one step each.
"""

from dataclasses import dataclass, field

import onnx

from rd_deploy.common import UserError
from rd_deploy.onnx_shapes import SHAPE_ONLY, Shapes, is_standard

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
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
        return self.proto.op_type if is_standard(self.proto) else f"{self.proto.domain}.{self.proto.op_type}"


@dataclass
class Sum:
    """A residual addition of the results of two products: whichever runs last does it."""

    ops: list[str]
    writes: list[str]


@dataclass
class Step:
    """A node and what is fused into it. ``reads`` excludes ``addend``, the tensor that a fused addition adds."""

    name: str
    ops: list[str]
    position: int
    reads: list[str]
    writes: list[str]
    unary: bool = False  # pointwise in one operand, which it may overwrite under every policy
    overwrites: list[str] = field(default_factory=list)  # operands whose buffer may become the result's
    addend: str | None = None
    sum: Sum | None = None
    partner: "Step | None" = None  # the other product of `sum`
    on_shortcut: bool = False
    shortcut_operand: str | None = None  # of an addition in this step

    @property
    def operands(self) -> list[str]:
        return [*self.reads, *([self.addend] if self.addend else [])]

    @property
    def can_add(self) -> bool:
        return self.ops[0] in PRODUCTS and self.addend is None and self.sum is None


def fuse(graph: onnx.GraphProto, inputs: set[str], shapes: Shapes) -> tuple[list[Step], set[str]]:
    """The fused steps of an inferred graph in the file's order, and the tensors that hold the network's outputs."""
    nodes, holder = _computing_nodes(graph, inputs, shapes)
    outputs = {holder[value.name] for value in graph.output if value.name in holder}
    steps = sorted(_Fusion(nodes, inputs, outputs, shapes).steps, key=lambda step: step.position)
    if not steps:
        raise UserError("the ONNX network computes nothing from its inputs; export it again")
    return steps, outputs


def _computing_nodes(graph: onnx.GraphProto, inputs: set[str], shapes: Shapes) -> tuple[list[_Node], dict[str, str]]:
    """The nodes that compute on feature maps, and for each feature map the tensor that holds its data (views share)."""
    holder, nodes = {name: name for name in inputs}, []
    for position, proto in enumerate(graph.node):
        if any(attribute.HasField("g") or attribute.graphs for attribute in proto.attribute):
            what = f"control flow ({proto.op_type})"
            raise UserError(f"the ONNX network has {what}, which the memory ledger cannot follow")
        operands = list(dict.fromkeys(holder[name] for name in proto.input if name in holder))
        node = _Node(proto, position, operands, [name for name in proto.output if name])
        if not operands or not node.outputs or node.op in SHAPE_ONLY:
            continue  # its results are constants, or none
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

    def __init__(self, nodes: list[_Node], inputs: set[str], outputs: set[str], shapes: Shapes):
        self.steps: list[Step] = []
        self._shapes = shapes
        self._depth = dict.fromkeys(inputs, 0)  # of a tensor: the most steps between it and the network's inputs
        self._maker: dict[str, Step | Sum] = {}  # what a further pointwise operator on a tensor is fused into
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
        one_to_one = len(node.operands) == len(node.outputs) == 1
        return pointwise and one_to_one and self._fits(node.operands[0], node.outputs[0])

    def _is_residual(self, node: _Node) -> bool:
        if node.op != "Add" or len(node.operands) != 2:  # a constant's shape may be unknown, and need not be known
            return False
        return len({self._shapes.dims(name) for name in (*node.proto.input, *node.proto.output)}) == 1

    def _new_step(self, node: _Node, **changes) -> Step:
        name = node.proto.name or node.outputs[0]
        step = Step(name, [node.op], node.position, list(node.operands), list(node.outputs), **changes)
        self.steps.append(step)
        depth = 1 + max(self._depth[operand] for operand in node.operands)
        self._depth.update(dict.fromkeys(node.outputs, depth))
        if node.op in PRODUCTS:
            self._maker[node.outputs[0]] = step
        return step

    def _fuse(self, maker: Step | Sum, node: _Node) -> None:
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

    def _product(self, name: str) -> Step | None:
        """The step that makes a tensor, if it can add and the tensor has no other reader."""
        maker = self._maker.get(name)
        return maker if isinstance(maker, Step) and maker.can_add and self._readers[name] == 1 else None

    def _join(self, first: Step, second: Step, node: _Node, shortcut: str) -> None:
        total = Sum([], [shortcut])
        for step, partner in ((first, second), (second, first)):
            step.sum, step.partner = total, partner
            step.on_shortcut = step.writes[0] == shortcut
        self._fuse(total, node)
