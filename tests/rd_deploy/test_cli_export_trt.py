"""``rd-export --trt`` and its neighbours, end to end: real engines by TensorRT-RTX without a GPU, and refusals."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from rd_deploy import cli_export
from rd_deploy.export import tensorrt
from rd_deploy.parity import onnx_runner
from rd_deploy.trt.engine_file import read_engine

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed here (it has wheels for x86-64 only)",
)
UNCHECKED = ["--arch", "plain20", "--width", "0.5", "--classes", "5", "--size", "16"]
SMALL = [*UNCHECKED, "--max-batch", "4"]
TRT = ["--trt", "--trt-flavour", "rtx", "--target", "sm89", "--batch", "1:2:4"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@rtx
@pytest.mark.parametrize(("precision", "suffix"), [("fp32", ""), ("fp16", "-fp16"), ("bf16", "-bf16")])
def test_an_engine_and_its_onnx_file(rd_export, tmp_path, precision, suffix):
    code, out, err = rd_export(*SMALL, *TRT, "--precision", precision)
    assert (code, err) == (0, "")
    name = f"plain20{suffix}"
    assert files(tmp_path) == [f"{name}.engine", f"{name}.engine.json", f"{name}.json", f"{name}.onnx"]
    engine, sidecar = read_engine(f"{name}.engine"), json.loads(Path(f"{name}.json").read_text())
    assert (engine.targets, str(engine.profile)) == (("sm89",), "1:2:4")
    assert engine.sidecar["precision"] == sidecar["precision"] == precision
    assert engine.sidecar["engine"]["onnx_sha256"] == sidecar["sha256"]
    assert engine.sidecar["onnx_parity"] == sidecar["parity"]
    assert engine.sidecar["weights_sha256"] == sidecar["weights_sha256"]
    assert "engine was not run: running a TensorRT engine needs an NVIDIA GPU" in out


@rtx
def test_from_an_onnx_file_without_torch(rd_export, tmp_path):
    assert rd_export(*UNCHECKED, "--no-parity")[0] == 0
    before = Path("plain20.onnx").read_bytes()
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None); sys.argv = ['rd-export', *sys.argv[1:]]\n"
        "from rd_deploy.cli_export import main; sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli_export.__file__).parents[1])}
    command = [sys.executable, "-c", code, "plain20.onnx", *TRT]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert files(tmp_path) == ["plain20.engine", "plain20.engine.json", "plain20.json", "plain20.onnx"]
    assert Path("plain20.onnx").read_bytes() == before
    assert str(read_engine("plain20.engine").profile) == "1:2:4"


@rtx
def test_an_onnx_file_that_changed_since(rd_export):
    assert rd_export(*UNCHECKED, "--no-parity")[0] == 0
    network = onnx.load("plain20.onnx")
    network.doc_string = "changed"
    Path("plain20.onnx").write_bytes(network.SerializeToString())
    code, _, err = rd_export("plain20.onnx", *TRT)
    assert code == 2
    assert "plain20.json does not describe plain20.onnx" in err


@rtx
def test_int8_of_real_images_is_chosen_and_judged_by_accuracy(rd_export, model):
    """Random weights: whatever the accuracy is, the gate compares with float32's on the same images."""
    code, out, err = rd_export(model, *TRT, "--precision", "int8", "--max-drop", 100, "--calibration-images", 64)
    assert (code, err) == (0, "")
    engine = read_engine(model.with_name("model-int8.engine"))
    report = engine.sidecar["quantization"]
    assert {entry["calibrator"] for entry in report["calibrators"]} == {"minmax", "percentile", "entropy"}
    assert report["calibration"] == {"images": 64, "origin": "training images of digits"}
    assert report["gate"]["drop_points"] <= 100
    assert f"int8 by the calibrator {report['calibrator']} on 64 training images of digits" in out
    network = onnx.load(model.with_name("model-int8.onnx"))
    wanted = {node.name for node in network.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    quantised = [layer for layer in engine.sidecar["engine"]["layers"] if layer["reads"][:1] == ["Int8"]]
    assert wanted <= {name for layer in quantised for name in layer["onnx"]}
    assert engine.sidecar["engine"]["widened"] > 0
    assert "write wider maps" in out


def test_a_loss_of_accuracy_over_the_limit_writes_nothing(rd_export, model, monkeypatch):
    from rd_deploy.quantize import choose

    monkeypatch.setattr(choose, "_points", lambda before, after: 7.0)
    code, _, err = rd_export(model, "--precision", "int8", "--calibration-images", 16, "--calibrator", "minmax")
    assert code == 1
    assert re.search(r"7(\.00)? .*0\.5.*nothing was written", err)
    assert files(model.parent) == ["model.pt"]


@rtx
def test_layers_that_do_not_run_as_they_should_write_nothing(rd_export, model, monkeypatch):
    monkeypatch.setitem(tensorrt.QUANTISED, "int8", "NoSuchType")
    options = ["--precision", "int8", "--calibration-images", 16, "--calibrator", "minmax", "--max-drop", 100]
    code, _, err = rd_export(model, *TRT, *options)
    assert code == 1
    assert re.search(r"20 layers do not run in int8 \(.*\.\.\.\), although the ONNX file quantises them", err)
    assert files(model.parent) == ["model.pt"]


def test_random_weights_in_fp8_are_exported_without_a_tolerance(rd_export):
    """Each layer multiplies a rounding step there, so that no tolerance would mean anything; the report says so."""
    options = ["--precision", "fp8", "--calibrator", "minmax", "--calibration-images", 8]
    code, out, err = rd_export("--arch", "resnet20", "--classes", 10, "--seed", 1, *options)
    assert (code, err) == (0, "")
    assert "no tolerance (random weights)" in out
    assert json.loads(Path("resnet20-fp8.json").read_text())["parity"]["tolerance"] is None


@rtx
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", 5),
        ("classes", ["x"] * 5),
        ("input", {}),
        ("preprocessing", None),
        ("precision", "fp16"),
        ("parity", 3),
    ],
)
@pytest.mark.parametrize("arguments", [TRT, ["--triton-server", "models"]], ids=["engine", "server"])
def test_a_sidecar_that_contradicts_its_onnx_file(rd_export, tmp_path, key, value, arguments):
    assert rd_export(*UNCHECKED, "--no-parity")[0] == 0
    path = tmp_path / "plain20.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, _, err = rd_export("plain20.onnx", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert key in err
    assert files(tmp_path) == ["plain20.json", "plain20.onnx"]


