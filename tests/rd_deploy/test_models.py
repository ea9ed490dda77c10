"""What `rd-bench` takes for a network, without measuring it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from chains import basics
from onnx import TensorProto, helper
from onnx_builder import save

from rd_deploy.bench.models import Subject, check_comparable, counterpart, load_subject
from rd_deploy.common import UserError
from rd_deploy.export.onnx import KEY, to_onnx
from rd_deploy.export.source import source_from_checkpoint
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.quantize.qdq import KINDS, quantized_tensors, to_qdq
from rd_train.checkpoint import Checkpoint, save_checkpoint
from rd_train.networks import Network, parse_arch


def relu(*shape: int) -> onnx.ModelProto:
    """A file that other people made."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_plain(folder: Path, name: str = "plain20", **changes) -> Path:
    arch = parse_arch(name, in_channels=1, classes=10, **changes)
    preprocessing = Preprocessing(8, 8, 1, (0.3,), (0.4,))
    checkpoint = Checkpoint(arch, Network(arch).state_dict(), preprocessing, [str(digit) for digit in range(10)])
    save_checkpoint(folder / "model.pt", checkpoint)
    return folder / "model.pt"


def save_export(checkpoint: Path) -> Path:
    return save(to_onnx(source_from_checkpoint(checkpoint).chain), checkpoint.with_suffix(".onnx"))


# --- what to compare with


@pytest.mark.parametrize(("name", "width"), [("plain20", 0.25), ("plain18", 0.125), ("plain20-projection", 0.25)])
def test_a_checkpoint_and_its_export_meet_the_same_resnet(tmp_path, name, width):
    shortcuts = {"shortcuts": "projection"} if "-" in name else {}
    checkpoint = save_plain(tmp_path, name.split("-")[0], width=width, **shortcuts)
    subjects = [load_subject(str(path)) for path in (checkpoint, save_export(checkpoint))]
    assert subjects[0].arch == subjects[1].arch
    assert {counterpart(subject) for subject in subjects} == {f"resnet{name.split('-')[0][5:]}"}
    others = [load_subject(counterpart(subject), like=subject) for subject in subjects]
    for subject, other in zip(subjects, others, strict=True):
        check_comparable(subject, other)
        assert other.arch["width"] == width
    assert others[0].arch == others[1].arch


def test_a_file_of_others_needs_compare(tmp_path):
    foreign = load_subject(str(save(relu(1, 8, 8), tmp_path / "relu.onnx")))
    with pytest.raises(UserError, match=r"relu\.onnx was not made by rd-export.*--compare"):
        counterpart(foreign)
    assert counterpart(Subject("resnet18", "torchvision resnet18", relu(3, 8, 8))) == "resnet50"


@pytest.mark.parametrize("arch", ["{}", '{"depth": "20", "stem": "small", "width": 1}', "[1]", '{"depth": 20}', "nan"])
def test_a_damaged_architecture_in_our_metadata_is_refused(tmp_path, arch):
    model = onnx.load(save_export(save_plain(tmp_path, width=0.25)))
    entry = next(entry for entry in model.metadata_props if entry.key == f"{KEY}arch")
    entry.value = arch
    with pytest.raises(UserError, match="export it again"):
        load_subject(str(save(model, tmp_path / "damaged.onnx")))


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_an_own_export_in_another_precision_is_refused(tmp_path, precision):
    """Whatever engine ran it, its times would stand under --precision's name."""
    chain = replace(basics(), arch={"depth": 8, "stem": "small", "width": 1.0})
    ranges = dict.fromkeys(quantized_tensors(chain, KINDS["int8"]), 1.0)
    model = to_qdq(chain, ranges, "int8") if precision == "int8" else to_onnx(chain, precision)
    with pytest.raises(UserError, match=rf"net\.onnx is the {precision} export; give the fp32 one"):
        load_subject(str(save(model, tmp_path / "net.onnx")))
    assert load_subject(str(save(to_onnx(chain), tmp_path / "net.onnx"))).arch == chain.arch


def test_files_need_no_torch(tmp_path):
    ours, foreign = save_export(save_plain(tmp_path, width=0.25)), save(relu(1, 8, 8), tmp_path / "relu.onnx")
    code = f"""import sys; sys.modules["torch"] = None
from rd_deploy.bench.models import counterpart, load_subject
print(counterpart(load_subject({str(ours)!r})), load_subject({str(foreign)!r}).shape)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "resnet20 (1, 8, 8)\n"


def test_a_folder_may_be_named_like_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain20", "squeezenet1_1", "results"):
        Path(name).mkdir()
    assert load_subject("plain20").arch["depth"] == 20
    assert load_subject("squeezenet1_1", size=64).source.startswith("torchvision")
    with pytest.raises(UserError, match=r"results is neither a \.pt checkpoint nor an \.onnx file"):
        load_subject("results")


# --- what cannot be benched


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name):
    with pytest.raises(UserError, match="an empty name is no network"):
        load_subject(name)


def test_images_that_fit_into_no_memory_are_refused_before_anything_is_made_for_them(tmp_path):
    path = save(relu(3, 100_000, 100_000), tmp_path / "huge.onnx")
    with pytest.raises(UserError, match=r"3x100000x100000.*smaller images"):
        load_subject(str(path))
    large = Subject("large", "a file", relu(3, 4096, 4096))
    check_comparable(large, large, batch=8)
    with pytest.raises(UserError, match=r"a batch of 4096 .*--batch"):
        check_comparable(large, large, batch=4096)


def test_a_torchvision_network_that_cannot_run_the_size_says_so():
    with pytest.raises(UserError, match=r"torchvision:alexnet cannot run 32x32 images \(.+\): choose --size"):
        load_subject("torchvision:alexnet", size=32)


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr("torchvision.models.get_model", refuse)
    with pytest.raises(UserError, match=r"cannot run 64x64 images \(AssertionError\)"):
        load_subject("torchvision:resnet18", size=64)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "densenet121"])
def test_a_broken_torchvision_is_one_line(tmp_path, monkeypatch, name):
    """As one is that was built for another torch; our own networks do without it."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = r"^torchvision is installed but cannot be imported \(operator torchvision::nms does not exist\): install it"
    with pytest.raises(UserError, match=said):
        load_subject(name, size=64)
    assert load_subject("plain20").arch["depth"] == 20
