"""Several processes against one: the same result, from torchrun's environment, through kills, stops and errors.

Most tests start processes as `processes` does, with the environment that torchrun sets; torchrun itself starts those
that are killed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist
from photographs import write_imagenet
from processes import environment, flags, run_rd_train, started
from torch import nn

from rd_deploy.common import UserError
from rd_deploy.cpus import available_threads
from rd_train import distributed, loop
from rd_train import run as run_module
from rd_train.build import build_task, meta_task, student_arch, teacher_arch
from rd_train.checkpoint import load_checkpoint
from rd_train.data import batches, derive_seed, load_dataset
from rd_train.loop import STEP_SEED
from rd_train.networks import Network
from rd_train.optimizers import KernelMuon, build_optimizer
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.run import run
from rd_train.schedules import learning_rate
from rd_train.state import State
from rd_train.vary import mixed

SMALL = Recipe(
    init="dirac", init_noise=0.5,
    method="ce", arch="plain20", width=0.25, epochs=2, teacher_epochs=1, batch_size=40, lr=0.05, warmup_epochs=0.5,
    train_limit=120, precision="fp32", device="cpu", threads=1,
)  # fmt: skip


# --- starting processes


@dataclass
class Group:
    """Processes that were started together, as torchrun does, and what they wrote."""

    processes: list
    folder: Path
    store: dist.TCPStore  # by which they find each other; torchrun has one of its own, for all attempts of a launch
    restarts: int

    def join(self) -> list[int]:
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]

    def text(self, stream: str, rank: int) -> str:
        return (self.folder / f"{stream}{rank}").read_text()


def start(function, folder: Path, *arguments, world: int = 2, after: Group | None = None) -> Group:
    """Run ``function(*arguments)``, which returns an exit code, in ``world`` processes that can find each other.

    ``after``: the attempt of the same launch that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = after.store if after else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    restarts = after.restarts + 1 if after else 0
    common = {
        "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": restarts,
    }  # fmt: skip
    processes = []
    for rank in range(world):
        values = {**common, "RANK": rank, "LOCAL_RANK": rank}
        out, err = folder / f"out{rank}", folder / f"err{rank}"
        processes.append(started(leaving, out, err, function, *arguments, values=values))
    return Group(processes, folder, store, restarts)


def leaving(function, *arguments) -> NoReturn:
    distributed.leave(function(*arguments))


def train(recipe: Recipe, out: Path, *arguments: str, mishap: str = "", **options) -> Group:
    """rd-train in a group; ``mishap`` happens to the second process in its fourth step."""
    streams = out.parent / f"{out.name}-streams"
    return start(command, streams, mishap, "digits", *flags(recipe), "--out", str(out), *arguments, **options)


def command(mishap: str, *arguments: str) -> int:
    from rd_train import loop

    def rate(step: int, total: int, **options) -> float:
        if step == 3 and os.environ["RANK"] == "1":
            if mishap == "user error":
                raise UserError("image 7 is bad")
            if mishap:
                os.kill(os.getpid(), getattr(signal, mishap))
        return learning_rate(step, total, **options)

    loop.learning_rate = rate
    return run_rd_train(*arguments)


def train_all(recipes: dict[str, Recipe], folder: Path) -> int:
    """Train several recipes one after the other, which saves starting processes."""

    def all_of_them() -> int:
        for name, recipe in recipes.items():
            run(recipe, folder / name)
        return 0

    return distributed.run_together("test", all_of_them)


def state_of(folder: Path) -> dict:
    return torch.load(folder / "student-state.pt", weights_only=True)


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds" and "per_second" not in k} for row in rows]


def furthest(one: dict, other: dict) -> float:
    """The largest difference of two sets of tensors, relative to the norm of each tensor."""
    assert set(one) == set(other)
    floats = [name for name, value in one.items() if value.is_floating_point()]
    return max(float((one[name] - other[name]).norm() / (1e-3 + other[name].norm())) for name in floats)


# --- two processes equal one

