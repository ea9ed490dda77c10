"""From an ONNX model back to a chain: the inverse of `rd_deploy.export.onnx.to_onnx`, for the engine that runs chains.

Strict: what a chain cannot say is refused, and nothing is approximated. It takes networks of Conv, BatchNormalization
(folded into its convolution), Add, Relu, MaxPool, a global average pool, and one Gemm, wherever they come from.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from rd_deploy.chain import INPUT, Chain, ChainError, Conv, GlobalAveragePool, Linear, MaxPool, Step
from rd_deploy.common import UserError, first_line
from rd_deploy.export.onnx import KEY, Metadata, read_metadata
from rd_deploy.onnx_files import fixed_batch, runtime_inputs
from rd_deploy.onnx_shapes import is_standard
from rd_deploy.preprocessing import Preprocessing


def chain_from_onnx(model: onnx.ModelProto) -> Chain:
    """The chain of a float32 model of images (N, C, H, W); a `UserError` says which node a chain has no word for.

    A file of others says nothing of preprocessing or classes: none is done, and classes are numbered.
    """
    try:
        return _read(model)
    except (ValueError, TypeError, IndexError, KeyError) as error:  # weights that do not fit their shape or their node
        raise UserError(f"the ONNX file is damaged, or not a chain ({first_line(error)}); export it again") from error


def _read(model: onnx.ModelProto) -> Chain:
    inputs = runtime_inputs(model)
    shape = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim[1:]) if len(inputs) == 1 else ()
    if len(shape) != 3:
        raise UserError("a chain has one input, images (N, C, H, W)")
    reader = _Reader(model, inputs[0].name, shape[0])
    for node in model.graph.node:
        reader.add(node)
    steps = reader.finish(model.graph.output[0].name)
    known = _metadata(model, shape, steps[-1])
    chain = Chain(steps, shape, known.preprocessing, known.classes, known.arch, name=known.name)
    try:
        chain.check()
    except ChainError as error:
        raise UserError(f"the network is no chain of known steps: {error}") from error
    return chain


def _metadata(model: onnx.ModelProto, shape: tuple[int, int, int], last: Linear) -> Metadata:
    if any(entry.key.startswith(KEY) for entry in model.metadata_props):
        return read_metadata(model)
    channels, *sides = shape
    none = Preprocessing(min(sides), min(sides), channels, (0.0,) * channels, (1.0,) * channels)
    classes = tuple(map(str, range(len(last.bias))))
    return Metadata(model.graph.name or "network", {}, none, classes, "fp32", "")


class _Reader:
    """Turns nodes, added in the file's order, into steps. ``values``: which step's result an ONNX tensor is."""

    def __init__(self, model: onnx.ModelProto, images: str, channels: int):
        self.batch, self.channels = fixed_batch(model), channels
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.values = {images: INPUT}
        self.steps: dict[str, Step] = {}
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.readers.update(value.name for value in model.graph.output)

    def add(self, node: NodeProto) -> None:
        if not is_standard(node) or node.op_type not in READERS:
            raise UserError(f"a chain has no {node.op_type} ({_name(node)})")
        if len([name for name in node.output if name]) != 1:
            raise UserError(f"a chain takes one output of {node.op_type} ({_name(node)})")
        READERS[node.op_type](self, _Node(node, self))

    def finish(self, output: str) -> tuple[Step, ...]:
        """The steps; the last one must make the network's output."""
        if not self.steps or self.values.get(output) != list(self.steps)[-1]:
            raise UserError("a chain ends with the step that gives its logits")
        steps = tuple(self.steps.values())
        if not isinstance(steps[-1], Linear):
            kind = type(steps[-1]).__name__
            raise UserError(f"a chain ends in a linear layer, this network in a {kind} ({output})")
        return steps

    def append(self, node: "_Node", step: Step) -> None:
        if step.name in self.steps or step.name == INPUT:
            raise UserError(f"two tensors of the network are named {step.name}")
        self.steps[step.name] = step
        self.values[node.output] = step.name

    def producer(self, tensor: str) -> Conv | None:
        """The convolution that makes a tensor which nothing else reads: what may become part of it."""
        step = self.steps.get(self.values.get(tensor, ""))
        return step if isinstance(step, Conv) and self.readers[tensor] == 1 else None

    def extend(self, node: "_Node", step: Conv, last: bool = False, **changes) -> None:
        """Let a convolution make the node's result as well; ``last``: it now runs after all others so far."""
        changed = replace(step, **changes)
        if last:
            del self.steps[step.name]
        self.steps[step.name] = changed
        self.values[node.output] = step.name


