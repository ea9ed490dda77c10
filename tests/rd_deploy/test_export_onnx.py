"""ONNX files in ONNX Runtime against the unfolded float64 network; metadata, sidecar and bad input."""

import copy
import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from chains import export

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool
from rd_deploy.common import UserError
from rd_deploy.export.half import with_half_storage
from rd_deploy.export.onnx import PRECISIONS, make_onnx, read_metadata, to_onnx
from rd_deploy.export.source import Source, chain_from_name, source_from_name
from rd_deploy.parity import onnx_runner
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.random_weights import random_images


def small(name: str = "plain20", size: int = 16, **changes) -> Source:
    return source_from_name(name, size, **({"width": 1 / 8, "classes": 5} | changes))


def float64_logits(source: Source, images: np.ndarray) -> np.ndarray:
    network = copy.deepcopy(source.network).double().eval()
    with torch.no_grad():
        return network(torch.from_numpy(images).double()).numpy()


def too_late(content: bytes) -> None:
    pytest.fail("checked before the path was")


@pytest.fixture(scope="module")
def chain() -> Chain:
    return small().chain


@pytest.mark.parametrize("shortcuts", ["all", "projection", "none"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["plain20", "plain50"])
def test_onnx_runtime_gives_the_float64_networks_logits_at_any_batch(name, stem, shortcuts):
    source = small(name, 33, stem=stem, shortcuts=shortcuts)
    run = onnx_runner(to_onnx(source.chain).SerializeToString(), threads=1)
    for batch in (1, 3, 7):
        images = random_images(batch, 3, 33, seed=batch)
        logits = run(images)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, float64_logits(source, images), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("precision", "least", "most", "element"),
    [("fp16", 1e-5, 0.1, onnx.TensorProto.FLOAT16), ("bf16", 1e-4, 0.5, onnx.TensorProto.BFLOAT16)],
)
@pytest.mark.parametrize("name", ["plain20", "resnet20", "resnet50"])
def test_halves_take_and_give_float32_and_stay_close(name, precision, least, most, element):
    source = small(name)
    model = to_onnx(source.chain, precision)
    images = random_images(7, 3, 16, seed=1)
    runnable = with_half_storage(model) if precision == "bf16" else model
    logits, expected = onnx_runner(runnable.SerializeToString(), threads=1)(images), float64_logits(source, images)
    assert logits.dtype == np.float32
    error = np.abs(logits - expected).max() / expected.std()
    assert least < error < most  # not fp32 in disguise, not broken
    assert {tensor.data_type for tensor in model.graph.initializer} == {element}


def test_the_graph_is_batch_dynamic_without_bn_and_half_the_size_in_halves(chain):
    models = [to_onnx(chain, precision) for precision in PRECISIONS]
    for model in models:
        operators = {node.op_type for node in model.graph.node}
        assert operators <= {"Conv", "Relu", "Add", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm", "Cast"}
        (value,), (result,) = model.graph.input, model.graph.output
        assert (value.name, result.name) == ("images", "logits")
        dims = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in (value, result)]
        assert dims == [["batch", 3, 16, 16], ["batch", 5]]
    sizes = [sum(len(tensor.raw_data) for tensor in model.graph.initializer) for model in models]
    assert sizes == [4 * chain.parameters(), 2 * chain.parameters(), 2 * chain.parameters()]


