"""What is taken from the state of a phase and what is not (resuming is tested with the loop)."""

import copy

import pytest
import torch
from steps import stepped

from rd_deploy.common import UserError
from rd_train.checkpoint import save_plain
from rd_train.recipe import Recipe
from rd_train.state import State


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
