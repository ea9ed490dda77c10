"""Real builds by TensorRT-RTX, without a GPU: what is built, how large it plans to be, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chains import bottlenecks
from onnx import TensorProto, helper

from rd_deploy.common import UserError
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import chain_from_name
from rd_deploy.memory import ledger
from rd_deploy.trt.build import Built, Profile, build, choose_targets
from rd_deploy.trt.flavours import Flavour, load_flavour

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here (it has wheels for x86-64 only)")

TARGET = ("sm89",)
CONVOLUTIONS = {"plain50": 49, "resnet50": 53}
BYTES = {"fp32": 4, "fp16": 2}


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return load_flavour("rtx")


@pytest.fixture(scope="module")
def chains() -> dict:
    return {name: chain_from_name(name) for name in CONVOLUTIONS}


@pytest.fixture(scope="module")
def built(rtx, chains):
    """A function from a network, a precision and batch sizes to its engine, each built once."""
    models: dict[tuple, bytes] = {}
    engines: dict[tuple, Built] = {}

    def get(name: str, precision: str = "fp32", batch: str = "8") -> Built:
        if (name, precision) not in models:
            models[name, precision] = to_onnx(chains[name], precision).SerializeToString()
        key = (name, precision, batch)
        if key not in engines:
            engines[key] = build(models[name, precision], rtx, Profile.parse(batch), TARGET)
        return engines[key]

    return get


@pytest.fixture(scope="module")
def small() -> bytes:
    return to_onnx(bottlenecks()).SerializeToString()


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_engine_holds_the_weights_and_plans_for_the_maps(built, chains, name, precision):
    engine = built(name, precision)
    weights = chains[name].parameters() * BYTES[precision]
    assert weights <= engine.weight_bytes <= 1.02 * weights  # channels are padded
    assert weights <= len(engine.content) <= 1.1 * weights
    least = ledger(to_onnx(chains[name]), 8, BYTES[precision], "in-place").peak_bytes
    assert least <= engine.activation_bytes <= 3 * least


@pytest.mark.parametrize("precision", BYTES)
def test_a_plain_network_needs_less_activation_memory(built, precision):
    assert built("resnet50", precision).activation_bytes > 1.25 * built("plain50", precision).activation_bytes


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_committed_table_says_what_the_builder_says(rtx, built, name, precision):
    (path, *_) = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*/*-trt-memory.json"), reverse=True)
    table = json.loads(path.read_text())
    if table["builder"] != rtx.title:
        pytest.skip(f"the table is of {table['builder']}, here is {rtx.title}")
    key = {"network": name, "precision": precision, "profile": [8, 8, 8]}
    (row,) = [row for row in table["rows"] if key.items() <= row.items()]
    engine = built(name, precision)
    assert (row["activation_bytes"], row["weight_bytes"]) == (engine.activation_bytes, engine.weight_bytes)
    assert row["layers"] == len(engine.layers)


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_everything_is_fused_into_one_layer_for_each_convolution(built, chains, name, precision):
    nodes = to_onnx(chains[name]).graph.node
    convolutions, pointwise, adds = (
        {node.name for node in nodes if node.op_type in kinds} for kinds in (("Conv",), ("Relu", "Add"), ("Add",))
    )
    computing = [set(layer.onnx) for layer in built(name, precision).layers if not layer.is_reformat]
    owners = [names for names in computing if names & convolutions]
    assert len(owners) == len(convolutions) == CONVOLUTIONS[name]
    assert all(len(names & convolutions) == 1 for names in owners)
    assert pointwise <= set().union(*owners)
    assert len(adds) == (16 if name == "resnet50" else 0)
    assert len(computing) - len(owners) == 3  # max-pooling, mean, classifier


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "Float"), ("fp16", "Half")])
def test_convolutions_run_in_the_precision_of_the_file(built, precision, dtype):
    layers = [layer for layer in built("plain50", precision).layers if layer.kind == "correlation"]
    assert {layer.inputs[0].dtype for layer in layers} == {dtype}


BUILD_BOTH = """
import hashlib, sys
from pathlib import Path
from rd_deploy.trt.build import Profile, build
from rd_deploy.trt.flavours import load_flavour
for path in sys.argv[1:]:
    for profile in (Profile(8, 8, 8), Profile(1, 8, 32)):
        engine = build(Path(path).read_bytes(), load_flavour("rtx"), profile, ("sm89",))
        print(hashlib.sha256(engine.content).hexdigest())
