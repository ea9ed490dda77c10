"""What is taken from the state of a phase and what is not (resuming is tested with the loop)."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from steps import stepped

from rd_deploy.common import UserError
from rd_train.checkpoint import load_checkpoint, save_plain
from rd_train.context import Context
from rd_train.data import load_dataset
from rd_train.distill import ResidualDistillation
from rd_train.networks import Network, parse_arch
from rd_train.optimizers import build_optimizer
from rd_train.recipe import Recipe
from rd_train.state import State, check_images, saved_preprocessing


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_state_brings_momenta_and_no_rates(tmp_path, optimizer):
    """That of an earlier version may not know of the rates, and a hostile one may hold anything."""
    recipe = Recipe(method="ce", optimizer=optimizer, batch_size=50, precision="fp32", device="cpu", threads=1)
    take = stepped(recipe, tmp_path)
    state = State(take.context, "student", take.task, take.optimizer, None)
    expected = [{k: v for k, v in group.items() if k != "params"} for group in take.optimizer.param_groups]
    momenta = [values["momentum_buffer"].clone() for values in take.optimizer.state.values()]

    values = copy.deepcopy(state.values())
    parts = values["optimizer"].get("parts", [values["optimizer"]])
    for group in [group for part in parts for group in part["param_groups"]]:
        group |= {"initial_lr": "much", "momentum": 7.0}
    for kept in [kept for part in parts for kept in part["state"].values()]:
        kept["momentum_buffer"] += 1
    save_plain(state.path, values)
    state.load(8)
    found = [{k: v for k, v in group.items() if k != "params"} for group in take.optimizer.param_groups]
    assert found == expected
    for before, after in zip(momenta, take.optimizer.state.values(), strict=True):
        assert torch.equal(after["momentum_buffer"], before + 1)

    parts[-1]["state"][0]["momentum_buffer"] = torch.zeros(3)
    save_plain(state.path, values)
    with pytest.raises(UserError, match="does not fit"):
        state.load(8)


def test_a_frozen_teacher_is_no_part_of_the_state_and_one_that_learns_is(tmp_path):
    arch = parse_arch("plain20", width=1 / 16, in_channels=1, classes=10)

    def state(**options) -> State:
        teacher = Network(replace(arch, shortcuts="all"))
        task = ResidualDistillation(Network(arch), teacher, **options)
        recipe = Recipe(method="jointrd", precision="fp32", device="cpu", threads=1)
        context = Context(recipe, load_dataset("digits", limit=200), tmp_path, torch.device("cpu"), threading.Event())
        return State(context, "student", task, build_optimizer(recipe, task), None)

    for learns, parts in ((True, {"student", "connectors", "teacher"}), (False, {"student", "connectors"})):
        one, other = state(train_teacher=learns), state(train_teacher=learns)
        assert {name.partition(".")[0] for name in one.values()["task"]} == parts
        one.save()
        own = other.task.teacher.fc.weight.clone()
        other.load(8)
        assert torch.equal(other.task.student.fc.weight, one.task.student.fc.weight)
        assert torch.equal(other.task.teacher.fc.weight, one.task.teacher.fc.weight if learns else own)
    # A frozen one that a file holds all the same does not count.
    torch.save({**one.values(), "task": one.task.state_dict()}, one.path)
    other.load(8)
    assert torch.equal(other.task.teacher.fc.weight, own)


def test_a_state_may_be_larger_than_files_of_others(tmp_path):
    """Refused for what is in it, which a smaller one would be, too."""
    path = tmp_path / "student-state.pt"
    with path.open("wb") as file:
        file.truncate(5 << 30)  # takes no place on the disk
    for read in (saved_preprocessing, lambda folder: check_images(folder, (1, 1, 1))):
        with pytest.raises(UserError, match="is truncated, or not a torch file"):
            read(tmp_path)
    path.rename(tmp_path / "model.pt")
    with pytest.raises(UserError, match="more than the 4,294,967,296 that are read"):
        load_checkpoint(tmp_path / "model.pt")