EPOCH = replace(SMALL, epochs=1)  # three steps
RD = replace(EPOCH, method="rd", clip_norm=1.0, teacher_bn="batch", kd_weight=0.0, ema=0.9, splices="one")
# BN by the whole batch: equal to one process.
SYNCED = {
    "rd": replace(RD, sync_bn=True, recalibrate=60, audit=True, save_minutes=1e-6),  # after each step
    "with branches": replace(RD, init="identity", init_noise=0.3, reparam="identity", sync_bn=True),
    "jointrd": replace(EPOCH, method="jointrd", sync_bn=True, teacher_mode="joint", clip_norm=1.0),
    # The connectors of splices that have ended get no gradient.
    "jointrd that ends": replace(EPOCH, method="jointrd", sync_bn=True, splice_weight_end=0.0, splice_window=0.3),
}
# BN by each process's slice: equal to one process that forwards the slices one after the other.
SLICED = {
    "rd, sliced": replace(RD, splice_probability=0.6, mixup=0.2, cutmix=1.0, kd_weight=0.3),
    "jointrd, sliced": replace(SYNCED["jointrd"], sync_bn=False, save_minutes=1e-6),
    "rd by Muon, sliced": replace(RD, optimizer="muon", train_limit=RD.batch_size),
}
WHOLE = replace(SMALL, epochs=12, batch_size=60, ema=0.9)
TOLERANCE = 2e-4  # of float32 sums in another order, after three steps


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    run(replace(EPOCH, arch="resnet20"), folder)
    return str(folder / "model.pt")


def taught(recipe: Recipe, teacher: str) -> Recipe:
    return (
        recipe if recipe.method == "ce" or recipe.teacher_mode == "joint" else replace(recipe, teacher_weights=teacher)
    )


