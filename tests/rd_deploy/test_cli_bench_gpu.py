"""``rd-bench`` for GPUs, where there is none: plans, and a whole run with the kernels interpreted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from types import SimpleNamespace

import jsonschema
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import onnx
from chains import basics

from rd_deploy import cli_bench
from rd_deploy.common import run_command
from rd_deploy.export.onnx import to_onnx

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def bench(*arguments) -> int:
    return run_command("rd-bench", lambda: cli_bench.command([str(argument) for argument in arguments]))


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    names = tmp_path / "plain.onnx", tmp_path / "residual.onnx"
    for name, shortcuts in zip(names, (False, True), strict=True):
        chain = basics(widths=(16,), size=(6, 6), shortcuts=shortcuts)
        onnx.save(to_onnx(replace(chain, arch={"depth": 8, "stem": "small", "width": 1.0})), str(name))
    return str(names[0]), str(names[1])


def test_a_plan_names_kernels_times_and_memory(capsys):
    assert bench("--plan", "--batch", "32", "--card", "h100") == 0
    text = capsys.readouterr().out
    assert "cuda engine on h100" in text
    assert "not measured" in text
    (row,) = [line for line in text.splitlines() if "conv1 · maxpool · layer1.0.conv1" in line]
    assert row.split()[5] == "Stem"
    assert "feature maps 38,535,168 bytes" in text  # 2 · 32 · 602,112: see test_cuda_plan
    assert "plain50 predicted" in text
    assert "2.17x smaller" in text


def test_the_plan_follows_the_setting(monkeypatch, capsys, files):
    monkeypatch.setenv("RD_FUSION", "never")
    assert bench(files[0], "--compare", files[1], "--plan", "--batch", "1") == 0
    text = capsys.readouterr().out
    assert "RD_FUSION=never" in text
    assert "5 launches" in text  # stem, two convolutions, pool, classifier


GPU = {"name": "Some GPU", "capability": 90, "multiprocessors": 132, "memory_bytes": 1 << 37}
GPU |= {"driver": "570.86.15", "cuda": "13.0"}


def test_a_run_in_the_interpreter_is_a_whole_report(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rd_deploy.bench.environment.gpu", lambda: dict(GPU))
    monkeypatch.setattr("rd_deploy.bench.environment.ptxas", "13.{}".format)
    out = tmp_path / "out"
    options = ("--engines", "cuda", "--precision", "fp16", "--batch", "1", "--quick", "--seconds", "0.01")
    assert bench(files[0], "--compare", files[1], *options, "--out", out) == 0
    document = json.loads((out / "bench.json").read_text())
    jsonschema.validate(document, json.loads(resources.files("rd_deploy.bench").joinpath("schema.json").read_text()))
    assert document["environment"]["gpu"] == GPU | {"ptxas": "13.90"}
    assert document["environment"]["variables"]["TRITON_INTERPRET"] == "1"
    assert capsys.readouterr().out.startswith("Some GPU (sm_90, 132 multiprocessors, 128 GiB), driver 570.86.15, ")
    assert {(row["engine"], row["variant"], row["precision"]) for row in document["results"]} == {
        ("cuda", "interpreter", "fp16")
    }
    assert {row["source"] for row in document["memory"]} >= {"cuda maps", "cuda arena", "ledger, in-place"}
    assert all(row["agrees"] for row in document["agreement"])


def test_a_plan_on_a_gpu_that_is_too_old_asks_for_a_card(monkeypatch, capsys):
    old = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    assert bench("--plan") == 2
    error = capsys.readouterr().err
    assert error == "rd-bench: error: Tesla T4 is sm_75; the kernels need sm_80 or later; name one with --card\n"


@pytest.mark.parametrize(
    "given",
    [
        *(["--require", "speed=1.4"], ["--engines", "cuda"], ["--device", "cpu"], ["--precision", "fp16"]),
        *(["--threads", "2"], ["--profile"], ["--quick"], ["--seconds", "10"], ["--seed", "0"], ["--out", "bench"]),
    ],
    ids=lambda given: given[0],
)
def test_a_plan_refuses_what_it_would_ignore(given, capsys):
    assert bench("--plan", "--card", "h100", *given) == 2
    captured = capsys.readouterr()
    assert given[0] in captured.err
    assert "leave one of them away" in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_plan_takes_the_device_that_it_is_for(files, capsys):
    assert bench(files[0], "--compare", files[1], "--plan", "--device", "cuda", "--card", "a100", "--batch", "1") == 0
    assert "cuda engine on a100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engines", "cuda,native"], "engines of one device at a time, please: cuda on cuda, native on cpu"),
        (["--engines", "native", "--device", "cuda"], "native on cpu; --device is cuda"),
        (["--plan", "--card", "h1000"], "unknown card 'h1000' (did you mean 'h100'?)"),
        (["--card", "h100"], "--card names the GPU of --plan"),
        (["--engines", "cuda", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, said, capsys):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


@without_gpu
def test_without_a_gpu_every_engine_says_why(tmp_path):
    """In a process of its own: here the cuda engine is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rd_deploy.cli_bench", "--device", "cuda", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for engine in ("torch-cuda", "inductor-cuda", "onnxruntime-cuda", "tensorrt", "cuda"):
        assert f"{engine}: " in done.stderr
    assert not (tmp_path / "out").exists()
