"""PyTorch eager on the CPU: a small interpreter that runs an ONNX graph with torch's own operators.

The graph is translated once into a list of calls. Convolution weights are channels-last; an activation or an addition
writes into its operand when nothing else reads it, which is what ``nn.ReLU(inplace=True)`` and ``x += shortcut`` do in
a hand-written network; a tensor is let go after its last reader.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from rd_deploy.common import require
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported, image_input


@dataclass(frozen=True)
class Call:
    """``outputs = function(*inputs)``; ``dying`` are the names nobody reads afterwards."""

    function: Callable
    inputs: tuple[str, ...]
    output: str
    dying: tuple[str, ...]


class TorchSession(Session):
    """An ONNX graph as a list of torch calls in float32 or bfloat16 (weights and activations)."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        self._torch = _torch()
        self._dtype = self._torch.bfloat16 if precision == "bf16" else self._torch.float32
        self._input, self._output = image_input(model).name, model.graph.output[0].name
        self._calls = translate(model, self._dtype)

    def _run(self, images: np.ndarray) -> np.ndarray:
        torch = self._torch
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            return self._forward({self._input: self._images(images)}).float().numpy()

    def _images(self, images: np.ndarray):
        """The caller's memory where its layout fits, else a copy, which dies after its last reader."""
        return self._torch.from_numpy(images).to(self._dtype, memory_format=self._torch.channels_last)

    def _forward(self, live: dict, after_call: Callable[[dict], None] | None = None):
        return run_calls(self._calls, live, self._output, after_call)

    def _feature_maps(self) -> tuple[Figure, ...]:
        """Tensors and allocations of a run, without the input, which is the caller's."""
        x = self._torch.zeros(self.shape, dtype=self._dtype).contiguous(memory_format=self._torch.channels_last)
        with self._torch.inference_mode():
            return self._tensors(x), self._allocator(x)

    def _tensors(self, x) -> Figure:
        """Bytes of the storages alive after an operator, each counted once."""
        totals = []

        def count(live: dict) -> None:
            storages = (tensor.untyped_storage() for name, tensor in live.items() if name != self._input)
            totals.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))

        self._forward({self._input: x}, count)
        return Figure("torch tensors", max(totals), "most bytes of tensors alive after an operator")

    def _allocator(self, x) -> Figure:
        """Running sum of what the profiler saw allocated and freed, within operators too."""
        profiler = self._torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self._forward({self._input: x})
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        if not changes:
            return Figure("torch allocator", None, "torch's profiler recorded no allocations")
        how = "most bytes allocated at once, with the operators' scratch, such as packed weights"
        return Figure("torch allocator", int(np.cumsum(changes).max()), how)


class Torch(Engine):
    """PyTorch eager, channels-last."""

    name = "torch"
    package = "torch"
    extra = "train"

    def missing(self) -> str | None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports missing GPUs on stderr
        return super().missing()

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return TorchSession(self, model, precision, threads, batch)


def _torch():
    return require("torch", "train")


def run_calls(calls: list[Call], live: dict, output: str, after_call: Callable[[dict], None] | None = None):
    """Run the calls on ``live`` (name to tensor); ``after_call`` sees it before what died is let go."""
    for call in calls:
        live[call.output] = call.function(*(live[name] for name in call.inputs))
        if after_call:
            after_call(live)
        for name in call.dying:
            live.pop(name)
    return live[output]


def translate(model: onnx.ModelProto, dtype, device="cpu") -> list[Call]:
    """An ONNX graph as calls, its weights on ``device``; what has no translation raises `Unsupported`."""
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            weights[node.output[0]] = _constant(node)
        elif node.op_type == "Identity" and node.input[0] in weights:  # exporters share equal weights this way
            weights[node.output[0]] = weights[node.input[0]]
        else:
            nodes.append(node)
    readers = Counter(name for node in nodes for name in set(node.input) if name and name not in weights)
    readers[graph.output[0].name] += 1
    owned: set[str] = set()  # buffers no one else may see: an in-place call may overwrite them
    calls = []
    for node in nodes:
        calls.append(_call(node, weights, readers, owned, dtype, device))
    return calls


def _call(node, weights: dict, readers: Counter, owned: set[str], dtype, device) -> Call:
    if node.op_type not in TRANSLATIONS:
        raise Unsupported(f"the torch engine does not translate the ONNX operator {node.op_type}")
    if len([name for name in node.output if name]) != 1:
        raise Unsupported(f"the torch engine takes one output of {node.op_type}")
    dynamic = tuple(name for name in node.input if name and name not in weights)
    if not dynamic:
        raise Unsupported(f"the torch engine does not compute {node.op_type} of constants: fold them first")
    for name in set(dynamic):
        readers[name] -= 1
    free = [name for name in dynamic if readers[name] == 0 and name in owned]
    function = TRANSLATIONS[node.op_type](_Node(node, weights, dtype, device), dynamic, free)
    if node.op_type not in VIEWS or free:
        owned.add(node.output[0])
    else:  # two live names for one buffer: neither may be overwritten
        owned.difference_update(dynamic)
    return Call(function, dynamic, node.output[0], tuple(name for name in set(dynamic) if readers[name] == 0))


def _constant(node) -> np.ndarray:
    for attribute in node.attribute:
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
    raise Unsupported("the torch engine reads Constant nodes with a tensor value only")