@pytest.fixture(scope="module")
def two(teacher, tmp_path_factory):
    """Every recipe above, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    recipes = {name: taught(recipe, teacher) for name, recipe in {**SYNCED, **SLICED, "whole": WHOLE}.items()}
    group = start(train_all, folder, recipes, folder)
    assert group.join() == [0, 0], group.text("err", 0) + group.text("err", 1)
    return folder


@pytest.mark.parametrize("name", SYNCED)
def test_two_processes_equal_one_with_the_same_global_batch(name, two, teacher, tmp_path):
    run(taught(SYNCED[name], teacher), tmp_path)
    ours, expected = state_of(two / name), state_of(tmp_path)
    assert furthest(ours["task"], expected["task"]) < TOLERANCE
    if expected["averaged"] is not None:
        assert furthest(ours["averaged"], expected["averaged"]) < TOLERANCE
    for mine, theirs in zip(rows_of(two / name), rows_of(tmp_path), strict=True):
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine["val_accuracy"] == theirs["val_accuracy"]
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    # Without sync_bn it is another result: the tolerance is narrow enough to tell.
    if name == "jointrd":
        assert furthest(state_of(two / "jointrd, sliced")["task"], expected["task"]) > 10 * TOLERANCE


def by_slices(recipe: Recipe, teacher: str, world: int = 2) -> tuple[dict, dict, dict]:
    """Task, moving average (or {}) and optimiser of one process that forwards the slices of a batch one by one.

    Each slice has running statistics of its own, whose means are returned.
    """
    dataset = load_dataset("digits", limit=recipe.train_limit)
    arch = student_arch(recipe, 1, 10)
    torch.manual_seed(recipe.seed)
    network = (
        Network(teacher_arch(recipe, arch)) if recipe.teacher_mode == "joint" else load_checkpoint(teacher).network()
    )
    torch.manual_seed(recipe.seed)
    student = Network(arch, recipe.init, recipe.init_noise).to(memory_format=torch.channels_last)  # as momenta are
    task = build_task(recipe, student, network).train()
    optimizer, total, average = build_optimizer(recipe, task), recipe.train_limit // recipe.batch_size, {}
    buffers = [{name: value.clone() for name, value in task.named_buffers()} for _ in range(world)]
    for step, (images, labels) in enumerate(batches(dataset.train, recipe.batch_size, seed=0, epoch=0)):
        optimizer.zero_grad()
        for rank, (x, y) in enumerate(zip(images.chunk(world), labels.chunk(world), strict=True)):
            generator = np.random.default_rng(derive_seed(STEP_SEED, recipe.seed, step))
            outcomes = task.outcomes(step / total)
            outcome = outcomes[generator.choice(len(outcomes), p=[p for p, _ in outcomes])][1]
            if recipe.mixup:
                x, y = mixed(x, y, 10, mixup=recipe.mixup, cutmix=recipe.cutmix, generator=generator)
            for name, value in task.named_buffers():
                value.copy_(buffers[rank][name])
            (task(x, y, torch.tensor(step / total), **outcome)["loss"] / world).backward()
            buffers[rank] = {name: value.clone() for name, value in task.named_buffers()}
        for part in task.children():
            parameters = [p for p in part.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, peak=group["initial_lr"], kind="cosine", warmup=round(total / 2))
        optimizer.step()
        for name, value in task.named_buffers():
            value.copy_(torch.stack([own[name].double() for own in buffers]).mean(0))
        for name, value in task.student.state_dict().items():
            before = average.get(name, value)
            average[name] = (recipe.ema * before + (1 - recipe.ema) * value).to(value.dtype)
    return task.state_dict(), average, optimizer.state_dict()


def drift(recipe: Recipe, folder: Path) -> int:
    """Train by Muon where the second process rounds otherwise, and keep what each has saved."""
    step, save = KernelMuon.step, State.save

    @torch.no_grad()
    def drifted(optimizer) -> None:
        step(optimizer)
        for kernel in optimizer.kernels:
            kernel *= 1 + 1e-3 * distributed.rank()

    def saved(state) -> None:
        torch.save([state.task.state_dict(), state.averaged.state_dict()], folder / f"weights{distributed.rank()}")
        save(state)

    KernelMuon.step, State.save = drifted, saved
    return distributed.run_together("test", lambda: run(recipe, folder / "run") and 0)


def test_weights_that_drifted_apart_are_one_again_after_an_epoch(teacher, tmp_path):
    group = start(drift, tmp_path, taught(replace(RD, optimizer="muon"), teacher), tmp_path)
    assert group.join() == [0, 0], group.text("err", 0) + group.text("err", 1)
    both = [torch.load(tmp_path / f"weights{rank}", weights_only=True) for rank in range(2)]
    for one, other in zip(*both, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SLICED)
def test_without_sync_bn_two_processes_equal_one_that_normalises_by_slices(name, two, teacher):
    recipe, ours = SLICED[name], state_of(two / name)
    task, average, optimizer = by_slices(recipe, teacher)
    if recipe.optimizer == "muon":
        # It makes all singular values of a gradient one, those that are but rounding, too: so what it is given is
        # compared, that it moves something, and all that it does not move, in the one step before that matters.
        momenta = [state["optimizer"]["parts"][1]["state"] for state in (ours, {"optimizer": optimizer})]
        found, expected = ({number: each["momentum_buffer"] for number, each in m.items()} for m in momenta)
        assert furthest(found, expected) < TOLERANCE
        kernels = {name for name, value in task.items() if value.ndim == 4 and name.startswith("student")}
        assert len(kernels) == len(expected)
        start = Network(student_arch(recipe, 1, 10), recipe.init, recipe.init_noise).state_dict()
        moved = [ours["task"][name] - start[name.removeprefix("student.")] for name in kernels]
        ours["task"], task = ({k: v for k, v in state.items() if k not in kernels} for state in (ours["task"], task))
        assert all(float(change.norm()) > 1e-3 for change in moved)
    if recipe.teacher_mode == "frozen":  # is no part of the state
        task = {name: value for name, value in task.items() if not name.startswith("teacher.")}
    assert furthest(ours["task"], task) < TOLERANCE
    if recipe.ema:
        averaged = {name.removeprefix("module."): value for name, value in ours["averaged"].items()}
        averaged.pop("n_averaged")
        if recipe.optimizer == "muon":
            averaged, average = ({k: v for k, v in each.items() if v.ndim < 4} for each in (averaged, average))
        assert furthest(averaged, average) < TOLERANCE


def train_on_corrupt_images(recipe: Recipe, folder: Path) -> int:
    """Train as often as named below, where each process meets a corrupt image; keep what each says of it."""

    def all_of_them() -> int:
        for name, limit, every in (("enough", 2, 20), ("at the end", 1, 20), ("early", 1, 1)):
            steps, loop.CHECK_EVERY = [], every
            loop.learning_rate = lambda *numbers, steps=steps, **options: (
                steps.append(numbers[0]) or learning_rate(*numbers, **options)
            )
            try:
                run(replace(recipe, max_corrupt=limit), folder / name)
                said = ""
            except UserError as error:
                said = str(error)
            (folder / f"{name}-{distributed.rank()}.json").write_text(json.dumps([said, max(steps)]))
        return 0

    return distributed.run_together("test", all_of_them)


def test_corrupt_images_of_all_processes_are_counted_before_anything_of_an_epoch_is_kept(tmp_path):
    write_imagenet(tmp_path / "data", train=24)
    recipe = replace(EPOCH, data="folder", data_dir=str(tmp_path / "data"), size=16, train_limit=None, batch_size=8,
                     workers=0)  # fmt: skip
    split = load_dataset("folder", tmp_path / "data", size=16).train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(0, 0)))
    bad, steps = order[[3, 4]].tolist(), len(split) // 8  # of the first batch, whose halves are the two processes'
    assert 3 <= steps < 20
    for index in bad:
        path = tmp_path / "data" / "train" / split.listing.files[index]
        path.write_bytes(path.read_bytes()[:200])
    group = start(train_on_corrupt_images, tmp_path, recipe, tmp_path)
    assert group.join() == [0, 0], group.text("err", 0) + group.text("err", 1)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert json.loads((tmp_path / "enough" / "result.json").read_text())["corrupt_images"] == 2
    assert rows_of(tmp_path / "enough")[0]["corrupt_images"] == 2
    named = [line.partition("\t")[0] for line in (tmp_path / "enough" / "skipped.txt").read_text().splitlines()]
    assert set(named) == {f"train/{split.listing.files[index]}" for index in bad}
    for name in ("at the end", "early"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {"recipe.yaml", "skipped.txt"}
    for rank in range(2):
        assert found[f"enough-{rank}"] == ["", steps - 1]
        for name, last in (("at the end", steps - 1), ("early", 0)):
            said, reached = found[f"{name}-{rank}"]
            assert "more corrupt images than rd-train's --max-corrupt 1" in said
            assert reached == last


def test_the_first_process_alone_prints_and_writes(two):
    assert "2 processes, cpu" in (two / "out0").read_text()
    assert (two / "out1").read_text() == ""
    written = {path.name for path in (two / "rd").iterdir()}
    assert written >= {"model.pt", "result.json", "report.md", "curves.png", "audit.png", "recipe.yaml"}
    assert not [name for name in written if name.startswith(".")]
    assert json.loads((two / "rd" / "result.json").read_text())["processes"] == 2


def bn_by_slices(folder: Path) -> int:
    """Forward, running statistics and gradients of a `SyncBatchNorm2d` on this process's half of a batch."""

    def halves() -> int:
        x, weights, bn = bn_and_batch()
        mine = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
        distributed.synchronise_bn(bn)
        x = x[mine].requires_grad_()
        y = bn(x)
        (y * weights[mine]).sum().backward()
        distributed.average([bn.weight.grad, bn.bias.grad])
        values = [y.detach(), x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var]
        torch.save([*values, bn.eval()(x.detach())], folder / f"{distributed.rank()}.pt")
        return 0

    return distributed.run_together("test", halves)


