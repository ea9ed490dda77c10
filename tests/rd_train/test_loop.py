"""Interruption and resume, bit by bit, with real signals to real processes; divergence; evaluation weights."""

import contextlib
import copy
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import environment, flags, run_rd_train, started
from steps import stepped
from torch.utils._python_dispatch import TorchDispatchMode

from rd_deploy.common import Stopped, UserError
from rd_train.build import build_student, build_task, meta_task, student_arch, teacher_arch
from rd_train.checkpoint import load_checkpoint, save_checkpoint
from rd_train.context import Context
from rd_train.data import batches, fixed_sample, load_dataset
from rd_train.distill import CrossEntropy
from rd_train.loop import Stepper, fit
from rd_train.networks import Network, fading_blocks, parse_arch
from rd_train.recipe import Recipe
from rd_train.run import run
from rd_train.schedules import learning_rate
from rd_train.state import State

RECIPE = Recipe(
    method="jointrd", arch="plain20", width=0.25, epochs=3, teacher_epochs=1, batch_size=50, lr=0.05, warmup_epochs=0.5,
    ema=0.9, clip_norm=1.0, train_limit=200, precision="fp32", device="cpu", threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(RECIPE, folder)
    return folder


def interrupt(folder: Path, when: str, how: signal.Signals) -> tuple[int, str]:
    """Start the run as a process and send a signal as soon as a file exists: the exit code, and what stderr got."""
    errors = folder.with_name("errors")
    process = started(run_rd_train, Path(os.devnull), errors, "digits", *flags(RECIPE), "--out", str(folder))
    deadline = time.monotonic() + 200
    while not (folder / when).exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    if process.is_alive():
        os.kill(process.pid, how)
    process.join(100)
    process.kill()  # should it not have ended
    return process.exitcode, errors.read_text()


def resume(folder: Path) -> tuple[int, str]:
    """The exit code, and what stderr got."""
    errors = folder.with_name("errors")
    process = started(run_rd_train, Path(os.devnull), errors, "--resume", str(folder))
    process.join(200)
    process.kill()
    return process.exitcode, errors.read_text()


def assert_same(one: Path, other: Path) -> None:
    states = [load_checkpoint(folder / "model.pt").state_dict for folder in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    results, logs = [], []
    for folder in (one, other):
        result = json.loads((folder / "result.json").read_text())
        results.append({name: value for name, value in result.items() if "seconds" not in name})
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k != "seconds" and "per_second" not in k} for row in rows])
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
    code, said = interrupt(tmp_path / "run", when, how)
    assert code == status, said
    assert not (tmp_path / "run" / "result.json").exists()
    code, said = resume(tmp_path / "run")
    assert code == 0, said
    assert_same(uninterrupted, tmp_path / "run")