"""


def test_the_same_files_give_the_same_engines_in_every_process(chains, tmp_path):
    """In one process a second engine of a range of batches has other internal names: its builder counts on."""
    paths = [tmp_path / f"{name}.onnx" for name in chains]
    for path, chain in zip(paths, chains.values(), strict=True):
        path.write_bytes(to_onnx(chain, "fp16").SerializeToString())
    command = [sys.executable, "-c", BUILD_BOTH, *map(str, paths)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def test_a_range_of_batches_takes_no_less_memory_than_its_largest_alone(built):
    assert built("plain50", "fp16", "1:4:8").activation_bytes >= built("plain50", "fp16", "8").activation_bytes
    maps = {tensor.shape[0] for layer in built("plain50", "fp16", "8").layers for tensor in layer.inputs}
    assert maps == {8}


def test_several_targets_and_each_that_the_flavour_offers(rtx, small):
    everything = choose_targets(rtx, None, "fp32", None)
    assert everything[0] == "sm80"
    assert (
        build(small, rtx, Profile(1, 1, 1), everything).content != build(small, rtx, Profile(1, 1, 1), TARGET).content
    )


# --- what is refused


def graph(nodes: list, inputs: tuple = (4, 4)) -> bytes:
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *inputs])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    made = helper.make_model(
        helper.make_graph(nodes, "g", [value], [result]), opset_imports=[helper.make_opsetid("", 17)]
    )
    return made.SerializeToString()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no output"),
        (b"no protobuf at all" * 9, "Failed to parse the ONNX model"),
        (graph([helper.make_node("NoSuchOperator", ["images"], ["logits"], "bad")]), "NoSuchOperator"),
    ],
    ids=["empty", "garbage", "operator"],
)
def test_a_file_that_cannot_be_parsed(rtx, content, reason):
    with pytest.raises(UserError, match=reason) as error:
        build(content, rtx, Profile(1, 1, 1), TARGET)
    assert "TensorRT-RTX" in str(error.value)
    assert "\n" not in str(error.value)
    assert "driver" not in str(error.value)


def test_what_the_builder_cannot_do_is_its_first_error(rtx, small):
    with pytest.raises(UserError, match="FP32 GEMM is not supported") as error:
        build(small, rtx, Profile(1, 1, 1), ("sm75",))
    assert "catchCudaError" not in str(error.value)


@pytest.mark.parametrize("text", ["0", "1:2", "2:1:3", "1:8:5000", "a", "1:8:", "-1", "1:8:32:64", "", "٣"])
def test_batch_sizes_that_make_no_sense(text):
    with pytest.raises(UserError, match="batch"):
        Profile.parse(text)


def test_batch_sizes():
    assert Profile.parse("1:8:32") == Profile(1, 8, 32)
    assert Profile.parse("8") == Profile(8, 8, 8)
    assert Profile.from_list(Profile(1, 8, 32).to_list()) == Profile(1, 8, 32)
    assert str(Profile(1, 8, 32)) == "1:8:32"
    for bad in (None, [1, 2], [1, 2, "3"], [True, 2, 3], [3, 2, 1]):
        with pytest.raises(UserError):
            Profile.from_list(bad)


# --- targets


def test_targets_of_rtx(rtx):
    assert choose_targets(rtx, ("sm120", "sm89", "sm89"), "fp16", None) == ("sm89", "sm120")
    assert choose_targets(rtx, None, "fp16", "sm86") == ("sm86",)
    assert choose_targets(rtx, ("sm75",), "fp16", None) == ("sm75",)
    assert choose_targets(rtx, None, "fp8", None)[0] == "sm89"


@pytest.mark.parametrize(
    ("wanted", "precision", "gpu", "reason"),
    [
        (("sm90",), "fp32", None, "no target sm90; it has sm75"),
        (("89",), "fp32", None, "no target 89"),
        (("",), "fp32", None, "no target"),
        (None, "fp32", "sm90", "no target sm90, the GPU here"),
        (("sm86", "sm89"), "fp8", None, "fp8 needs sm89 or later, not sm86"),
        (("sm75",), "bf16", None, "bf16 needs sm80 or later, not sm75"),
    ],
)
def test_targets_that_rtx_cannot_build_for(rtx, wanted, precision, gpu, reason):
    with pytest.raises(UserError, match=reason):
        choose_targets(rtx, wanted, precision, gpu)


def test_targets_of_enterprise_tensorrt():
    """It has no list of them: it builds for the GPU that it runs on."""
    enterprise = Flavour("tensorrt", SimpleNamespace(__version__="11.4"))
    assert choose_targets(enterprise, None, "fp16", "sm90") == ("sm90",)
    assert choose_targets(enterprise, ("sm90",), "fp16", "sm90") == ("sm90",)
    with pytest.raises(UserError, match="has no target sm89: it builds for the GPU that is here"):
        choose_targets(enterprise, ("sm89",), "fp16", "sm90")
    with pytest.raises(UserError, match="fp8 needs sm89"):
        choose_targets(enterprise, None, "fp8", "sm80")


def test_images_of_the_network_stay_float32(built):
    """Whatever the precision inside: callers feed and read the same."""
    layers = built("plain50", "fp16").layers
    images = [tensor for layer in layers for tensor in layer.inputs if tensor.name == "images"]
    logits = [tensor for layer in layers for tensor in layer.outputs if tensor.name == "logits"]
    assert {tensor.dtype for tensor in images + logits} == {"Float"}
    assert np.prod(images[0].shape) == 8 * 3 * 224 * 224
