"""What is checked of an engine file before TensorRT sees it, on a real engine and on damaged and hostile sidecars."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from chains import bottlenecks, export

from rd_deploy.common import UserError
from rd_deploy.export import tensorrt
from rd_deploy.export.files import write_artefacts
from rd_deploy.export.onnx import make_onnx
from rd_deploy.trt import engine_file
from rd_deploy.trt.build import Profile
from rd_deploy.trt.engine_file import read_engine, rebuild_command, sidecar_path
from rd_deploy.trt.flavours import Flavour, load_flavour

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here (it has wheels for x86-64 only)")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A real engine for sm86 and sm89, with its ONNX file and both sidecars."""
    folder = tmp_path_factory.mktemp("engine")
    export(make_onnx, folder / "net.onnx", bottlenecks(), "fp16")
    settings = tensorrt.Settings(load_flavour("rtx"), Profile(1, 2, 4), ("sm86", "sm89"), "no GPU")
    model = tensorrt.read_onnx(folder / "net.onnx")
    built = tensorrt.build_engine(model, settings)
    write_artefacts([tensorrt.describe(model, folder / "net.engine", built, settings)])
    return folder / "net.engine"


@pytest.fixture
def engine(original, tmp_path) -> Path:
    for path in original.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / original.name


def change(engine: Path, **values: object) -> None:
    """Change entries of the sidecar; those of its ``engine`` by the names they have there."""
    path = sidecar_path(engine)
    content = json.loads(path.read_text())
    for name, value in values.items():
        (content if name in content else content["engine"])[name] = value
    path.write_text(json.dumps(content))


def test_what_an_engine_file_says(engine):
    read = read_engine(engine)
    chain = bottlenecks()
    assert read.profile == Profile(1, 2, 4)
    assert read.targets == ("sm86", "sm89")
    assert (read.input_shape, read.classes, read.preprocessing) == (
        chain.input_shape,
        chain.classes,
        chain.preprocessing,
    )
    assert read.content == engine.read_bytes()
    assert read.activation_bytes > 0
    values = read.sidecar
    assert values["precision"] == "fp16"
    assert values["parity"] is None
    assert values["engine"]["onnx_sha256"] == json.loads((engine.parent / "net.json").read_text())["sha256"]
    convolutions = [name for layer in values["engine"]["layers"] for name in layer["onnx"] if name.endswith("/conv")]
    assert set(convolutions) == {f"{step.name}/conv" for step in chain.steps if hasattr(step, "relu")}


def test_the_command_that_it_names_builds_it_again(engine, monkeypatch, capsys):
    from rd_deploy import cli_export

    read = read_engine(engine)
    words = shlex.split(read.rebuild)
    assert words == shlex.split(read.sidecar["engine"]["rebuild"])
    engine.unlink()
    monkeypatch.chdir(engine.parent)
    assert cli_export.command(words[1:]) == 0
    again = read_engine("net.engine")
    assert (again.targets, again.profile) == (read.targets, read.profile)
    assert "was not run" in capsys.readouterr().out


def test_targets(engine):
    read = read_engine(engine)
    read.check_target("sm89")
    with pytest.raises(UserError, match=r"is for sm86, sm89, and the GPU is sm120; .* --target sm120 "):
        read.check_target("sm120")


def test_a_gpu_that_the_flavour_has_no_target_for(engine):
    with pytest.raises(UserError, match=r"is sm90; TensorRT-RTX .* builds none for it, enterprise TensorRT does"):
        read_engine(engine).check_target("sm90")


def test_an_engine_without_its_sidecar(engine):
    sidecar_path(engine).unlink()
    with pytest.raises(UserError, match=r"has no net.engine.json beside it"):
        read_engine(engine)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "x"}'])
def test_a_sidecar_that_is_none(engine, damage):
    sidecar_path(engine).write_bytes(damage)
    with pytest.raises(UserError, match=r"net\.engine\.json"):
        read_engine(engine)