@rtx
def test_what_would_be_ignored_is_refused(rd_export, tmp_path):
    assert rd_export(*UNCHECKED, "--no-parity")[0] == 0
    for arguments, reason in (
        (["--triton-server", "m", "--out", "a.onnx"], "--out needs --trt"),
        (["--triton-server", "m", "--tolerance", "1"], "--tolerance needs --trt"),
        (["--triton-server", "m", "--no-parity"], "--no-parity needs --trt"),
        (["--triton-server", "m", "--batch", "4:8:16"], "smallest batch is 1"),
        ([*TRT, "--images", "nowhere"], "for running the engine, which cannot be"),
    ):
        code, _, err = rd_export("plain20.onnx", *arguments)
        assert code == 2
        assert reason in err
    assert files(tmp_path) == ["plain20.json", "plain20.onnx"]


@rtx
def test_an_onnx_file_of_others_is_not_replaced(rd_export, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"mine")
    code, _, err = rd_export(*SMALL, *TRT, "--out", "net.engine")
    assert code == 2
    assert "is not of rd-export" in err
    assert files(tmp_path) == ["net.onnx"]


# --- where there is a GPU: a stand-in, since there is none


class StandIn:
    """A session that computes the ONNX file in ONNX Runtime; ``wrong`` is added to its logits."""

    content = b""
    wrong = 0.0

    def __init__(self, engine):
        assert engine.flavour.name == "rtx"
        self.largest = engine.profile.maximum

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def run(self, images: np.ndarray) -> np.ndarray:
        assert len(images) <= self.largest
        return onnx_runner(self.content)(images) + self.wrong * np.arange(5, dtype=np.float32)


def counting(ways, sizes: list[int]):
    """The same ways; those that run tell how many images they got."""

    def counted(*given):
        def load(way):
            run = way.load()
            return lambda images: sizes.append(len(images)) or run(images)

        return [replace(way, load=functools.partial(load, way)) for way in ways(*given)]

    return counted