def bn_and_batch() -> tuple[torch.Tensor, torch.Tensor, nn.BatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn((2, 6, 4, 3, 5), generator=generator, dtype=torch.float64)
    bn = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        bn.weight.copy_(torch.rand(4, generator=generator)), bn.bias.copy_(torch.rand(4, generator=generator))
    return 3 * x + 100, weights, bn


def test_bn_of_all_processes_is_bn_of_the_whole_batch(tmp_path):
    group = start(bn_by_slices, tmp_path, tmp_path)
    assert group.join() == [0, 0], group.text("err", 0)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x, weights, bn = bn_and_batch()
    y = bn(x.requires_grad_())
    (y * weights).sum().backward()
    both = [torch.cat([one, other]) for one, other in zip(first[:2], second[:2], strict=True)]
    torch.testing.assert_close(both, [y.detach(), x.grad], rtol=1e-9, atol=1e-9)
    expected = [bn.weight.grad / 2, bn.bias.grad / 2, bn.running_mean, bn.running_var]
    for ours in (first, second):
        torch.testing.assert_close(ours[2:6], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([first[6], second[6]]), bn.eval()(x.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "static"),
    [
        ({"method": "ce"}, True),
        ({"method": "jointrd", "teacher_mode": "joint"}, True),
        ({"method": "rd", "splices": "all", "splice_weight_end": 0.1}, True),
        ({"method": "rd", "splices": "all", "splice_weight_end": 0.0}, False),
        ({"method": "rd", "splices": "one"}, False),
        ({"method": "jointrd", "splice_weight_end": 0.0}, False),
    ],
)
def test_the_graph_is_static_where_all_steps_are_of_one_kind(options, static, monkeypatch):
    recipe, given = replace(SMALL, **options), {}
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda module, **options: given.update(options))
    task = meta_task(recipe, student_arch(recipe, 1, 10))
    distributed.data_parallel(task, task)
    assert given["static_graph"] == static
    # Only a splice with a connector can be left out of a graph that changes: jointrd's, whose end is 0.
    assert given["find_unused_parameters"] == (recipe.method == "jointrd" and not static)


