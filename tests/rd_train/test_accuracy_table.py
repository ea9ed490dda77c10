"""The benchmark of accuracy: its rows are recipes that mean something, its summary is right."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rd_train.cli import _parse, _recipe
from rd_train.recipe import preset_values

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"
OPTIONS = Namespace(out=Path("runs/table"), epochs=10)


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(FOLDER))  # as a script has it
    try:
        spec = importlib.util.spec_from_file_location("accuracy_table", FOLDER / "table.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("runner", None)


def test_every_row_is_a_recipe_of_its_own(table):
    jobs = [table.job(row, depth, seed, OPTIONS) for row in table.ROWS for depth in (20, 56) for seed in (0, 1)]
    recipes = []
    for job in jobs:
        preset, *flags = job.flags
        recipes.append(_recipe(_parse(list(flags), preset_values(preset))))
        assert not recipes[-1].unused()
        assert (recipes[-1].method == "ce") == (recipes[-1].teacher_weights is None)
    assert len({job.folder for job in jobs}) == len(set(map(repr, recipes))) == len(jobs)
    assert {(recipe.size, recipe.epochs, recipe.train_limit, recipe.clip_norm) for recipe in recipes} == {
        (32, 10, 20_000, 1.0)
    }
    assert [job.name for job in jobs][::2] == table.names()
    assert recipes[0].arch == "resnet20"


def test_the_summary_is_mean_and_deviation_over_seeds(table):
    shared = {"epochs": 2, "train_images": 1280, "step_cost": 1.5, "seconds": 4.0}
    results = [{"name": "a", "seed": seed, "test_accuracy": 0.8 + 0.01 * seed, **shared} for seed in range(3)]
    row, single = table.summary([*results, {"name": "b", "seed": 0, "test_accuracy": 0.5, **shared}])
    assert (row["mean"], row["std"]) == pytest.approx((0.81, 0.01))
    assert (row["seeds"], row["plain_steps"], single["std"]) == ([0, 1, 2], 30.0, None)
