"""--dry against what runs and processes really take, and against counts."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rd_deploy.common import Stopped, run_command
from rd_train.build import build_task, meta_task, student_arch
from rd_train.cli import command
from rd_train.context import Context
from rd_train.cost import macs_per_image, mean_step_macs, step_macs, update_macs
from rd_train.data import MemorySplit, Meter, load_dataset
from rd_train.distill import CrossEntropy
from rd_train.estimate import _endless, _timed_steps, measure, report_bytes
from rd_train.loop import Step, Stepper
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe
from rd_train.run import dry_run, run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe(arch="plain20", width=0.25, epochs=2, teacher_epochs=1, batch_size=50, warmup_epochs=0.2, ema=0.9,
                train_limit=200, audit=True, device="cpu", threads=1, precision="fp32")  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The estimate of a run, made in an empty folder, and the folder of that run."""
    empty, folder = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("run")
    phases = dry_run(RECIPE, empty)
    assert not list(empty.iterdir())
    run(RECIPE, folder)
    return phases, folder


def test_phases_and_steps_are_those_of_the_run(both):
    phases, folder = both
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for phase in phases:
        theirs = [row for row in rows if row["phase"] == phase.name]
        assert (phase.epochs, phase.epochs * phase.steps) == (len(theirs), theirs[-1]["step"])
        assert phase.timed == 5
        assert phase.seconds > phase.epochs * phase.steps * phase.step_seconds > 0
    assert [phase.name for phase in phases] == ["teacher", "student"]


def test_the_disk_is_that_of_the_files(both):
    phases, folder = both
    for phase, networks in zip(phases, ("teacher.pt", "model.pt"), strict=True):
        files = [folder / f"{phase.name}-state.pt", folder / networks]
        assert phase.disk == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
    rest = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".pt")
    context = Context(RECIPE, load_dataset("digits", limit=200), folder, torch.device("cpu"), None)
    assert rest < report_bytes(phases, context) < 3 * rest


# In a process of its own, because the most that a process ever held (ru_maxrss) never falls.
MEMORY = """
import threading
from pathlib import Path

import torch

from rd_train.build import build_task, meta_task
from rd_train.data import load_dataset
from rd_train.estimate import _memory_of_a_step
from rd_train.context import Context
from rd_train.loop import Stepper
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe


def phase(batch_size):
    recipe = Recipe(
        arch="plain20", splices="all", size=32, batch_size=batch_size, epochs=2, device="cpu", precision="fp32"
    )
    dataset = load_dataset("digits", size=32)
    context = Context(recipe, dataset, None, torch.device("cpu"), threading.Event())
    plain, resnet = (parse_arch(name, in_channels=1, classes=10) for name in ("plain20", "resnet20"))
    task = build_task(recipe, context.place(Network(plain)), context.place(Network(resnet)))
    indices = torch.arange(batch_size)
    batch = dataset.train.images(indices), dataset.train.labels[indices]
    return Stepper(task, 2, context), meta_task(recipe, plain), batch


def held_at_most():
    # Not ru_maxrss, which a process takes over from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


torch.set_num_threads(1)
take, _, batch = phase(2)
take(0, *batch)
before = held_at_most()
take, meta, batch = phase(96)
for number in range(2):
    take(number, *batch)
grown = held_at_most() - before
del take
take, meta, batch = phase(96)
print(_memory_of_a_step(take, meta, *batch), grown)
"""


def test_the_memory_of_a_step_is_what_a_process_grows_by():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    estimate, grown = map(int, done.stdout.split())
    assert grown > 150 << 20  # much more than what Python itself takes meanwhile
    assert 0.7 * grown < estimate < 1.3 * grown


class Take:
    """Steps that take as many microseconds as they have MACs."""

    def __init__(self, stepper: Stepper, meta: torch.nn.Module):
        self.stepper, self.meta, self.clock = stepper, meta, 0.0
        self.total, self.context = stepper.total, stepper.context

    def __call__(self, *arguments):
        step = self.stepper(*arguments)
        update = update_macs(self.context.recipe, self.meta)
        self.clock += 1e-6 * (step_macs(self.meta, step.size, **step.kind) + update)
        return step