def agreements(folder: Path) -> int:
    """What each of the processes gets from what they have to agree on."""

    def agree() -> int:
        rank = distributed.rank()
        same = torch.tensor([0.1, 1 / 3, 1e-30])
        other = torch.tensor([float(rank)])
        distributed.average([same, other])
        with distributed.one_per_machine_first(True):
            alone = not list(folder.glob("*.done"))
            (folder / f"{rank}.done").touch()
        found = {
            "text": distributed.of_first(f"text of {rank}: é"),
            "any": [distributed.any_process(rank == 2), distributed.any_process(False)],
            "same": [distributed.same_everywhere(7), distributed.same_everywhere(rank == 1)],
            "totals": distributed.totals([1, rank / 2]),
            "average": [torch.equal(same, torch.tensor([0.1, 1 / 3, 1e-30])), other.item()],
            "alone": alone,
            "threads": settle(Recipe(data_dir=f"data{rank}")).threads,
            "data_dir": Path(settle(Recipe(data_dir=f"data{rank}")).data_dir).name,
        }
        (folder / f"{rank}.json").write_text(json.dumps(found))
        return 0

    return distributed.run_together("test", agree)


def test_processes_agree(tmp_path):
    group = start(agreements, tmp_path, tmp_path, world=3)
    assert group.join() == [0, 0, 0], group.text("err", 0)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "text": "text of 0: é",
            "any": [True, False],
            "same": [True, False],
            "totals": [3, 1.5],
            "average": [True, 1.0],
            "alone": rank == 0,
            "threads": max(1, available_threads() // 3),
            "data_dir": "data0",
        }


def test_one_process_started_by_torchrun_trains_as_it_does_without(tmp_path):
    recipe = replace(EPOCH, sync_bn=True)
    assert train(recipe, tmp_path / "run", world=1).join() == [0]
    run(recipe, tmp_path / "whole")
    states = [state_of(tmp_path / name)["task"] for name in ("run", "whole")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- stops, kills, restarts


def one_line(group: Group) -> str:
    """What both processes said on stderr, which must be one line."""
    said = [line for rank in range(2) for line in group.text("err", rank).splitlines()]
    assert len(said) == 1, said
    return said[0]


def test_a_signal_to_one_stops_all_at_the_same_step_and_one_process_can_go_on(two, tmp_path):
    recipe = replace(WHOLE, epochs=2, batch_size=20, lr=1e-3, sync_bn=True)
    group = train(recipe, tmp_path / "run", mishap="SIGTERM")
    assert group.join() == [130, 130]
    assert "rd-train --resume" in one_line(group)
    assert state_of(tmp_path / "run")["step"] == 4
    run(recipe, tmp_path / "run", resume=True)  # now one process
    run(recipe, tmp_path / "whole")
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2]
    states = [state_of(tmp_path / name)["task"] for name in ("run", "whole")]
    assert furthest(*states) < TOLERANCE