class _Node:
    """One node's operands and attributes, checked as they are asked for."""

    def __init__(self, proto: NodeProto, reader: _Reader):
        self.proto, self.reader, self.output = proto, reader, proto.output[0]
        self.attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}

    def refuse(self, what: str) -> UserError:
        return UserError(f"a chain has no {self.proto.op_type} {what} ({_name(self.proto)})")

    def source(self, index: int = 0) -> str:
        """The step that makes an operand."""
        name = self.proto.input[index]
        if name not in self.reader.values:
            raise self.refuse(f"of '{name}', which is no feature map")
        return self.reader.values[name]

    def weight(self, index: int) -> np.ndarray | None:
        """A constant operand, None if it is left out."""
        if len(self.proto.input) <= index or not self.proto.input[index]:
            return None
        name = self.proto.input[index]
        if name not in self.reader.weights:
            raise self.refuse(f"whose '{name}' is computed")
        return self.reader.weights[name]

    def only(self, **allowed: tuple) -> None:
        """Refuse attributes with other values; None stands for an attribute that is left out."""
        for name, values in allowed.items():
            if self.attributes.get(name) not in values:
                raise self.refuse(f"with {name}={self.attributes[name]}")

    def one_number(self, name: str, default: int) -> int:
        """A list attribute whose entries are all the same."""
        values = set(self.attributes.get(name, [default]))
        if len(values) != 1:
            raise self.refuse(f"with {name}={list(self.attributes[name])}")
        return int(values.pop())

    def weights_name(self) -> str:
        """``layer1.0.conv1`` where the weight is named layer1.0.conv1.weight, else the result's name."""
        stem, dot, part = self.proto.input[1].rpartition(".")
        return stem if dot and part == "weight" and stem not in self.reader.steps else self.output


def _conv(reader: _Reader, node: _Node) -> None:
    node.only(auto_pad=(None, b"NOTSET"), group=(None, 1), dilations=(None, [1, 1]))
    weight, bias = node.weight(1), node.weight(2)
    if weight.ndim != 4:
        raise node.refuse(f"with a weight of {weight.ndim} dimensions")
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    stride, padding = node.one_number("strides", 1), node.one_number("pads", 0)
    reader.append(node, Conv(node.weights_name(), weight, bias, stride, padding, False, node.source()))


def _batch_norm(reader: _Reader, node: _Node) -> None:
    """Folded in float64, as `rd_deploy.fold` does."""
    node.only(training_mode=(None, 0))
    conv = reader.producer(node.proto.input[0])
    if conv is None or conv.relu or conv.add:
        raise node.refuse("but right after a convolution")
    scale, shift, mean, variance = (node.weight(index).astype(np.float64) for index in (1, 2, 3, 4))
    factor = scale / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    weight = conv.weight * factor[:, None, None, None]
    reader.extend(node, conv, weight=weight, bias=(conv.bias - mean) * factor + shift)


def _add(reader: _Reader, node: _Node) -> None:
    """The convolution among the operands adds the other one; of two, the one that runs last."""
    for index in (0, 1):
        node.source(index)
    order, operands = list(reader.steps), list(node.proto.input)
    candidates = [(reader.producer(name), operands[1 - index]) for index, name in enumerate(operands)]
    candidates = [(conv, other) for conv, other in candidates if conv and not conv.relu and not conv.add]
    if not candidates:
        raise node.refuse("of anything but the result of a convolution")
    conv, other = max(candidates, key=lambda candidate: order.index(candidate[0].name))
    reader.extend(node, conv, last=True, add=reader.values[other])


