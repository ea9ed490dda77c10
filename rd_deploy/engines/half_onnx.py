"""The ONNX file that libraries on a GPU get: one half type from the images to the logits, in our engines' layout."""

import onnx
from onnx import helper

from rd_deploy.chain import INPUT
from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError
from rd_deploy.engines.base import Unsupported
from rd_deploy.export.files import OUTPUT
from rd_deploy.export.onnx import DTYPES, to_onnx


def half_onnx(model: onnx.ModelProto, batch: int, precision: str = "fp16") -> onnx.ModelProto:
    """A float32 network in fp16 or bf16: ``images`` (N, H, W, C) to ``logits`` (N, classes), N = ``batch``.

    It is `to_onnx` without the casts at its ends, and with a transposition in place of the first: the images lie
    channels-last in memory, and the libraries drop a transposition into the layout that they choose themselves.
    Raises `Unsupported` for a network that is no chain, or whose weights the type cannot hold.
    """
    try:
        half = to_onnx(chain_from_onnx(model), precision)
    except UserError as reason:
        raise Unsupported(f"no {precision} ONNX file of this network: {reason}") from reason
    graph, element = half.graph, DTYPES[precision][1]
    first, last = graph.node[0], graph.node[-1]
    channels, height, width = (dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[1:])
    nodes = list(graph.node)[1:-1]
    for node in nodes:
        node.output[:] = [OUTPUT if name == last.input[0] else name for name in node.output]
    reorder = helper.make_node("Transpose", [INPUT], first.output, "to_nchw", perm=[0, 3, 1, 2])
    plain = helper.make_graph(
        [reorder, *nodes],
        graph.name,
        [helper.make_tensor_value_info(INPUT, element, [batch, height, width, channels])],
        [helper.make_tensor_value_info(OUTPUT, element, [batch, count_classes(half)])],
        graph.initializer,
    )
    made = helper.make_model(plain, opset_imports=half.opset_import, ir_version=half.ir_version)
    onnx.checker.check_model(made, full_check=True)
    return made


def count_classes(model: onnx.ModelProto) -> int:
    """The columns of a model's logits (N, classes)."""
    return model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