@pytest.mark.parametrize(
    ("mishap", "codes", "says"),
    [("user error", [1, 2], "image 7 is bad"), ("SIGKILL", [1, -9], "another process ended")],
)
def test_what_happens_to_one_process_is_said_once_and_ends_all(mishap, codes, says, tmp_path):
    group = train(SMALL, tmp_path / "run", mishap=mishap)
    assert group.join() == codes
    assert says in one_line(group)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "41"], "must be a multiple of 2"),
        (["--epochs", "many"], "epochs=many is not a whole number"),
        (["--out", ""], "--out"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2_in_all_processes(arguments, says, tmp_path):
    group = train(SMALL, tmp_path / "run", *arguments)
    assert group.join() == [2, 2]
    assert says in one_line(group)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_launch_is_refused_after_a_restart_as_well(two):
    group = train(WHOLE, two / "whole")
    assert group.join() == [2, 2]
    assert "already holds recipe.yaml" in one_line(group)
    again = train(WHOLE, two / "whole", after=group)  # as torchrun does after any error
    assert again.join() == [2, 2]
    assert "already holds recipe.yaml" in one_line(again)


def test_a_run_of_another_launch_is_gone_on_with_where_that_is_asked_for(two):
    group = train(WHOLE, two / "whole", "--go-on")
    assert group.join() == [0, 0]
    assert "test accuracy" in group.text("out", 0)
    other = train(replace(WHOLE, seed=5), two / "whole", "--go-on")
    assert other.join() == [2, 2]
    assert "holds another run, seed=0 there, 5 here" in one_line(other)


def train_in_folders(recipe: Recipe, folder: Path) -> int:
    """Train in a folder that is another one for each process, as on machines that do not share it."""
    run_module.SEEN_WITHIN = 0.5
    return distributed.run_together("test", lambda: run(recipe, folder / str(distributed.rank())) and 0)


def test_a_folder_that_is_not_shared_is_noticed_before_anything_is_trained(tmp_path):
    group = start(train_in_folders, tmp_path, replace(SMALL, method="rd"), tmp_path)
    assert group.join() == [2, 2]
    assert "the processes see different files in" in one_line(group)
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["recipe.yaml"]
    assert not (tmp_path / "1").exists()


def check_copies(folder: Path) -> int:
    """Look whether a folder is shared, of which each process has a copy of its own."""
    run_module.SEEN_WITHIN = 0.5

    def check() -> int:
        own = folder / str(distributed.rank())
        own.mkdir()
        (own / "recipe.yaml").write_text("the same")
        os.utime(own / "recipe.yaml", ns=(0, 1 + distributed.rank()))  # the clock of files is coarse
        distributed.barrier()
        run_module._check_shared(own)
        return 0

    return distributed.run_together("test", check)


def test_copies_of_a_folder_are_not_a_shared_one(tmp_path):
    group = start(check_copies, tmp_path, tmp_path)
    assert group.join() == [2, 2]
    assert "the processes see different files in" in one_line(group)


def test_a_restarted_launch_goes_on_with_its_own_run_and_tells_its_result(tmp_path):
    recipe = replace(SMALL, epochs=2, train_limit=80)
    group = train(recipe, tmp_path / "run", mishap="SIGKILL")  # in the second epoch
    assert group.join() == [1, -9]
    assert not (tmp_path / "run" / "result.json").exists()
    again = train(recipe, tmp_path / "run", after=group)
    assert again.join() == [0, 0]
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 2]
    last = train(recipe, tmp_path / "run", after=again)  # everything was written when a process died
    assert last.join() == [0, 0]
    for attempt in (again, last):
        assert "test accuracy" in attempt.text("out", 0)


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """Process id of torchrun's worker of this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except OSError:  # it has ended meanwhile
            continue
    raise AssertionError(f"no worker of rank {rank}")


def test_a_killed_worker_is_survived(two, tmp_path):
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    arguments += ["-m", "rd_train", "digits", *flags(WHOLE), "--out", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=log, stderr=log)
        while not (tmp_path / "run" / "student-state.pt").exists() and launcher.poll() is None:
            time.sleep(0.002)
        os.kill(worker(launcher, 1), signal.SIGKILL)
        assert not (tmp_path / "run" / "result.json").exists()
        assert launcher.wait(200) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("machine  2 processes") == 2
    states = [state_of(folder) for folder in (tmp_path / "run", two / "whole")]
    assert all(torch.equal(value, states[1]["task"][name]) for name, value in states[0]["task"].items())
    assert rows_of(tmp_path / "run") == rows_of(two / "whole")


LEAVES = """
import atexit, sys, threading, time
from rd_train import distributed
atexit.register(print, "taken down")
threading.Thread(target=time.sleep, args=(600,)).start()
print("said", end="")
distributed.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_leaves_with_what_it_said_and_does_not_wait_for_threads(code):
    ended = subprocess.run([sys.executable, "-c", LEAVES, str(code)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "said", "")


def test_too_few_gpus_are_one_line(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        distributed.device("cuda")
