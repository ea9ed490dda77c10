"""Shapes that are computed inside the network, given by the file, or unknown."""

import math
import tracemalloc

import onnx
import pytest
from onnx import TensorProto, helper
from onnx_builder import Builder

from rd_deploy.common import UserError
from rd_deploy.memory import ledger


def test_integers_keep_their_size_and_shapes_computed_from_shapes_are_constants():
    builder = Builder()
    top = builder.op("ArgMax", "image", axis=1, keepdims=1)  # int64
    shape = builder.op(
        "Concat", builder.op("Shape", "image", start=0, end=1), builder.op("Constant", value_ints=[-1]), axis=0
    )
    model = builder.model(["N", 4, 3, 3], builder.op("Reshape", top, shape))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    found = ledger(model, batch=2, element_bytes=2)
    assert [(step.op, step.live_bytes) for step in found.steps] == [("ArgMax", 2 * (4 * 9 * 2 + 9 * 8))]


def test_shapes_computed_by_arithmetic_that_onnx_does_not_infer_are_folded():
    """Reshape to (N, 2, C / 2, 3, 3), as a traced channel shuffle writes it; ONNX infers no division."""
    builder = Builder()
    shape = builder.op("Shape", builder.op("Relu", "image"))
    batch, channels = (builder.op("Gather", shape, builder.op("Constant", value_ints=[axis])) for axis in (0, 1))
    half = builder.op("Div", channels, builder.op("Constant", value_ints=[2]))
    size = builder.op("Constant", value_ints=[3, 3])
    target = builder.op("Concat", batch, builder.op("Constant", value_ints=[2]), half, size, axis=0)
    x = builder.op("Transpose", builder.op("Reshape", "t0", target), perm=[0, 2, 1, 3, 4])
    found = ledger(builder.model(["N", 6, 3, 3], x), batch=2, element_bytes=1)
    assert [(step.op, step.live_bytes) for step in found.steps] == [("Relu", 216), ("Transpose", 216)]


def test_an_operator_of_another_domain_is_a_step_with_the_shape_that_the_file_gives():
    builder = Builder()
    model = builder.model(["N", 4], builder.op("Relu", "y"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.insert(0, helper.make_node("Relu", ["image"], ["y"], domain="com.example"))
    with pytest.raises(UserError, match="shape of tensor 'y' cannot be known"):
        ledger(model)
    for batch, fits in (("N", True), (1, False), ("M", False)):
        value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])
        del model.graph.value_info[:]
        model.graph.value_info.append(value)
        if fits:
            steps = ledger(model, batch=2, element_bytes=1).steps
            assert [(step.op, step.live_bytes) for step in steps] == [("com.example.Relu", 16), ("Relu", 8)]
        else:
            with pytest.raises(UserError, match="shape of tensor 'y' cannot be known"):
                ledger(model, batch=2)


def test_a_type_that_onnx_does_not_know_is_refused():
    builder = Builder()
    model = builder.model(["N", 4], builder.op("Relu", "y"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.insert(0, helper.make_node("Relu", ["image"], ["y"], domain="com.example"))
    model.graph.value_info.append(helper.make_tensor_value_info("y", 77, ["N", 4]))
    with pytest.raises(UserError, match=r"tensor 'y' has no type that ONNX knows \(77\)"):
        ledger(model)


def test_a_batch_fixed_inside_the_network_is_refused():
    for shape in ([1, 36], [1, -1]):
        builder = Builder()
        builder.initializers.append(helper.make_tensor("shape", TensorProto.INT64, [2], shape))
        x = builder.op("Reshape", builder.op("Relu", "image"), "shape")
        model = builder.model([1, 4, 3, 3], builder.op("Gemm", x, builder.weight(36, 5)))
        assert ledger(model, element_bytes=1).peak_bytes == 2 * 36
        with pytest.raises(UserError, match="dynamic"):
            ledger(model, batch=2)


def small(builder: Builder, *shape: int) -> str:
    """A weight of ones, small enough to be given to shape inference."""
    name = f"small{next(builder.count)}"
    builder.initializers.append(helper.make_tensor(name, TensorProto.INT64, shape, [1] * math.prod(shape)))
    return name


def text(name: str) -> onnx.TensorProto:
    """64 strings, of which one is long."""
    return helper.make_tensor(name, TensorProto.STRING, [64], [b"x" * 20_000, *[b""] * 63])


HOSTILE = {
    "Where": lambda b: b.op(
        "Where", b.op("Cast", small(b, 100, 1, 1), to=TensorProto.BOOL), small(b, 1, 100, 1), small(b, 1, 1, 100)
    ),
    "Max": lambda b: b.op("Max", small(b, 100, 1, 1), small(b, 1, 100, 1), small(b, 1, 1, 100)),
    "Mul": lambda b: b.op("Mul", small(b, 1000, 1), small(b, 1, 1000)),
    "Gather": lambda b: b.op("Gather", small(b, 2, 500), small(b, 1000)),
    "Concat": lambda b: b.op("Concat", *[small(b, 1000)] * 1000, axis=0),
    "Constant": lambda b: b.op("Constant", value=text("value")),
    "strings": lambda b: b.op("Identity", b.initializers.append(text("strings")) or "strings"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_cannot_ask_for_much_memory(kind):
    """A million elements, or letters, of some kilobytes: what shapes are not made of is not computed."""
    builder = Builder()
    ones = builder.op("Constant", value_ints=[1])
    batch = builder.op("Div", builder.op("Shape", "image", start=0, end=1), ones)  # which has to be computed
    target = builder.op("Concat", batch, builder.op("Constant", value_ints=[-1]), axis=0)
    x = builder.op("Relu", builder.op("Reshape", "image", target))
    HOSTILE[kind](builder)
    model = builder.model(["N", 6, 3, 3], x)
    tracemalloc.start()
    try:
        found = ledger(model, batch=2, element_bytes=1)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    assert [(step.op, step.live_bytes) for step in found.steps] == [("Relu", 2 * 2 * 54)]