@rtx
@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_where_the_engine_can_run_it_is_compared(rd_export, tmp_path, monkeypatch, wrong):
    from rd_deploy.trt import session

    build = tensorrt.build_engine

    def remember(model, settings):
        StandIn.content = model.content
        return build(model, settings)

    monkeypatch.setattr(tensorrt, "no_gpu", lambda: None)
    monkeypatch.setattr(tensorrt, "_target", lambda: "sm89")
    monkeypatch.setattr(tensorrt, "build_engine", remember)
    monkeypatch.setattr(session, "Session", type("Session", (StandIn,), {"wrong": wrong}))
    monkeypatch.setattr(tensorrt, "REFERENCE_BATCH", 3)
    sizes = []
    monkeypatch.setattr(tensorrt, "onnx_ways", counting(tensorrt.onnx_ways, sizes))
    code, out, err = rd_export(*SMALL, "--trt", "--trt-flavour", "rtx", "--batch", "1:2:4")
    if wrong:
        assert (code, files(tmp_path)) == (1, [])
        assert "nothing was written" in err
        return
    assert (code, err) == (0, "")
    assert "parity with plain20.onnx in onnxruntime" in out
    assert max(sizes) == 3  # not all images at once
    engine = read_engine("plain20.engine")
    assert engine.targets == ("sm89",)
    assert [run["batch"] for run in engine.sidecar["parity"]["runs"]] == [1, 2, 4]


@pytest.mark.parametrize("trained", [True, False])
def test_an_engine_of_an_onnx_file_says_why_its_images_are_random(rd_export, model, monkeypatch, trained):
    """The engine itself is left out: what it would be compared on is asked for."""
    from rd_deploy.export import run

    name = model if trained else "plain20.onnx"
    assert rd_export(*([name] if trained else UNCHECKED), "--no-parity")[0] == 0
    origins = []
    settings = SimpleNamespace(unseen=None)
    monkeypatch.setattr(run, "_settings", lambda options, precision: settings)
    monkeypatch.setattr(run, "_add_engine", lambda *given: origins.append(given[-1](4).origin))
    assert rd_export(Path(name).with_suffix(".onnx"), "--trt")[0] == 0
    (origin,) = origins
    assert origin.startswith("seeded random images (seed 1; ")
    assert ("--images" in origin) == trained
    assert ("weights are random" in origin) == (not trained)


# --- refused


def test_without_any_tensorrt(rd_export, tmp_path, monkeypatch):
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    for arguments in ([*SMALL, "--trt"], [*SMALL, "--trt", "--trt-flavour", "tensorrt"]):
        code, out, err = rd_export(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"rd-export: error: .*pip install '\.\[(rtx|tensorrt)\]'.*\n", err)
    assert files(tmp_path) == []


@rtx
def test_nothing_of_others_is_replaced(rd_export, tmp_path):
    (tmp_path / "plain20.engine.json").write_text('{"mine": 1}')
    code, _, err = rd_export(*SMALL, *TRT)
    assert code == 2
    assert "is not a sidecar of rd-export" in err
    assert files(tmp_path) == ["plain20.engine.json"]


# --- for a server


def test_a_model_repository(rd_export, tmp_path):
    code, out, _ = rd_export(*SMALL, "--triton-server", "models", "--batch", "1:2:8")
    assert code == 0
    assert "NVIDIA's Triton Inference Server" in out
    assert (tmp_path / "models/plain20/1/model.onnx").read_bytes() == Path("plain20.onnx").read_bytes()
    assert "max_batch_size: 8" in (tmp_path / "models/plain20/config.pbtxt").read_text()
    assert rd_export("plain20.onnx", "--triton-server", "others")[0] == 0
    assert "max_batch_size: 32" in (tmp_path / "others/plain20/config.pbtxt").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_onnx_files_that_the_server_would_run_wrongly(rd_export, tmp_path, precision):
    options = ["--calibrator", "minmax", "--calibration-images", 8] if precision == "fp8" else []
    assert rd_export(*UNCHECKED, "--precision", precision, "--no-parity", *options)[0] == 0
    before = files(tmp_path)
    code, out, err = rd_export(f"plain20-{precision}.onnx", "--triton-server", "models")
    assert (code, out) == (2, "")
    assert re.search("the server runs ONNX files by ONNX Runtime, which .*; add --trt", err)
    assert files(tmp_path) == before


@rtx
def test_the_server_cannot_load_what_rtx_builds(rd_export, tmp_path):
    code, _, err = rd_export(*SMALL, *TRT, "--triton-server", "models")
    assert code == 2
    assert "the server cannot load TensorRT-RTX engines" in err
    assert files(tmp_path) == []