class _Node:
    """Attributes and constant operands of one ONNX node."""

    def __init__(self, node, weights: dict, dtype, device):
        self.inputs, self.weights, self.dtype, self.device = list(node.input), weights, dtype, device
        self.attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        self.op_type = node.op_type

    def get(self, name: str, default=None):
        return self.attributes.get(name, default)

    def only(self, name: str, allowed: tuple) -> None:
        """Refuse an attribute whose value is not among the translated ones; None stands for absent."""
        value = self.get(name)
        if value not in allowed:
            raise Unsupported(f"the torch engine does not translate {self.op_type} with {name}={value}")

    def has(self, index: int) -> bool:
        return len(self.inputs) > index and bool(self.inputs[index])

    def array(self, index: int) -> np.ndarray:
        if not self.has(index) or self.inputs[index] not in self.weights:
            raise Unsupported(f"the torch engine needs input {index} of {self.op_type} to be constant")
        return self.weights[self.inputs[index]]

    def tensor(self, index: int):
        return _torch().from_numpy(np.array(self.array(index))).to(self.device, self.dtype)

    def pads(self) -> list[int]:
        """Symmetric spatial padding (torch's form); ONNX lists all begins, then all ends."""
        self.only("auto_pad", (None, b"NOTSET"))
        pads = list(self.get("pads", [0, 0, 0, 0]))
        if pads[:2] != pads[2:]:
            raise Unsupported(f"the torch engine does not translate {self.op_type} with asymmetric padding {pads}")
        return pads[:2]


def _conv(node: _Node, dynamic, free):
    torch = _torch()
    weight = node.tensor(1).contiguous(memory_format=torch.channels_last)
    bias = node.tensor(2) if node.has(2) else None
    stride, dilation, groups = node.get("strides", [1, 1]), node.get("dilations", [1, 1]), node.get("group", 1)
    padding, conv2d = node.pads(), torch.nn.functional.conv2d
    return lambda x: conv2d(x, weight, bias, stride, padding, dilation, groups)


def _batch_norm(node: _Node, dynamic, free):
    """Inference statistics as one scale and shift per channel, computed in float64."""
    node.only("training_mode", (None, 0))
    scale, shift, mean, variance = (node.array(index).astype(np.float64) for index in (1, 2, 3, 4))
    scale = scale / np.sqrt(variance + node.get("epsilon", 1e-5))
    torch = _torch()
    factor, offset = (
        torch.from_numpy(values.reshape(1, -1, 1, 1)).to(node.device, node.dtype)
        for values in (scale, shift - mean * scale)
    )
    return lambda x: torch.addcmul(offset, x, factor)


def _relu(node: _Node, dynamic, free):
    return _torch().relu_ if free else _torch().relu


def _add(node: _Node, dynamic, free):
    torch = _torch()
    if len(dynamic) == 1:
        constant = node.tensor(0 if node.inputs[1] == dynamic[0] else 1)
        return lambda x: x + constant
    first, second = dynamic
    if first in free:
        return lambda x, y: x.add_(y) if x.shape == y.shape else x + y
    if second in free:
        return lambda x, y: y.add_(x) if x.shape == y.shape else x + y
    return torch.add


def _max_pool(node: _Node, dynamic, free):
    node.only("ceil_mode", (None, 0))
    kernel, stride, padding = node.get("kernel_shape"), node.get("strides", [1, 1]), node.pads()
    dilation, pool = node.get("dilations", [1, 1]), _torch().nn.functional.max_pool2d
    return lambda x: pool(x, kernel, stride, padding, dilation)


def _average_pool(node: _Node, dynamic, free):
    node.only("ceil_mode", (None, 0))
    kernel, stride, padding = node.get("kernel_shape"), node.get("strides", [1, 1]), node.pads()
    counted, pool = bool(node.get("count_include_pad", 0)), _torch().nn.functional.avg_pool2d
    return lambda x: pool(x, kernel, stride, padding, False, counted)


def _global_average_pool(node: _Node, dynamic, free):
    return lambda x: x.mean(dim=(2, 3), keepdim=True)


def _reduce_mean(node: _Node, dynamic, free):
    axes = [int(axis) for axis in (node.array(1) if node.has(1) else node.get("axes", ()))]
    if not axes:
        raise Unsupported("the torch engine needs the axes of ReduceMean")
    keep = bool(node.get("keepdims", 1))
    return lambda x: x.mean(dim=axes, keepdim=keep)


def _flatten(node: _Node, dynamic, free):
    node.only("axis", (None, 1))
    return lambda x: x.flatten(1)


def _reshape(node: _Node, dynamic, free):
    """Only (N, ...) to (N, -1): the batch may be written as 0 (copy), or as a number next to a -1."""
    shape = [int(size) for size in node.array(1)]
    if len(shape) != 2:
        raise Unsupported(f"the torch engine translates Reshape to two dimensions only, not {shape}")
    return lambda x: x.reshape([x.shape[0] if size == 0 else size for size in shape])


def _gemm(node: _Node, dynamic, free):
    node.only("transA", (None, 0))
    node.only("alpha", (None, 1.0))
    node.only("beta", (None, 1.0))
    weight = node.tensor(1) if node.get("transB", 0) else node.tensor(1).t().contiguous()
    bias, linear = node.tensor(2).reshape(-1) if node.has(2) else None, _torch().nn.functional.linear
    return lambda x: linear(x, weight, bias)


def _matmul(node: _Node, dynamic, free):
    weight, linear = node.tensor(1).t().contiguous(), _torch().nn.functional.linear
    return lambda x: linear(x, weight)


def _identity(node: _Node, dynamic, free):
    return lambda x: x


VIEWS = ("Flatten", "Reshape", "Identity", "Dropout")
TRANSLATIONS = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Relu": _relu,
    "Add": _add,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Identity": _identity,
    "Dropout": _identity,
}
