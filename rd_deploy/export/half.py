"""Float16 and bfloat16 ONNX files on a CPU as hardware with these types runs them.

ONNX Runtime's CPU provider has no convolution of either: a float16 graph it computes in float32 and rounds nothing
between operators (1.32, at every optimisation level), so that overflow and rounding of activations would first be seen
on a GPU; a bfloat16 graph it refuses.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STORED, READ = "/stored", "/float32"


def with_half_storage(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 copy of `to_onnx`'s fp16 or bf16 model in which every operator's result is rounded to that type.

    This is the half type with float32 accumulation, as tensor cores do it (fused operators round less often). The casts
    are nodes of the graph, which ONNX Runtime keeps, unlike those that it inserts itself.
    """
    half = onnx.helper.get_attribute_value(model.graph.node[0].attribute[0])  # what the images are cast to
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:], copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.initializer.extend(_float32(tensor) for tensor in model.graph.initializer)
    given = {entry.name for entry in (*model.graph.initializer, *model.graph.input)}
    copy.graph.node.extend(part for node in model.graph.node for part in _rounded(node, given, half))
    return copy


def _float32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _rounded(node: onnx.NodeProto, given: set[str], half: int) -> list[onnx.NodeProto]:
    """The node on float32 operands, then its result as the half type, then that as float32 for its readers."""
    compute = onnx.NodeProto()
    compute.CopyFrom(helper.make_node("Identity", node.input, node.output) if node.op_type == "Cast" else node)
    compute.input[:] = [name if name in given else name + READ for name in node.input]
    result = node.output[0]
    return [
        compute,
        helper.make_node("Cast", [result], [result + STORED], to=half),
        helper.make_node("Cast", [result + STORED], [result + READ], to=TensorProto.FLOAT),
    ]