def _relu(reader: _Reader, node: _Node) -> None:
    conv = reader.producer(node.proto.input[0])
    if conv is None or conv.relu:
        raise node.refuse("but right after a convolution or a sum")
    reader.extend(node, conv, relu=True)


def _max_pool(reader: _Reader, node: _Node) -> None:
    node.only(auto_pad=(None, b"NOTSET"), ceil_mode=(None, 0), dilations=(None, [1, 1]))
    kernel, stride, padding = (
        node.one_number("kernel_shape", 0),
        node.one_number("strides", 1),
        node.one_number("pads", 0),
    )
    reader.append(node, MaxPool(node.output, kernel, stride, padding, node.source()))


def _global_pool(reader: _Reader, node: _Node) -> None:
    reader.append(node, GlobalAveragePool(node.output, node.source()))


def _reduce_mean(reader: _Reader, node: _Node) -> None:
    axes = node.weight(1) if len(node.proto.input) > 1 else node.attributes.get("axes", ())
    if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        raise node.refuse(f"over the axes {list(axes)}")
    _global_pool(reader, node)


def _flatten(reader: _Reader, node: _Node) -> None:
    node.only(axis=(None, 1))
    _flat(reader, node)


def _reshape(reader: _Reader, node: _Node) -> None:
    """(N, C, 1, 1) to (N, C), however it is written."""
    shape = [] if node.weight(1) is None else node.weight(1).tolist()
    node.only(allowzero=(None, 0))
    if len(shape) != 2 or shape.count(-1) > 1 or shape[0] not in (0, -1, reader.batch):
        raise node.refuse(f"to {shape}")
    channels = _channels(reader, node.source())
    if shape[1] not in (-1, channels):
        raise node.refuse(f"of {channels} channels to {shape}")
    _flat(reader, node)


def _flat(reader: _Reader, node: _Node) -> None:
    """The pool gives (N, C) already; it takes the name of what flattens it, as `to_onnx` names it."""
    pool = reader.steps.get(node.source())
    if not isinstance(pool, GlobalAveragePool):
        raise node.refuse("but right after the global pool")
    if reader.readers[node.proto.input[0]] == 1:
        del reader.steps[pool.name]
        pool = replace(pool, name=node.output)
        reader.steps[pool.name] = pool
    reader.values[node.output] = pool.name


def _channels(reader: _Reader, name: str) -> int:
    """Channels of a step's result, those of the convolution behind the pools."""
    step = reader.steps.get(name)
    while isinstance(step, MaxPool | GlobalAveragePool):
        step = reader.steps.get(step.source)
    return len(step.bias) if step else reader.channels


def _gemm(reader: _Reader, node: _Node) -> None:
    node.only(transA=(None, 0), alpha=(None, 1.0), beta=(None, 1.0))
    weight = node.weight(1) if node.attributes.get("transB", 0) else node.weight(1).T
    bias = node.weight(2)
    bias = np.zeros(len(weight), np.float32) if bias is None else np.broadcast_to(bias.reshape(-1), (len(weight),))
    reader.append(node, Linear(node.weights_name(), weight, bias, node.source()))


def _identity(reader: _Reader, node: _Node) -> None:
    """Another name, of a weight too: exporters share equal weights this way."""
    name = node.proto.input[0]
    if name in reader.weights:
        reader.weights[node.output] = reader.weights[name]
    else:
        reader.values[node.output] = node.source()
        reader.readers[node.output] += reader.readers[name] - 1  # whoever reads the other name counts


def _constant(reader: _Reader, node: _Node) -> None:
    if "value" not in node.attributes:
        raise node.refuse("but of a tensor")
    reader.weights[node.output] = numpy_helper.to_array(node.attributes["value"])


READERS: dict[str, Callable[[_Reader, _Node], None]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Add": _add,
    "Relu": _relu,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce_mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Gemm": _gemm,
    "Identity": _identity,
    "Constant": _constant,
}


def _name(node: NodeProto) -> str:
    return node.name or node.output[0]