def test_steps_that_differ_are_weighed_by_their_macs(monkeypatch, tmp_path):
    recipe = replace(RECIPE, splices="one", splice_probability=0.5, resize_start=0.5, ema=0.0)
    context = Context(recipe, load_dataset("digits", limit=200), tmp_path, torch.device("cpu"), threading.Event())
    arch = student_arch(recipe, 1, 10)
    task = build_task(recipe, Network(arch), Network(replace(arch, shortcuts="all")))
    meta = meta_task(recipe, arch)
    take = Take(Stepper(task, 2, context), meta)
    monkeypatch.setattr("rd_train.estimate.monotonic", lambda: take.clock)
    seconds, macs, timed = _timed_steps(take, meta, _endless(context, Meter()))
    # So that the mean over all steps can be told from these five, whichever kinds they were.
    assert (seconds, timed) == (pytest.approx(1e-6 * macs), 5)
    assert macs != pytest.approx(5 * (mean_step_macs(meta, 8, take.stepper.size_at) + update_macs(recipe, meta)))


def test_slow_steps_are_timed_until_a_limit(monkeypatch, tmp_path):
    context = Context(RECIPE, load_dataset("digits", limit=200), tmp_path, torch.device("cpu"), threading.Event())
    with torch.device("meta"):
        meta = CrossEntropy(Network(student_arch(RECIPE, 1, 10)))
    clock = itertools.count(0, 100)
    monkeypatch.setattr("rd_train.estimate.monotonic", lambda: next(clock))

    def take(number, images, labels):
        return Step({}, {"lr": 0.1}, 8, {})

    take.total, take.context = 8, context
    stream = _endless(context, Meter())
    assert _timed_steps(take, meta, stream)[::2] == (100, 1)
    context.stop.set()
    with pytest.raises(Stopped, match="nothing was written"):
        _timed_steps(take, meta, stream)


class Slow:
    """A split that makes one batch at a time, however many threads ask, and takes a fifth of a second for it."""

    ahead = 2

    def __init__(self, split: MemorySplit):
        self.split, self.lock = split, threading.Lock()
        self.labels, self.images = split.labels, split.images

    def __len__(self) -> int:
        return len(self.split)

    def augmented(self, *arguments) -> torch.Tensor:
        with self.lock:
            time.sleep(0.2)
        return self.split.augmented(*arguments)


def test_a_loader_that_is_slower_than_the_steps_is_what_takes_the_time(tmp_path):
    dataset = load_dataset("digits", limit=200)
    context = Context(RECIPE, replace(dataset, train=Slow(dataset.train)), tmp_path, torch.device("cpu"),
                      threading.Event())  # fmt: skip
    network = Network(student_arch(RECIPE, 1, 10))
    with torch.device("meta"):
        meta = CrossEntropy(Network(network.arch))
    assert measure("student", CrossEntropy(network), meta, 2, context).step_seconds >= 0.2


def test_a_teacher_is_measured_by_the_optimiser_of_the_run(monkeypatch, tmp_path):
    optimizers = {}

    def noted(name, task, meta, epochs, context):
        optimizers[name] = context.recipe.optimizer

    monkeypatch.setattr("rd_train.run.measure", noted)
    monkeypatch.setattr("rd_train.run.print_estimate", lambda phases, context: None)
    dry_run(replace(RECIPE, optimizer="muon"), tmp_path)
    assert optimizers == {"teacher": "muon", "student": "muon"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--width", "0.25", "--epochs", "2", "--train-limit", "100", "--method", "ce", "--dry"]
    assert run_command("rd-train", lambda: command(["digits", *flags])) == 0
    printed = capsys.readouterr().out
    arch = parse_arch("plain20", width=0.25, in_channels=1, classes=10)
    assert f"{macs_per_image(arch, 8):,} MACs per image" in printed
    assert [line.split()[0] for line in printed.splitlines()[-5:]] == ["student", "time", "memory", "disk", "note"]
    assert "runs/digits-ce-s0" in printed
    assert not list(tmp_path.iterdir())
    assert run_command("rd-train", lambda: command(["--resume", ".", "--dry"])) == 2
    assert "leave the other options away" in capsys.readouterr().err
