"""Interruption and resume, bit by bit, with real signals to real processes; divergence; evaluation weights."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rd_deploy.common import Stopped
from rd_train.checkpoint import load_checkpoint
from rd_train.networks import Network
from rd_train.recipe import Recipe
from rd_train.run import run
from rd_train.schedules import learning_rate

RECIPE = Recipe(
    arch="plain20", width=0.25, epochs=3, teacher_epochs=1, batch_size=50, lr=0.05, warmup_epochs=0.5, ema=0.9,
    clip_norm=1.0, train_limit=200, precision="fp32", device="cpu", threads=1,
)  # fmt: skip
FLAGS = [f"--{name}={value}" for name, value in RECIPE.to_dict().items()
         if value is not None and value != "" and value != getattr(Recipe(), name)]  # fmt: skip
COMMAND = [sys.executable, "-m", "rd_train.cli"]


def environment() -> dict:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(RECIPE, folder)
    return folder


def interrupt(folder: Path, when: str, how: signal.Signals) -> int:
    """Start the run as a process and send a signal as soon as a file exists; returns the exit status."""
    process = subprocess.Popen([*COMMAND, "digits", *FLAGS, "--out", str(folder)], env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / when).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=100)
    return process.returncode


def resume(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, "--resume", str(folder)], env=environment(), capture_output=True, text=True)


def assert_same(one: Path, other: Path) -> None:
    states = [load_checkpoint(folder / "model.pt").state_dict for folder in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    results, logs = [], []
    for folder in (one, other):
        result = json.loads((folder / "result.json").read_text())
        results.append({name: value for name, value in result.items() if "seconds" not in name})
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows])
    assert results[0] == results[1]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("when", "how", "status"),
    [
        ("teacher-state.pt", signal.SIGKILL, -signal.SIGKILL),
        ("student-state.pt", signal.SIGKILL, -signal.SIGKILL),
        ("student-state.pt", signal.SIGTERM, 130),
        ("student-state.pt", signal.SIGINT, 130),
    ],
)
def test_resume_is_bit_equal(uninterrupted, tmp_path, when, how, status):
    assert interrupt(tmp_path / "run", when, how) == status
    assert not (tmp_path / "run" / "result.json").exists()
    done = resume(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same(uninterrupted, tmp_path / "run")


def test_divergence_stops_with_the_last_good_state(tmp_path, monkeypatch):
    first_epoch = 200 // 50

    def rate(step: int, total: int, **options) -> float:
        return learning_rate(step, total, **options) if step < first_epoch else 1e30

    monkeypatch.setattr("rd_train.loop.learning_rate", rate)
    with pytest.raises(Stopped, match="NaN or infinite") as stopped:
        run(replace(RECIPE, method="ce", ema=0.0, clip_norm=0.0), tmp_path)
    assert stopped.value.code == 1
    assert "last good state" in str(stopped.value)
    state = torch.load(tmp_path / "student-state.pt", weights_only=True)
    assert state["step"] == first_epoch
    assert all(torch.isfinite(value).all() for value in state["task"].values())
    assert load_checkpoint(tmp_path / "model.pt").provenance["epoch"] == 1


def test_a_moving_average_is_what_is_kept(tmp_path):
    # Over a horizon of thousands of steps the average is still nearly the initialisation.
    run(replace(RECIPE, method="ce", epochs=1, ema=0.9999), tmp_path)
    torch.manual_seed(RECIPE.seed)
    initial = Network(load_checkpoint(tmp_path / "model.pt").arch, RECIPE.init, RECIPE.init_noise).state_dict()
    kept = load_checkpoint(tmp_path / "model.pt").state_dict
    last = torch.load(tmp_path / "student-state.pt", weights_only=True)["task"]
    for name in ("layer2.0.conv1.weight", "layer2.0.bn1.running_mean"):
        distance = (kept[name] - initial[name]).norm() / (last["student." + name] - initial[name]).norm()
        assert 0 < distance < 1


def test_joint_teacher_is_trained_in_the_same_phase(tmp_path):
    result = run(replace(RECIPE, teacher_mode="joint", epochs=1, ema=0.0), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["student"]
    assert {"teacher_ce", "teacher_val_accuracy"} <= set(rows[0])
    assert result["teacher_test_accuracy"] is not None


def test_a_given_teacher_is_used_as_it_is(uninterrupted, tmp_path):
    recipe = replace(RECIPE, teacher_weights=str(uninterrupted / "teacher.pt"), epochs=1, method="kd")
    result = run(recipe, tmp_path)
    before = json.loads((uninterrupted / "result.json").read_text())
    assert result["teacher_test_accuracy"] == before["teacher_test_accuracy"]
    assert not (tmp_path / "teacher.pt").exists()


def test_damaged_state_is_one_line(uninterrupted, tmp_path):
    (tmp_path / "recipe.yaml").write_text((uninterrupted / "recipe.yaml").read_text())
    (tmp_path / "teacher-state.pt").write_bytes((uninterrupted / "teacher-state.pt").read_bytes()[:1000])
    done = resume(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
