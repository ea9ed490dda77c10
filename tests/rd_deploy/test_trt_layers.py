"""The builder's account of its layers: what is read from it, on lines as TensorRT-RTX 1.7 writes them."""

import pytest

from rd_deploy.trt.layers import Layer, Tensor, parse_layers

NHWC = "Format: (NHWC) Channel major format }"
CONVOLUTION = (
    "Name: layer1.0.conv2/conv_U2_myl0_4, LayerType: correlation, Inputs: [ { Name: layer1.0.conv2.1_5_myl0, "
    f"Dimensions: [-1,64,56,56], Strides: [200704,1,3584,64], StrideOrder: [3,0,2,1], Datatype: Half, {NHWC}, "
    "{ Name: sum, Dimensions: [8,256,56,56], Strides: [802816,1,14336,256], StrideOrder: [3,0,2,1], Datatype: Float, "
    f"{NHWC}], Constants: [ {{ Name: w, Dimensions: [64,64,3,3], Strides: [1], StrideOrder: [0], Datatype: Int8, "
    f"{NHWC}], "
    "Outputs: [ { Name: next, Dimensions: [-1,64,56,56], Strides: [200704,1,3584,64], StrideOrder: [3,0,2,1], "
    f"Datatype: Half, {NHWC}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: "
    "[ONNX Layer: layer1.0.conv2/conv][ONNX Layer: layer1.0.conv2/relu]"
)
EMPTY = "Name: call, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata: "


def test_a_layer():
    (layer,) = parse_layers([f"Layers:\n{CONVOLUTION}\n\nI/O Tensors:\n Name: images, IOMode: Input"])
    assert layer == Layer(
        "layer1.0.conv2/conv_U2_myl0_4",
        "correlation",
        (Tensor("layer1.0.conv2.1_5_myl0", (-1, 64, 56, 56), "Half"), Tensor("sum", (8, 256, 56, 56), "Float")),
        (Tensor("next", (-1, 64, 56, 56), "Half"),),
        ("layer1.0.conv2/conv", "layer1.0.conv2/relu"),
    )
    assert layer.to_dict()["reads"] == ["Half", "Float"]


def test_layers_stand_in_one_message_among_others():
    messages = ["Parsing", f"Layers:\n{CONVOLUTION}\n{EMPTY}\n", CONVOLUTION, "Total Activation Memory: 5 bytes"]
    assert [layer.kind for layer in parse_layers(messages)] == ["correlation", "shape_call"]
    assert parse_layers([]) == parse_layers(["Layers:\nName: something else"]) == ()


@pytest.mark.parametrize(
    ("name", "kind", "copies"),
    [
        ("__myl_Move_myl0_0", "kgen", True),
        ("__myl_CastConc_myl0_0", "kgen", True),
        ("__myl_Tran_myl0_51", "kgen", True),
        ("__myl_Mean_myl0_52", "kgen", False),
        ("__myl_AddReluMoveReshMean_myl0_51", "kgen", False),
        ("__myl_FcAddRelu_myl0_24", "runtime_fusion", False),
        ("layer1.0.conv2/conv_U2_myl0_4", "correlation", False),
        ("Reformatting CopyNode for Input Tensor 0", "Reformat", True),
    ],
)
def test_what_only_copies(name, kind, copies):
    assert Layer(name, kind, (), (), ()).is_reformat == copies