def test_what_is_saved_within_an_epoch_is_gone_on_with_bit_by_bit(uninterrupted, tmp_path, monkeypatch):
    """Killed in the first epoch: by an error that nobody expects, in the step after one that was saved."""
    recipe = replace(RECIPE, save_minutes=1e-6, teacher_weights=str(uninterrupted / "teacher.pt"))
    run(recipe, tmp_path / "whole")

    def rate(step: int, total: int, **options) -> float:
        if step == 3:  # of 4
            raise ZeroDivisionError
        return learning_rate(step, total, **options)

    monkeypatch.setattr("rd_train.loop.learning_rate", rate)
    with pytest.raises(ZeroDivisionError):
        run(recipe, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "student-state.pt", weights_only=True)["step"] == 3
    monkeypatch.undo()
    run(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")
    run(replace(recipe, save_minutes=10.0), tmp_path / "rarely")  # saving changes nothing
    assert_same(tmp_path / "whole", tmp_path / "rarely")


def test_a_run_that_ended_between_a_network_and_its_state_tells_of_the_network_that_is_there(tmp_path, monkeypatch):
    """The epoch is repeated, on another machine with other sums, and may not be the best one any more."""
    recipe, save = replace(RECIPE, method="ce"), State.save

    def fails(state: State) -> None:
        if state.best["epoch"] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state)

    monkeypatch.setattr(State, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        run(recipe, tmp_path)
    there = load_checkpoint(tmp_path / "model.pt").provenance
    assert torch.load(tmp_path / "student-state.pt", weights_only=True)["best"]["epoch"] < there["epoch"]
    monkeypatch.undo()
    monkeypatch.setattr(State, "improves", lambda *arguments: False)
    result = run(recipe, tmp_path, resume=True)
    assert load_checkpoint(tmp_path / "model.pt").provenance == there
    assert (result["best_epoch"], result["val_accuracy"]) == (there["epoch"], there["val_accuracy"])


@pytest.mark.parametrize("lost", ["model.pt", "teacher.pt"])
def test_a_run_that_ended_between_a_student_and_its_learning_teacher_goes_on(tmp_path, monkeypatch, lost):
    recipe = replace(RECIPE, epochs=1, teacher_mode="joint", teacher_epochs=None)

    def fails(path: Path, checkpoint) -> None:
        if path.name == lost:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr("rd_train.loop.save_checkpoint", fails)
    with pytest.raises(OSError, match="No space left"):
        run(recipe, tmp_path)
    monkeypatch.undo()
    run(recipe, tmp_path, resume=True)
    epochs = [load_checkpoint(tmp_path / name).provenance["epoch"] for name in ("model.pt", "teacher.pt")]
    assert epochs == [1, 1]


def test_weights_that_are_no_numbers_are_not_saved_within_an_epoch(tmp_path, monkeypatch):
    def rate(step: int, total: int, **options) -> float:
        return learning_rate(step, total, **options) if step < 2 else math.inf

    monkeypatch.setattr("rd_train.loop.learning_rate", rate)
    with pytest.raises(Stopped, match="a weight became NaN or infinite before step 3; start anew with a lower --lr"):
        run(replace(RECIPE, method="ce", ema=0.0, clip_norm=0.0, save_minutes=1e-6), tmp_path)
    state = torch.load(tmp_path / "student-state.pt", weights_only=True)
    assert state["step"] == 2


def test_a_run_goes_on_with_as_many_images_only(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "teacher-state.pt", "student-state.pt"):
        (folder / name).write_bytes((uninterrupted / name).read_bytes())
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match=r"has 200 \+ 180 \+ 360 images \(training, validation, test\), .* 150 \+ 180"):
        run(replace(RECIPE, train_limit=150), folder, resume=True)
    assert (folder / "recipe.yaml").read_bytes() == before
    for images in (torch.zeros(2), [1.0], [200] * 4):
        state = torch.load(uninterrupted / "student-state.pt", weights_only=True)
        torch.save({**state, "images": images}, folder / "student-state.pt")
        with pytest.raises(UserError, match="does not fit its recipe"):
            run(RECIPE, folder, resume=True)


