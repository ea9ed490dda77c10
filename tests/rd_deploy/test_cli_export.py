"""``rd-export`` end to end on real digits, and bad input: one line, the right code, nothing half-written."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from rd_deploy import cli_export, native
from rd_deploy.common import CheckFailed, UserError
from rd_deploy.export.images import folder_images, read_once, spread
from rd_deploy.export.onnx import read_metadata
from rd_deploy.export.source import _without_folders
from rd_deploy.native import library
from rd_deploy.parity import onnx_runner
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.random_weights import random_network
from rd_train.checkpoint import Checkpoint, save_checkpoint
from rd_train.data import load_dataset

SMALL = ["--width", "0.25", "--classes", "5", "--size", "16", "--max-batch", "4"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(result: tuple[int, str, str], pattern: str) -> None:
    code, out, err = result
    assert code == 2
    assert err.startswith("rd-export: error: ")
    assert err.count("\n") == 1
    assert re.search(pattern, err), err
    assert "wrote" not in out


# --- what works


def test_a_checkpoint_becomes_a_checked_model_beside_it(rd_export, model, digits):
    code, out, err = rd_export(model)
    assert (code, err) == (0, "")
    assert files(model.parent) == ["model.json", "model.onnx", "model.pt"]
    assert "test images of digits" in out
    metadata = read_metadata(onnx.load(model.with_suffix(".onnx")))
    assert metadata.preprocessing == digits.preprocessing
    assert metadata.classes == tuple(digits.classes)
    assert metadata.arch == digits.arch.to_dict()
    sidecar = json.loads(model.with_suffix(".json").read_text())
    assert [run["batch"] for run in sidecar["parity"]["runs"]] == [1, 3, 64]
    assert [run["images"] for run in sidecar["parity"]["runs"]] == [8, 8, 256]
    assert all(run["top1_agreement"] == 1 for run in sidecar["parity"]["runs"])
    assert sidecar["provenance"]["training"]["epoch"] == 3


def test_the_model_classifies_test_images_as_the_network_does(rd_export, model, digits):
    assert rd_export(model)[0] == 0
    images = load_dataset("digits").test.images(torch.arange(100))
    with torch.no_grad():
        expected = digits.network()(images).numpy()
    logits = onnx_runner(model.with_suffix(".onnx").read_bytes(), threads=1)(images.numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("reparam", ["dirac", "skip", "identity", "branches"])
def test_what_a_network_has_in_training_only_is_folded_away(rd_export, model, digits, reparam):
    assert rd_export(model)[0] == 0
    nodes = [node.op_type for node in onnx.load(model.with_suffix(".onnx")).graph.node]
    arch = dataclasses.replace(digits.arch, reparam=reparam)
    network = random_network(arch, digits.preprocessing.size)
    save_checkpoint(model, dataclasses.replace(digits, arch=arch, state_dict=network.state_dict()))
    assert rd_export(model)[::2] == (0, "")
    exported = onnx.load(model.with_suffix(".onnx"))
    assert [node.op_type for node in exported.graph.node] == nodes
    assert read_metadata(exported).arch == digits.arch.to_dict()
    images = load_dataset("digits").test.images(torch.arange(100))
    with torch.no_grad():
        expected = network(images).numpy()
    logits = onnx_runner(model.with_suffix(".onnx").read_bytes(), threads=1)(images.numpy())
    np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())


def test_precisions_do_not_overwrite_each_other(rd_export, model):
    assert rd_export(model)[0] == 0
    code, out, _ = rd_export(model, "--precision", "fp16")
    assert code == 0
    assert "activations rounded to fp16" in out
    assert files(model.parent) == ["model-fp16.json", "model-fp16.onnx", "model.json", "model.onnx", "model.pt"]


@pytest.mark.parametrize("shortcuts", [None, "all", "projection"])
def test_a_named_architecture_needs_no_checkpoint_and_says_that_images_are_random(rd_export, tmp_path, shortcuts):
    changes = [] if shortcuts is None else ["--shortcuts", shortcuts]
    code, out, _ = rd_export("--arch", "plain20", *SMALL, "--seed", 5, *changes)
    name = {None: "plain20", "all": "resnet20", "projection": "plain20-projection"}[shortcuts]
    assert code == 0
    assert "random images" in out
    assert files(tmp_path) == [f"{name}.json", f"{name}.onnx"]
    assert len(read_metadata(onnx.load(f"{name}.onnx")).classes) == 5
    assert json.loads(Path(f"{name}.json").read_text())["provenance"]["weights"] == "random, seed 5"


def test_the_same_seed_gives_the_same_file(rd_export):
    for name in ("a", "b"):
        assert rd_export("--arch", "plain20", *SMALL, "--out", f"{name}.onnx")[0] == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_without_parity_the_sidecar_says_so(rd_export):
    code, out, _ = rd_export("--arch", "plain20", "--width", 0.25, "--no-parity", "--out", "deep/a.onnx")
    assert code == 0
    assert "not checked" in out
    assert json.loads(Path("deep/a.json").read_text())["parity"] is None


def test_a_tolerance_that_is_not_met_gives_1_and_writes_nothing(rd_export, tmp_path):
    arguments = ["--arch", "plain20", *SMALL, "--tolerance"]
    code, out, err = rd_export(*arguments, 1e-12)
    assert code == 1
    assert err.count("\n") == 1
    assert "nothing was written" in err
    assert "wrote" not in out
    assert files(tmp_path) == []
    minimum = re.search(r"--tolerance (\S+) is the smallest", err).group(1)
    assert rd_export(*arguments, minimum)[0] == 0


def test_help_and_errors_need_no_torch(tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None); sys.argv = ['rd-export', *sys.argv[1:]]\n"
        "from rd_deploy.cli_export import main; sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli_export.__file__).parents[1])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    shown = run("--help")
    assert shown.returncode == 0
    assert "--precision" in shown.stdout
    assert "--trt" in shown.stdout
    assert "--native" in shown.stdout
    missing = run("--arch", "plain20")
    assert missing.returncode == 2
    assert re.fullmatch(r"rd-export: error: torch is not usable.*\[train\]'\n", missing.stderr)


# --- for the native engine


@pytest.mark.parametrize(("precision", "name"), [("fp32", "model"), ("bf16", "model-bf16")])
def test_native_writes_a_checked_rdp_instead_of_onnx(rd_export, model, digits, precision, name):
    code, out, err = rd_export(model, "--native", "--precision", precision)
    assert (code, err) == (0, "")
    assert files(model.parent) == sorted(["model.pt", f"{name}.rdp", f"{name}.rdp.json"])
    assert "test images of digits" in out
    assert f"{name}.rdp.json" in out
    sidecar = json.loads((model.parent / f"{name}.rdp.json").read_text())
    runs = sidecar["parity"]["runs"]
    assert [(run["batch"], run["images"]) for run in runs] == [(1, 8), (3, 8), (64, 256)]
    assert {run["engine"].split(", ")[0] for run in runs} == {"native"}
    assert all(0 < run["max_error"] <= sidecar["parity"]["tolerance"] for run in runs)
    session = native.Session(model.parent / f"{name}.rdp", batch=4)
    assert session.classes == tuple(digits.classes)
    assert session.preprocessing == digits.preprocessing
    images = load_dataset("digits").test.images(torch.arange(4))
    with torch.no_grad():
        expected = digits.network()(images).numpy()
    error = np.abs(session.run(images.numpy()) - expected).max() / expected.std()
    assert error < {"fp32": 1e-3, "bf16": 0.5}[precision]


def test_onnx_and_rdp_lie_side_by_side(rd_export, model):
    assert rd_export(model)[0] == rd_export(model, "--native")[0] == 0
    assert files(model.parent) == ["model.json", "model.onnx", "model.pt", "model.rdp", "model.rdp.json"]
    onnx_sidecar, rdp_sidecar = (json.loads((model.parent / name).read_text()) for name in files(model.parent)[::4])
    assert (onnx_sidecar["model"], rdp_sidecar["model"]) == ("model.onnx", "model.rdp")
    assert onnx_sidecar["weights_sha256"] == rdp_sidecar["weights_sha256"]


def test_a_named_architecture_becomes_an_rdp(rd_export, tmp_path):
    code, out, _ = rd_export("--arch", "resnet20", *SMALL, "--native", "--precision", "bf16")
    assert code == 0
    assert "random images" in out
    assert files(tmp_path) == ["resnet20-bf16.rdp", "resnet20-bf16.rdp.json"]


def test_a_native_engine_that_computes_something_else_gives_1_and_writes_nothing(rd_export, model, monkeypatch):
    run = native.Context.run

    def backwards(context, images, out=None):
        logits = run(context, images)[:, ::-1]
        if out is not None:
            out[:] = logits
        return logits

    monkeypatch.setattr(native.Context, "run", backwards)
    code, _, err = rd_export(model, "--native", "--precision", "bf16")
    assert code == 1
    assert "parity failed" in err
    assert files(model.parent) == ["model.pt"]


def test_without_the_engine_parity_is_refused_before_any_work(rd_export, model, monkeypatch, tmp_path):
    library.library.cache_clear()
    monkeypatch.setattr(library, "PATH", tmp_path / "librd.so")
    try:
        result = rd_export(model, "--native")
        assert_refused(result, "parity cannot be checked: .* is not built .* or pass --no-parity")
        assert result[1] == ""
        assert files(model.parent) == ["model.pt"]
        code, out, _ = rd_export(model, "--native", "--no-parity")
        assert (code, "not checked" in out) == (0, True)
    finally:
        library.library.cache_clear()


# --- images


def save_images(folder: Path, count: int, mode: str = "RGB") -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        inner = folder / f"class{index % 2}"
        inner.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(inner / f"{index}.png")


def test_images_of_a_folder_are_preprocessed_as_in_deployment(tmp_path):
    save_images(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("not an image")
    preprocessing = Preprocessing(8, 10, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images = folder_images(tmp_path, preprocessing, 3).values
    assert images.shape == (3, 3, 8, 8)
    with Image.open(tmp_path / "class0" / "0.png") as first:
        np.testing.assert_array_equal(images[0], preprocessing.apply(np.asarray(first))[0])


def test_indices_are_spread():
    assert spread(3, 101).tolist() == [0, 50, 100]
    assert spread(10, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_of_images_replaces_the_test_split(rd_export, model, tmp_path, mode):
    save_images(tmp_path / "pictures", 3, mode)
    code, out, _ = rd_export(model, "--images", tmp_path / "pictures", "--max-batch", 5)
    assert code == 0
    assert "images in" in out


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda folder: None, "not a folder"),
        (lambda folder: folder.mkdir(), "0 image files"),
        (lambda folder: save_images(folder, 1), "1 image files"),
        (
            lambda folder: (save_images(folder, 2), (folder / "a.png").write_bytes(b"PNG?")),
            r"a\.png is in none of the formats",
        ),
        (lambda folder: (save_images(folder, 2), (folder / "a.png").touch()), r"a\.png is empty"),
    ],
)
def test_bad_image_folders(rd_export, model, tmp_path, make, pattern):
    make(tmp_path / "pictures")
    assert_refused(rd_export(model, "--images", tmp_path / "pictures"), pattern)
    assert files(model.parent) == ["model.pt"]


def rewrite(model: Path, digits: Checkpoint, **changes) -> None:
    save_checkpoint(model, Checkpoint(**{**vars(digits), **changes}))


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [
        ({}, "does not say which data"),
        ({"data": 7}, "does not say which data"),
        ({"data": "digits", "data_dir": [1]}, "does not say which data"),
        ({"data": "holiday-photos"}, "unknown"),
        ({"data": "cifar10", "data_dir": "gone"}, "does not exist"),
        ({"data": "digits", "size": 12}, "not the data that the checkpoint was trained on"),
    ],
)
def test_without_its_test_images_the_way_out_is_named(rd_export, model, digits, recipe, pattern):
    rewrite(model, digits, recipe=recipe)
    result = rd_export(model)
    assert_refused(result, pattern)
    assert "--images FOLDER" in result[2]
    assert "--no-parity" in result[2]
    assert rd_export(model, "--no-parity")[0] == 0


def test_a_dead_network_fails_and_is_not_called_equal(rd_export, model, digits):
    state = {
        name: torch.zeros_like(value) if name == "fc.weight" else value for name, value in digits.state_dict.items()
    }
    rewrite(model, digits, state_dict=state)
    code, _, err = rd_export(model)
    assert code == 1
    assert "same logits for every image" in err
    assert files(model.parent) == ["model.pt"]


# --- bad input


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is empty"),
        (b"hello", "not a torch file"),
        (pickle.dumps({"format": "residual-distillation/1"}), "not a torch file"),
    ],
)
def test_foreign_checkpoints(rd_export, tmp_path, content, pattern):
    (tmp_path / "x.pt").write_bytes(content)
    assert_refused(rd_export("x.pt"), pattern)
    assert files(tmp_path) == ["x.pt"]


def test_a_pickle_that_would_run_code_does_not(rd_export, tmp_path):
    torch.save({"format": "residual-distillation/1", "arch": Bomb()}, "bomb.pt")
    assert_refused(rd_export("bomb.pt"), "something other than tensors")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    assert_refused(rd_export("raw.pt"), "not a torch file")
    assert files(tmp_path) == ["bomb.pt", "raw.pt"]


def test_missing_truncated_and_other_torch_files(rd_export, model, tmp_path):
    assert_refused(rd_export("nowhere.pt"), "does not exist")
    assert_refused(rd_export(tmp_path), "is not a file")
    content = model.read_bytes()
    for kept in (1, len(content) // 2, len(content) - 1):
        model.write_bytes(content[:kept])
        assert_refused(rd_export(model), "truncated|damaged")
    torch.save({"weights": torch.zeros(3)}, model)
    assert_refused(rd_export(model), "not a residual-distillation/1 checkpoint")
    assert files(model.parent) == ["model.pt"]


def test_a_provenance_that_is_not_plain_is_refused(rd_export, model, digits):
    rewrite(model, digits, provenance={"mean": torch.zeros(2)})
    assert_refused(rd_export(model), "provenance holds more than plain values")


def test_negative_variance_is_refused(rd_export, model, digits):
    state = {name: -value if name == "bn1.running_var" else value for name, value in digits.state_dict.items()}
    rewrite(model, digits, state_dict=state)
    assert_refused(rd_export(model), "negative variance")


@pytest.mark.parametrize(
    ("out", "pattern"),
    [
        ("file/net.onnx", "not a folder"),
        ("run", r"must end in \.onnx"),
        ("folder.onnx", "is a folder"),
        ("run/model.pt", r"must end in \.onnx"),
    ],
)
def test_unwritable_outputs(rd_export, model, tmp_path, out, pattern):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    before = model.read_bytes()
    assert_refused(rd_export(model, "--out", tmp_path / out), pattern)
    assert model.read_bytes() == before
    assert files(model.parent) == ["model.pt"]


def test_results_of_the_training_are_not_replaced(rd_export, model):
    result = model.with_name("result.json")
    result.write_text('{"format": "other"}')
    assert_refused(rd_export(model, "--out", model.with_name("result.onnx")), "not a sidecar of rd-export")
    assert result.read_text() == '{"format": "other"}'
    assert files(model.parent) == ["model.pt", "result.json"]


def test_a_default_path_that_cannot_be_written_is_found_before_parity(rd_export, model):
    model.with_suffix(".json").mkdir()
    result = rd_export(model)
    assert_refused(result, "is a folder")
    assert result[1] == ""


def test_a_large_tolerance_does_not_buy_other_classes(rd_export, model, monkeypatch):
    monkeypatch.setattr("rd_deploy.parity.onnx_runner", lambda content: lambda images: -onnx_runner(content)(images))
    code, _, err = rd_export(model, "--tolerance", 100)
    assert code == 1
    assert re.search("images get another class .* no tolerance would pass; nothing was written", err)
    assert files(model.parent) == ["model.pt"]


def test_one_image_per_batch_is_enough_for_random_weights(rd_export):
    code, out, _ = rd_export("--arch", "plain20", *SMALL[:-2], "--max-batch", 1)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if "onnxruntime" in line] == [["1", "8"]]


def test_a_checkpoint_called_onnx_is_not_overwritten(rd_export, model):
    odd = model.rename(model.with_suffix(".onnx"))
    before = odd.read_bytes()
    assert_refused(rd_export(odd), "is exported already")
    assert_refused(rd_export(odd, "--trt"), "not an ONNX file")
    assert odd.read_bytes() == before


def test_a_full_disk_leaves_nothing(rd_export, model, monkeypatch):
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_refused(rd_export(model), "No space left")
    assert files(model.parent) == ["model.pt"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "either a model.pt or --arch"),
        (["model.pt", "--arch", "plain20"], "either a model.pt or --arch"),
        (["a.pt", "b.pt"], r"b\.pt: one model\.pt at a time"),
        (["--arch", "plian50"], "did you mean 'plain50'"),
        (["--arch", "plain20", "--shortcuts", "al"], "known: all, projection, none"),
        (["--arch", "plain20", "--precison", "fp16"], "did you mean '--precision'"),
        (["--arch", "plain20", "--prec", "fp16"], "unknown argument --prec"),
        (["--arch", "plain20", "--precision", "fp61"], "did you mean 'fp16'"),
        (["--arch", "plain20", "--native", "--trt"], "--native writes no ONNX file, which --trt needs"),
        (["--arch", "plain20", "--native", "--triton-server", "a"], "which --triton-server needs"),
        (["--arch", "plain20", "--precision", "bf16", "--triton-server", "m"], "no bf16 convolution on a CPU"),
        (["--arch", "plain20", "--precision", "fp8", "--triton-server", "m"], "drops the ReLU .* add --trt"),
        (["--arch", "plain20", "--trt", "--out", "a.onnx"], r"must end in \.engine"),
        (["--arch", "plain20", "--trt", "--trt-flavour", "nvinfer"], "unknown TensorRT flavour 'nvinfer'"),
        (["--arch", "plain20", "--trt", "--trt-flavour", "rtx", "--target", "sm90"], "has no target sm90"),
        (["--arch", "plain20", "--trt", "--batch", "8:1:2"], "must be minimum:optimum:maximum"),
        (["--arch", "plain20", "--trt-flavour", "rtx"], "--trt-flavour needs --trt"),
        (["--arch", "plain20", "--target", "sm89"], "--target needs --trt"),
        (["--arch", "plain20", "--batch", "8"], "--batch needs --trt or --triton-server"),
        (["--arch", "plain20", "--max-drop", "1"], "--max-drop needs --precision int8 or fp8"),
        (["--arch", "plain20", "--precision", "int8", "--max-drop", "-1"], "--max-drop needs a model.pt"),
        (["--arch", "plain20", "--precision", "int8", "--calibration-images", "1"], "--calibration-images must be"),
        (["--arch", "plain20", "--precision", "fp8", "--calibrator", "mini"], "mini"),
        (["model.onnx"], "is exported already"),
        (["model.onnx", "--trt", "--precision", "fp16"], "--precision is for a model.pt"),
        (["model.onnx", "--trt"], "model.onnx does not exist"),
        (["--arch", "plain20", "--native", "--precision", "fp16"], "is fp32 or bf16, not fp16: .* leave --native away"),
        (["--arch", "plain20", "--native", "--precision", "bf61"], "did you mean 'bf16'"),
        (["--arch", "plain20", "--native", "--out", "a.onnx"], r"must end in \.rdp"),
        (["--arch", "plain20", "--out", "a.rdp"], r"must end in \.onnx"),
        (["--arch", "plain20", "--size", "big"], "--size: invalid int value"),
        (["--arch", "plain20", "--size", "0"], "image size 0"),
        (["--arch", "plain20", "--width", "nan"], "width must be"),
        (["--arch", "plain20", "--width", "99"], "width must be"),
        (["--arch", "plain152", "--width", "16"], "14,170 M parameters"),
        (["--arch", "plain20", "--classes", "1"], "classes must be"),
        (["--arch", "plain20", "--seed", "-1"], "--seed must be"),
        (["--arch", "plain20", "--tolerance", "0"], "--tolerance must be positive"),
        (["--arch", "plain20", "--tolerance", "nan"], "--tolerance must be positive"),
        (["--arch", "plain20", "--max-batch", "0"], "--max-batch must be"),
        (["--arch", "plain20", "--data-dir", "."], "--data-dir is for"),
        (["--arch", "plain20", "--no-parity", "--tolerance", "1"], "--tolerance contradicts --no-parity"),
        (["model.pt", "--size", "32"], "--size needs --arch"),
        (["model.pt", "--data-dir", "a", "--images", "b"], "--data-dir is for"),
        (["--arch"], "expected one argument"),
    ],
)
def test_bad_arguments(rd_export, tmp_path, arguments, pattern):
    assert_refused(rd_export(*arguments), pattern)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        *([option, ""] for option in ("--precision", "--out", "--triton-server", "--images", "--shortcuts")),
        ["--native", "--triton-server", ""],
        *(["--trt", option, ""] for option in ("--batch", "--trt-flavour", "--target")),
        *(["--precision", "int8", option, ""] for option in ("--calibrator", "--keep")),
    ],
    ids=" ".join,
)
def test_empty_options_are_not_taken_for_none(rd_export, tmp_path, arguments):
    assert_refused(rd_export("--arch", "plain20", *SMALL, *arguments), f"{arguments[-2]} is empty; give a value")
    assert files(tmp_path) == []


def test_an_empty_model_and_an_empty_data_folder(rd_export, model):
    assert_refused(rd_export(""), r"model\.pt is empty")
    assert_refused(rd_export("", "--arch", "plain20"), r"model\.pt is empty")
    assert_refused(rd_export(model, "--data-dir", ""), "--data-dir is empty")
    assert files(model.parent) == ["model.pt"]


def test_a_tilde_that_the_shell_left_is_the_home_folder(rd_export, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_images(tmp_path / "home" / "pictures", 3)
    code, _, err = rd_export(
        *("--arch", "plain20", *SMALL, "--out=~/net.onnx", "--images=~/pictures", "--triton-server=~/models")
    )
    assert (code, err) == (0, "")
    assert files(tmp_path) == ["home"]
    assert files(tmp_path / "home") == ["models", "net.json", "net.onnx", "pictures"]
    assert rd_export("~/net.onnx", "--triton-server", "others")[0] == 0


def test_what_a_check_says_reaches_the_terminal_as_text(rd_export, model, monkeypatch):
    def fail(options, say):
        raise CheckFailed("layer \x1b[2J")

    monkeypatch.setattr("rd_deploy.export.run.from_network", fail)
    assert rd_export(model) == (1, "", "rd-export: layer \\x1b[2J; nothing was written\n")


@pytest.mark.parametrize("fails", [False, True])
def test_the_data_set_is_read_once_and_its_workers_end(rd_export, model, monkeypatch, fails):
    """For calibration, choice, gate and parity together, and when the gate fails."""
    read, closed = [], []

    def load(*arguments, **options):
        read.append(arguments)
        dataset = load_dataset(*arguments, **options)
        monkeypatch.setattr(dataset.workers, "close", lambda: closed.append(dataset))
        return dataset

    monkeypatch.setattr("rd_train.data.load_dataset", load)
    monkeypatch.setattr("rd_deploy.quantize.choose._points", lambda before, after: 7.0 if fails else 0.0)
    options = ["--precision", "int8", "--calibrator", "minmax", "--calibration-images", 16]
    assert rd_export(model, *options)[0] == fails
    assert (len(read), len(closed)) == (1, 1)


def test_the_workers_of_other_data_end(model, digits, monkeypatch):
    closed = []

    def load(*arguments, **options):
        dataset = load_dataset(*arguments, **options)
        monkeypatch.setattr(dataset.workers, "close", lambda: closed.append(dataset))
        return dataset

    monkeypatch.setattr("rd_train.data.load_dataset", load)
    other = dataclasses.replace(digits, recipe={"data": "digits", "size": 12})
    with pytest.raises(UserError, match="not the data that the checkpoint was trained on"), read_once() as read:
        read(other, None, "no images", "unnamed", "elsewhere")
    assert len(closed) == 1


def test_folders_of_the_trainer_do_not_travel_with_the_network():
    recipe = {"data": "folder", "data_dir": "/home/someone/photos", "teacher_weights": None}
    assert _without_folders(recipe) == {"data": "folder", "data_dir": "photos", "teacher_weights": None}
    recipe = {"start_weights": "torchvision/resnet50.IMAGENET1K_V2"}
    assert _without_folders(recipe) == recipe
    assert _without_folders({"start_weights": "/home/someone/x.pth"}) == {"start_weights": "x.pth"}