def test_bf16_is_written_in_an_opset_that_has_its_convolutions(chain):
    assert to_onnx(chain, "bf16").opset_import[0].version == 22
    assert to_onnx(chain, "fp16").opset_import[0].version == 17
    schemas = [onnx.defs.get_schema("Conv", opset) for opset in (22, 17)]
    allowed = ["tensor(bfloat16)" in schema.type_constraints[0].allowed_type_strs for schema in schemas]
    assert allowed == [True, False]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_input_gives_the_same_bytes(precision):
    first, second = (
        to_onnx(chain_from_name("plain20", 16, seed=3, classes=5), precision).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second


def test_a_rectangular_input_keeps_its_shape(chain):
    wide = replace(chain, input_shape=(3, 16, 24))
    images = np.zeros((2, 3, 16, 24), np.float32)
    assert onnx_runner(to_onnx(wide).SerializeToString(), threads=1)(images).shape == (2, 5)


# --- metadata


def test_metadata_survives_the_file_and_reaches_the_runtime(chain):
    named = replace(
        chain,
        classes=("cat", "größer", '"quoted"', "日本", ""),
        preprocessing=Preprocessing(16, 20, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), pad=1),
    )
    content = to_onnx(named, "fp16").SerializeToString()
    metadata = read_metadata(onnx.load_from_string(content))
    assert metadata.classes == named.classes
    assert metadata.preprocessing == named.preprocessing
    assert metadata.arch == named.arch
    assert (metadata.name, metadata.precision) == ("plain20", "fp16")
    assert metadata.weights_sha256 == named.sha256()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["residual_distillation.classes"]) == list(named.classes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other/1", "carries no"),
        ("format", None, "carries no"),
        ("classes", None, "lacks classes"),
        ("classes", "[1, 2]", "must be strings"),
        ("classes", "[]", "must be strings"),
        ("classes", "{}", "not a JSON list"),
        ("classes", "[" * 100_000, "not JSON"),
        ("arch", "nonsense", "not JSON"),
        ("arch", "[]", "not a JSON dict"),
        ("preprocessing", "{}", "exactly"),
        ("preprocessing", '{"size": 1e9}', "exactly"),
        ("precision", "fp7", "damaged"),
        ("weights_sha256", "abc", "damaged"),
    ],
)
def test_damaged_metadata_is_refused(chain, key, value, message):
    model = to_onnx(chain)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept.pop(f"residual_distillation.{key}")
    if value is not None:
        kept[f"residual_distillation.{key}"] = value
    onnx.helper.set_model_props(model, kept)
    with pytest.raises(UserError, match=message):
        read_metadata(model)


def test_a_foreign_model_has_no_metadata():
    with pytest.raises(UserError, match="rd-export"):
        read_metadata(onnx.ModelProto())


@pytest.mark.parametrize(("precision", "step"), [("fp16", 2.0**-10), ("bf16", 2.0**-7)])
@pytest.mark.parametrize("sign", [1, -1])
def test_float64_weights_are_rounded_once(chain, precision, step, sign):
    """Just above a tie: float32 would round to the tie, and the tie then to even."""
    value = sign * (1 + step / 2 + 2.0**-40)
    tensor = to_onnx(with_first_weight(chain, value), precision).graph.initializer[0]
    assert float(onnx.numpy_helper.to_array(tensor).flat[0]) == sign * (1 + step)
    tie = to_onnx(with_first_weight(chain, sign * (1 + step / 2)), precision).graph.initializer[0]
    assert float(onnx.numpy_helper.to_array(tie).flat[0]) == sign


# --- what cannot be exported


def with_first_weight(chain: Chain, value: float) -> Chain:
    weight = chain.steps[0].weight.copy()
    weight[0, 0, 0, 0] = value
    return replace(chain, steps=(replace(chain.steps[0], weight=weight), *chain.steps[1:]))


def test_values_out_of_range_are_refused(chain):
    with pytest.raises(UserError, match=r"conv1\.weight reaches 7e\+04.*--precision fp32"):
        to_onnx(with_first_weight(chain, -70_000.0), "fp16")
    to_onnx(with_first_weight(chain, 65_504.0), "fp16")
    to_onnx(with_first_weight(chain, -70_000.0), "fp32")
    to_onnx(with_first_weight(chain, 3.38e38), "bf16")
    with pytest.raises(UserError, match=r"more than bfloat16 holds \(3\.39e\+38\); train again"):
        to_onnx(with_first_weight(chain, 3.4e38), "bf16")
    with pytest.raises(UserError, match="train again"):
        to_onnx(with_first_weight(chain, 1e39), "fp32")


def test_unknown_precision_suggests_the_nearest(chain):
    with pytest.raises(UserError, match="did you mean 'fp16'"):
        to_onnx(chain, "fp61")