def test_an_epoch_is_saved_before_it_is_told(tmp_path, monkeypatch):
    def say(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")  # of the disk that the output goes to

    monkeypatch.setattr("rd_train.loop.say", say)
    with pytest.raises(OSError, match="No space"):
        run(replace(RECIPE, method="ce", epochs=1, ema=0.0), tmp_path)
    assert torch.load(tmp_path / "student-state.pt", weights_only=True)["step"] == 200 // 50
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_divergence_stops_with_the_last_good_state(tmp_path, monkeypatch):
    first_epoch = 200 // 50

    def rate(step: int, total: int, **options) -> float:
        return learning_rate(step, total, **options) if step < first_epoch else 1e30

    monkeypatch.setattr("rd_train.loop.learning_rate", rate)
    with pytest.raises(Stopped, match="NaN or infinite") as stopped:
        run(replace(RECIPE, method="ce", ema=0.0, clip_norm=0.0), tmp_path)
    assert stopped.value.code == 1
    assert "start anew with a lower --lr (or --muon-lr)" in str(stopped.value)
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


def test_a_teacher_is_trained_as_the_same_resnet_is_by_cross_entropy(tmp_path):
    """By the optimiser of the run, too, so that what teaches is what results are compared with."""
    recipe = replace(RECIPE, method="rd", optimizer="muon", epochs=1, ema=0.0)
    run(recipe, tmp_path / "rd")
    run(replace(recipe, method="ce", arch=recipe.arch.replace("plain", "resnet")), tmp_path / "ce")
    teacher = load_checkpoint(tmp_path / "rd" / "teacher.pt")
    resnet = load_checkpoint(tmp_path / "ce" / "model.pt").state_dict
    assert teacher.recipe["optimizer"] == "muon"
    assert all(torch.equal(teacher.state_dict[name], resnet[name]) for name in resnet)


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
    kept, given = (load_checkpoint(folder / "teacher.pt").state_dict for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(kept[name], value) for name, value in given.items())


def test_damaged_state_is_one_line(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text((uninterrupted / "recipe.yaml").read_text())
    (folder / "teacher-state.pt").write_bytes((uninterrupted / "teacher-state.pt").read_bytes()[:1000])
    command = [sys.executable, "-m", "rd_train", "--resume", str(folder)]  # itself, with all that Python says
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


# Everything that draws at random or changes with the step: a resume must repeat all of it.
LEVERS = replace(
    RECIPE, method="rd", init="dirac", reparam="branches", mixup=0.2, cutmix=1.0, resize_start=0.5,
    recalibrate=100, audit=True, teacher_bn="batch", epochs=2,
)  # fmt: skip


def stop_at(monkeypatch, step: int) -> None:
    """Stop in the student's step of that number as a signal does, which sets the event that the loop looks at.

    No real signal: pytest's workers may run tests in another thread than the main one, where no handler can be set, and
    would be killed. `interrupt` sends real ones, to processes of their own.
    """
    event = threading.Event()

    def rate(number: int, total: int, **options) -> float:
        if total == 8 and number == step:
            event.set()
        return learning_rate(number, total, **options)

    monkeypatch.setattr("rd_train.loop.learning_rate", rate)
    monkeypatch.setattr("rd_train.run.stop_on_signals", lambda: contextlib.nullcontext(event))


KD = {"kd_weight": 0.5, "kd_start": 0.3, "kd_probability": 0.5}
WARM = replace(RECIPE, method="rd", warm_start=True, epochs=2, ema=0.0, optimizer="muon", **KD)


@pytest.mark.parametrize("recipe", [LEVERS, WARM])
def test_resume_is_bit_equal_with_every_lever(recipe, tmp_path, monkeypatch):
    result = run(recipe, tmp_path / "whole")
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    run(recipe, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert result["step_cost"] > 1
    assert (tmp_path / "run" / "audit.png").exists() == recipe.audit


def test_a_warm_start_ends_as_a_plain_network_and_begins_as_the_teacher(uninterrupted, tmp_path):
    teacher = load_checkpoint(uninterrupted / "teacher.pt").state_dict
    flags = {"method": "kd", "warm_start": True, "teacher_weights": str(uninterrupted / "teacher.pt"), "ema": 0.0}
    run(replace(RECIPE, lr=1e-12, epochs=1, **flags), tmp_path)
    kept = load_checkpoint(tmp_path / "model.pt")
    assert kept.arch == parse_arch("plain20", width=0.25, in_channels=1, classes=10)
    assert not any("downsample" in name for name in kept.state_dict)
    weights = [name for name in kept.state_dict if name.endswith("conv1.weight")]
    assert all(torch.allclose(kept.state_dict[name], teacher[name], atol=1e-6) for name in weights)
    with pytest.raises(UserError, match="must be the ResNet of the plain plain32"):
        run(replace(RECIPE, arch="plain32", **flags), tmp_path / "other")


def test_shortcuts_fade_and_images_grow_with_the_steps(tmp_path):
    recipe = replace(RECIPE, method="kd", warm_start=True, warm_start_window=0.5, resize_start=0.5, resize_window=0.5)
    dataset = load_dataset("digits", size=16, limit=200)
    images, labels = next(batches(dataset.train, 50, seed=0, epoch=0))
    arch = student_arch(recipe, 1, 10)
    teacher = Network(replace(arch, shortcuts="all"))
    task = build_task(recipe, build_student(recipe, arch, teacher), teacher).train()
    take = Stepper(task, 2, Context(recipe, dataset, tmp_path, torch.device("cpu"), threading.Event()))
    sizes, weights = [], []
    task.student.conv1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    for number in (0, 2, 4, 7):  # of 8
        take(number, images, labels)
        weights.append([float(block.fading) for _, block in fading_blocks(task.student)])
    assert sizes == [8, 12, 16, 16]
    assert weights == [[1.0] * 9, [0.0] * 4 + [0.5] + [1.0] * 4, [0.0] * 9, [0.0] * 9]


def test_a_recalibrated_student_is_what_is_kept(tmp_path):
    run(replace(RECIPE, method="ce", epochs=1, ema=0.0, recalibrate=100), tmp_path)
    kept = load_checkpoint(tmp_path / "model.pt").state_dict
    split = load_dataset("digits", limit=200).train
    maps = torch.nn.functional.conv2d(
        split.images(fixed_sample(split, 100)).double(), kept["conv1.weight"].double(), padding=1
    )
    assert torch.allclose(kept["bn1.running_mean"].double(), maps.mean((0, 2, 3)), atol=1e-5)


def test_every_kind_of_step_is_compiled(tmp_path, monkeypatch):
    recipe = replace(RECIPE, method="rd", arch="plain18", stem="small", width=1 / 16, resize_start=0.5, compile=True)
    recipe = replace(recipe, kd_weight=0.5, kd_start=0.3, kd_probability=0.5, ema=0.0)
    dataset = load_dataset("digits", limit=200)
    images, labels = next(batches(dataset.train, 50, seed=0, epoch=0))
    arch = student_arch(recipe, 1, 10)
    task = build_task(recipe, Network(arch), Network(replace(arch, shortcuts="all"))).train()
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), threading.Event())
    # Traced but not built by Inductor, which would take minutes; an uncompiled step is an error.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # What a run sets ends here.
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        take = Stepper(task, 2, context)
        assert len(task.kinds()) == 8
        for size in (4, 6, 8):
            for kind in task.kinds():
                assert math.isfinite(take(0, images, labels, size=size, kind=kind).result["loss"].item())
    torch.compiler.reset()


def test_the_norm_of_the_gradient_is_that_before_clipping(tmp_path):
    recipe = replace(RECIPE, method="ce", ema=0.0, clip_norm=0.01)
    dataset = load_dataset("digits", limit=200)
    images, labels = next(batches(dataset.train, 50, seed=0, epoch=0))
    torch.manual_seed(0)
    network = Network(parse_arch("plain20", width=0.25, in_channels=1, classes=10)).train()
    other = copy.deepcopy(network).double()
    torch.nn.functional.cross_entropy(other(images.double()), labels).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in other.parameters()))
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), threading.Event())
    step = Stepper(CrossEntropy(network), 1, context)(0, images, labels)
    assert float(step.result["terms"]["gradient_norm"]) == pytest.approx(norm, rel=1e-3)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))
    assert clipped == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_each_optimiser_follows_the_schedule_from_its_own_peak(tmp_path, optimizer):
    recipe = replace(RECIPE, method="ce", ema=0.0, optimizer=optimizer, muon_lr=0.004, lr=0.05)
    take = stepped(recipe, tmp_path)
    expected = [0.05 / 2] * 2 + [0.004 / 2] * (optimizer == "muon")  # the first of two steps of warm-up
    assert [group["lr"] for group in take.optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_each_rate_that_moves_weights_is_logged(tmp_path, optimizer):
    recipe = replace(RECIPE, method="ce", ema=0.0, optimizer=optimizer, muon_lr=0.004, lr=0.05, epochs=1)
    run(recipe, tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    last = 0.5 * (1 + math.cos(math.pi / 2))  # two steps of warm-up; of the two of the cosine, the second
    expected = {"lr": 0.05 * last} | ({"muon_lr": 0.004 * last} if optimizer == "muon" else {})
    assert {name: row[name] for name in ("lr", "muon_lr") if name in row} == pytest.approx(expected)


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}, {}])
def test_the_kind_of_a_step_does_not_depend_on_how_many_images_a_process_has(tmp_path, mixing):
    recipe = replace(RECIPE, method="rd", ema=0.0, splice_probability=0.7, kd_weight=0.5, kd_probability=0.5, **mixing)
    dataset = load_dataset("digits", limit=200)
    images, labels = next(batches(dataset.train, 20, seed=0, epoch=0))
    arch = student_arch(recipe, 1, 10)
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), threading.Event())
    drawn = []
    for count in (20, 10, 4):  # of one process, of two, of five
        take = Stepper(build_task(recipe, Network(arch), Network(teacher_arch(recipe, arch))).train(), 25, context)
        drawn.append([take(number, images[:count], labels[:count]).kind for number in range(16)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({str(kind) for kind in drawn[0]}) > 3


class Copies(TorchDispatchMode):
    """Notes what is copied to the meta device, shape and dtype, apart by whether a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.waited_for, self.others = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result, options = function(*arguments, **(options or {})), options or {}
        if torch.is_tensor(result) and result.device.type == "meta":
            moved = torch.is_tensor(arguments[0]) and arguments[0].device.type == "cpu" if arguments else False
            if moved or function is torch.ops.aten.lift_fresh.default:  # which is how torch.tensor(..., device=) ends
                noted = self.others if options.get("non_blocking") else self.waited_for
                noted.append((tuple(result.shape), result.dtype))
        return result


@pytest.mark.parametrize(
    "own", [{"method": "rd", "mixup": 0.2, "cutmix": 1.0, "optimizer": "muon"}, {"clip_norm": 0.0}]
)
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, own):
    """Not until the log of the epoch: on the meta device, where nothing has a value, it is the first to fail."""
    recipe = replace(RECIPE, ema=0.0, epochs=1, **own)
    context = Context(recipe, load_dataset("digits", limit=200), tmp_path, torch.device("meta"), threading.Event())
    monkeypatch.setattr(Context, "cast", lambda self: contextlib.nullcontext())  # there is no autocast for it
    task = meta_task(recipe, student_arch(recipe, 1, 10))
    with Copies() as copies, pytest.raises(RuntimeError, match="meta tensors"):
        fit("student", task, 1, context, resume=False)
    assert context.view.phases[0].done == 200 // 50
    assert copies.others.count(((50, 1, 8, 8), torch.float32)) == 4
    assert copies.others.count(((50,), torch.int64)) == (8 if recipe.mixup else 4)
    assert {*copies.waited_for} == {((), torch.float64)}  # once an epoch: its sums begin on the CPU
    assert not (tmp_path / "metrics.jsonl").exists()