@pytest.mark.parametrize("name", engine_file.ENGINE_KINDS)
@pytest.mark.parametrize("value", [{}, 1.5, [1]])
def test_a_sidecar_with_wrong_entries(engine, name, value):
    change(engine, **{name: value})
    with pytest.raises(UserError) as error:
        read_engine(engine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"profile": [4, 2, 1]},
        {"profile": [1, 2, 10**9]},
        {"targets": ["sm89; rm -rf ."]},
        {"flavour": "../../evil"},
        {"onnx": "a\x1b[31m.onnx"},
        {"onnx": "--native"},
        {"onnx": "../a.onnx"},
        {"classes": [1, [2]]},
        {"input": {"shape": ["batch", 3, 20]}},
        {"input": {"shape": ["batch", 3, -20, 20]}},
        {"preprocessing": {}},
    ],
)
def test_a_sidecar_with_impossible_entries(engine, values):
    change(engine, **values)
    with pytest.raises(UserError):
        read_engine(engine)


def test_another_engine_than_the_sidecars(engine):
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the engine that net.engine.json describes; build it again: rd-export"):
        read_engine(engine)
    engine.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is not the engine"):
        read_engine(engine)
    engine.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_engine(engine)


def test_another_version_than_is_installed(engine):
    change(engine, version="1.3.0")
    with pytest.raises(UserError, match=r"is of version 1.3.0, here is TensorRT-RTX .*; build it again: rd-export"):
        read_engine(engine)


def test_a_flavour_that_is_not_installed(engine, monkeypatch):
    change(engine, flavour="tensorrt")
    monkeypatch.setattr(engine_file, "load_flavour", _not_installed)
    with pytest.raises(UserError, match="tensorrt is not usable here"):
        read_engine(engine)


def _not_installed(name: str) -> Flavour:
    raise UserError(f"{name} is not usable here")


def test_a_command_is_quoted():
    """What a hostile sidecar names is shown to somebody who may type it."""
    engine = {"flavour": "rtx", "targets": ["sm89"], "profile": [1, 1, 1], "onnx": "a.onnx; rm -rf ~"}
    command = rebuild_command(engine, "$(x).engine")
    assert shlex.split(command)[1] == "a.onnx; rm -rf ~"
    assert "'a.onnx; rm -rf ~'" in command
    assert "'$(x).engine'" in command


def test_enterprise_tensorrt_builds_for_the_gpu_at_hand():
    engine = {"flavour": "tensorrt", "targets": ["sm90"], "profile": [1, 8, 32], "onnx": "net.onnx"}
    assert "--target" not in rebuild_command(engine, "net.engine")


def test_settings_without_a_gpu(monkeypatch):
    """Enterprise TensorRT cannot build here, and says so before anything else is asked of it."""
    monkeypatch.setattr(tensorrt, "no_gpu", lambda: "none")
    monkeypatch.setattr(
        tensorrt, "choose_flavour", lambda name, gpu: Flavour(name, SimpleNamespace(__version__="11.4"))
    )
    with pytest.raises(
        UserError, match=r"TensorRT 11.4 builds on the GPU that will run the engine, .*--trt-flavour rtx"
    ):
        tensorrt.choose_settings("tensorrt", None, Profile(1, 1, 1), "fp16")


def test_where_a_built_engine_can_run(monkeypatch):
    monkeypatch.setattr(tensorrt, "no_gpu", lambda: None)
    monkeypatch.setattr(tensorrt, "_target", lambda: "sm89")
    assert tensorrt.choose_settings("rtx", None, Profile(1, 1, 1), "fp8").targets == ("sm89",)
    assert tensorrt.choose_settings("rtx", None, Profile(1, 1, 1), "fp8").unseen is None
    other = tensorrt.choose_settings("rtx", ("sm120",), Profile(1, 1, 1), "fp8")
    assert other.unseen == "it is for sm120, and the GPU here is sm89"
