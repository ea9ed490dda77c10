"""Which nodes become one step, and which networks cannot become steps."""

import pytest
from onnx import TensorProto, helper
from onnx_builder import Builder

from rd_deploy.common import UserError
from rd_deploy.memory import ledger


def ops(model) -> list[str]:
    return [step.op for step in ledger(model).steps]


def test_pointwise_operators_are_fused_unless_something_else_reads_the_result_before_them():
    for is_read in (False, True):
        builder = Builder(unfused=True)
        conv = builder.conv("image", 3, 4)
        outputs = [builder.op("Relu", conv), *([builder.op("MaxPool", conv, kernel_shape=[1, 1])] if is_read else [])]
        expected = {"Conv+BatchNormalization", "Relu", "MaxPool"} if is_read else {"Conv+BatchNormalization+Relu"}
        assert set(ops(builder.model(["N", 3, 2, 2], *outputs))) == expected


def test_a_node_without_results_is_no_step():
    builder = Builder()
    model = builder.model(["N", 4], builder.op("Relu", "image"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.append(helper.make_node("Print", ["image"], [], domain="com.example"))
    assert ops(model) == ["Relu"]


def test_control_flow_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, [1, 4])]
    )
    builder = Builder()
    builder.op("Constant", value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    y = builder.op("If", "t0", then_branch=branch, else_branch=branch)
    with pytest.raises(UserError, match="control flow"):
        ledger(builder.model(["N", 4], y))


def test_a_network_that_computes_nothing_is_refused():
    with pytest.raises(UserError, match="computes nothing"):
        ledger((builder := Builder()).model(["N", 4], builder.op("Identity", "image")))


def test_an_add_that_spreads_a_map_over_a_constant_is_a_step():
    """The constant is small, so that shape inference gets its values and nobody its shape."""
    builder = Builder()
    builder.initializers.append(helper.make_tensor("c", TensorProto.FLOAT, [1, 4, 1, 1], [1, 2, 3, 4]))
    model = builder.model(["N", 1, 2, 2], builder.op("Add", builder.op("Relu", "image"), "c"))
    assert ops(model) == ["Relu", "Add"]
    assert ledger(model, element_bytes=1).peak_bytes == 4 + 16
