"""ONNX networks built by hand, for the tests of what reads them."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from rd_deploy.memory import Ledger, ledger

UNIT = 64 * 56 * 56  # elements of one map of a ResNet's first stage at 224x224

DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


class Builder:
    """Writes ONNX graphs by hand. Weights are ConstantOfShape nodes: full-size shapes, files of a few kilobytes."""

    def __init__(self, unfused: bool = False, data_type: int = TensorProto.FLOAT):
        self.nodes, self.initializers, self.unfused, self.data_type = [], [], unfused, data_type
        self.count = itertools.count()

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes) -> str:
        names = [f"t{next(self.count)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names[0]

    def weight(self, *shape: int) -> str:
        name = f"w{next(self.count)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))
        return self.op("ConstantOfShape", name, value=helper.make_tensor("v", self.data_type, [1], [0]))

    def conv(self, x: str, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, name: str = "") -> str:
        weights = [self.weight(c_out, c_in, kernel, kernel)]
        weights += [] if self.unfused else [self.weight(c_out)]
        x = self.op("Conv", x, *weights, name=name, strides=[stride] * 2, pads=[kernel // 2] * 4)
        return self.op("BatchNormalization", x, *(self.weight(c_out) for _ in range(4))) if self.unfused else x

    def model(self, shape: Sequence, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("image", self.data_type, shape)],
            [helper.make_tensor_value_info(name, self.data_type, ["N"]) for name in outputs],
            self.initializers,
        )
        for value in graph.output:  # of unknown rank is not valid ONNX; of unknown dimensions is
            del value.type.tensor_type.shape.dim[:]
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network(
    depth: int,
    shortcuts: bool,
    unfused: bool = False,
    batch: int | str = "N",
    swap: bool = False,
    base: int = 64,
    **options,
) -> onnx.ModelProto:
    """A ResNet v1.5 of 224x224 images, or its plain counterpart. ``swap``: the projection comes first in the file."""
    block, counts = DEPTHS[depth]
    builder = Builder(unfused, **options)
    x = builder.op("Relu", builder.conv("image", 3, base, 7, 2, name="stem"))
    x = builder.op("MaxPool", x, name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    c_in = base
    for stage, count in enumerate(counts):
        width = base << stage
        c_out = width * (4 if block == "bottleneck" else 1)
        for number in range(count):
            stride, name = 2 if number == 0 and stage else 1, f"layer{stage + 1}.{number}"
            project = shortcuts and (stride > 1 or c_in != c_out)
            shortcut = builder.conv(x, c_in, c_out, 1, stride, f"{name}.downsample") if project and swap else x
            if block == "bottleneck":
                y = builder.op("Relu", builder.conv(x, c_in, width, name=f"{name}.reduce"))
                y = builder.op("Relu", builder.conv(y, width, width, 3, stride, name=f"{name}.conv3x3"))
                y = builder.conv(y, width, c_out, name=f"{name}.expand")
            else:
                y = builder.op("Relu", builder.conv(x, c_in, width, 3, stride, name=f"{name}.conv1"))
                y = builder.conv(y, width, c_out, 3, name=f"{name}.conv2")
            if project and not swap:
                shortcut = builder.conv(x, c_in, c_out, 1, stride, f"{name}.downsample")
            x = builder.op("Relu", builder.op("Add", y, shortcut) if shortcuts else y)
            c_in = c_out
    x = builder.op("Flatten", builder.op("GlobalAveragePool", x))
    x = builder.op("Gemm", x, builder.weight(1000, c_in), builder.weight(1000), transB=1)
    return builder.model([batch, 3, 224, 224], x)


def elements(depth: int, shortcuts: bool, policy: str, **options) -> Ledger:
    """A ledger that counts elements: one byte each."""
    return ledger(network(depth, shortcuts, **options), element_bytes=1, policy=policy)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