def test_more_than_two_gigabytes_are_refused_before_they_are_copied():
    huge = np.broadcast_to(np.float64(1), (40_000, 40_000, 1, 1))  # 12.8 GB that occupy 8 bytes
    steps = (
        Conv("a", huge, np.zeros(40_000), 1, 0, True, INPUT),
        GlobalAveragePool("mean", "a"),
    )
    preprocessing = Preprocessing(1, 1, 1, (0,), (1,))
    with pytest.raises(UserError, match="exceed the 2 GiB"):
        to_onnx(Chain(steps, (40_000, 1, 1), preprocessing, ("x", "y")))


def test_absurdly_wide_networks_are_refused_before_they_are_built():
    with pytest.raises(UserError, match="14,170 M parameters"):
        source_from_name("plain152", width=16)


# --- files


def test_the_sidecar_describes_the_file(tmp_path, chain):
    seen = []
    path = tmp_path / "deep" / "net.onnx"
    returned = export(make_onnx, path, chain, "fp16", verify=lambda content: {"checked": seen.append(content) is None})
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert sidecar == returned
    content = path.read_bytes()
    assert seen == [content]
    assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
    assert (sidecar["model"], sidecar["bytes"], sidecar["precision"]) == ("net.onnx", len(content), "fp16")
    assert sidecar["weight_bytes"] == 2 * chain.parameters()
    assert sidecar["macs"] == chain.macs()
    assert sidecar["parity"] == {"checked": True}
    assert sidecar["preprocessing"] == chain.preprocessing.to_dict()
    assert sidecar["classes"] == list(chain.classes)
    assert sidecar["versions"]["onnx"] == onnx.__version__
    assert sorted(path.parent.iterdir()) == [path.with_suffix(".json"), path]


def test_older_files_are_replaced_and_kept_when_the_check_fails(tmp_path, chain):
    path = tmp_path / "net.onnx"
    export(make_onnx, path, chain)
    path.write_bytes(b"old")

    def refuse(content: bytes) -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        export(make_onnx, path, chain, verify=refuse)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    export(make_onnx, path, chain)
    onnx.checker.check_model(path.read_bytes())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_network_of_others_is_not_replaced(tmp_path, chain):
    path = tmp_path / "resnet50.onnx"
    path.write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"exists and is not of rd-export \(no resnet50\.json\)"):
        export(make_onnx, path, chain, verify=too_late)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_outputs_are_refused_before_the_work(tmp_path, chain):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "net.json").mkdir()
    for name, message in (
        ("file/net.onnx", "is not a folder"),
        ("file/a/net.onnx", "is not a folder"),
        ("folder.onnx", "is a folder"),
        ("net.onnx", "is a folder"),
        ("net.pt", r"must end in \.onnx"),
    ):
        with pytest.raises(UserError, match=message):
            export(make_onnx, tmp_path / name, chain, verify=too_late)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "other/1"}', '{"format": ["x"]}', "not JSON", ""])
def test_a_json_file_of_others_is_not_replaced(tmp_path, chain, content):
    result = tmp_path / "result.json"
    result.write_text(content)
    with pytest.raises(UserError, match=r"result\.json exists and is not a sidecar"):
        export(
            make_onnx,
            tmp_path / "result.onnx",
            chain,
            verify=too_late,
        )
    assert result.read_text() == content
    assert list(tmp_path.iterdir()) == [result]


def test_a_sidecar_of_ours_is_replaced(tmp_path, chain):
    export(make_onnx, tmp_path / "net.onnx", chain)
    assert export(make_onnx, tmp_path / "net.onnx", chain, "fp16") == json.loads((tmp_path / "net.json").read_text())


@pytest.mark.parametrize("name", ["net.onnx", "deep/er/net.onnx"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, chain, monkeypatch, name):
    def refuse(*_, dir: Path, **__):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # file modes would not stop a test that root runs
    with pytest.raises(UserError, match=r"cannot write .*Permission denied"):
        export(make_onnx, tmp_path / name, chain, verify=too_late)
    assert list(tmp_path.iterdir()) == []
