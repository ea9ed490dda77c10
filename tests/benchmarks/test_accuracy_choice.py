"""benchmarks/accuracy/choice.py: accuracy on the images that a run was not trained on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"
sys.path.append(str(FOLDER))  # as the script has it

import choice

from rd_deploy.common import UserError
from rd_train.checkpoint import load_checkpoint
from rd_train.data import load_dataset
from rd_train.recipe import Recipe
from rd_train.recipe_files import dump_yaml
from rd_train.run import run

RECIPE = Recipe(
    method="ce", arch="plain20", width=0.25, train_limit=300, epochs=1, warmup_epochs=0.5, batch_size=50, muon_lr=0.1,
    reparam="identity", precision="fp32", device="cpu", threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "plain20-some-s0"
    run(RECIPE, folder)
    return folder


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["choice.py", *map(str, arguments)])
    choice.command()


def test_accuracy_is_that_of_exactly_the_images_that_are_left(finished, tmp_path, monkeypatch):
    """Counted here from scikit-learn's own digits: all but the run's training, validation and test images."""
    call(monkeypatch, finished, "--results", tmp_path / "choice.json")
    document = json.loads((tmp_path / "choice.json").read_text())
    [found] = document["results"]
    pixels, labels = load_digits(return_X_y=True)
    of_run = load_dataset("digits", limit=300)
    used = np.concatenate([split.pixels.reshape(len(split), 64) for split in (of_run.train, of_run.val, of_run.test)])
    known = np.rint(pixels * 255 / 16).astype(np.uint8)
    seen = {tuple(image) for image in used}
    left = np.array([tuple(image) not in seen for image in known])
    assert found["left_out_images"] == left.sum() == len(known) - len(used)
    checkpoint = load_checkpoint(finished / "model.pt")
    images = torch.from_numpy(checkpoint.preprocessing.apply(known[left].reshape(-1, 8, 8, 1)))
    with torch.no_grad():
        right = checkpoint.network().eval()(images).argmax(1).numpy() == labels[left]
    assert found["left_out_accuracy"] == pytest.approx(right.mean(), abs=1e-9)
    result = json.loads((finished / "result.json").read_text())
    assert (found["val_accuracy"], found["test_accuracy"]) == (result["val_accuracy"], result["test_accuracy"])


def test_options_are_what_differs_from_the_default_and_has_an_effect(finished, tmp_path, monkeypatch):
    call(monkeypatch, finished, "--results", tmp_path / "choice.json")
    [found] = json.loads((tmp_path / "choice.json").read_text())["results"]
    # muon_lr has no effect by SGD, and init_noise=0.3 is what beside these branches is the default.
    options = {"batch_size": 50, "reparam": "identity", "warmup_epochs": 0.5, "width": 0.25}
    assert found["options"] == options
    assert (found["arch"], found["teacher"], found["name"]) == ("plain20", None, "plain20-some-s0")


def test_a_line_says_the_same_of_runs_of_all_days():
    """Before and after rd distilled logits by default."""
    former = {"kd_weight": 0.0, "kd_start": 0.0, "kd_probability": 1.0}
    logits = {"kd_weight": 0.5, "kd_start": 0.5, "kd_probability": 0.6}
    for options in ({"kd_weight": 0.0}, former):
        for arch in ("plain20", "plain56"):
            assert choice.differences(Recipe(arch=arch, **options)) == {}
    assert choice.differences(Recipe(arch="plain20")) == choice.differences(Recipe(arch="plain56", **logits)) == logits
    assert choice.differences(Recipe(arch="plain20", kd_probability=1.0)) == {"kd_weight": 0.5, "kd_start": 0.5}
    assert choice.differences(Recipe(arch="plain20", method="kd")) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [(None, "holds no finished run"), ({"train_limit": None}, "trained on all images")],
)
def test_runs_without_left_out_images_are_refused_before_anything_is_measured(
    finished, tmp_path, monkeypatch, change, reason
):
    other = tmp_path / "other"
    other.mkdir()
    if change:
        (other / "recipe.yaml").write_text(dump_yaml(Recipe(**RECIPE.to_dict() | change)))
        (other / "result.json").write_text("{}")
    with pytest.raises(UserError, match=reason):
        call(monkeypatch, finished, other, "--results", tmp_path / "choice.json")
    assert not (tmp_path / "choice.json").exists()


def test_earlier_results_of_other_runs_are_taken_over(finished, tmp_path, monkeypatch):
    call(monkeypatch, finished, "--results", tmp_path / "first.json")
    document = json.loads((tmp_path / "first.json").read_text())
    [first] = document["results"]
    stale, other = first | {"test_accuracy": 0.5}, first | {"name": "plain20-other-s0"}
    former = first | {"options": {"init": "kaiming"}}  # of that name once, by another recipe
    (tmp_path / "first.json").write_text(json.dumps(document | {"results": [stale, other, former]}))
    again = other | {"test_accuracy": 0.5}
    (tmp_path / "older.json").write_text(json.dumps(document | {"date": "2030-01-01", "results": [again]}))
    files = (tmp_path / "first.json", tmp_path / "older.json")
    call(monkeypatch, finished, "--earlier", *files, "--results", tmp_path / "second.json")
    second = json.loads((tmp_path / "second.json").read_text())
    origin = {key: document[key] for key in ("date", "commit", "machine", "note")} | {"file": "first.json"}
    assert second["results"] == [{"from": origin} | other, {"from": origin} | former, first]
    assert second["command"].endswith("--earlier first.json older.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"test_accuracy": 92.0}, "test_accuracy is not from 0 to 1"), ({"options": []}, "no object"), ({"arch": 3}, "")],
)
def test_a_damaged_file_of_earlier_results_is_refused(finished, tmp_path, monkeypatch, change, reason):
    call(monkeypatch, finished, "--results", tmp_path / "first.json")
    document = json.loads((tmp_path / "first.json").read_text())
    [first] = document["results"]
    (tmp_path / "damaged.json").write_text(json.dumps(document | {"results": [first | change]}))
    with pytest.raises(UserError, match=rf"{reason}.*takes what choice\.py wrote"):
        call(monkeypatch, finished, "--earlier", tmp_path / "damaged.json", "--results", tmp_path / "choice.json")
    (tmp_path / "damaged.json").write_text("[]")
    with pytest.raises(UserError, match=r"takes what choice\.py wrote"):
        call(monkeypatch, finished, "--earlier", tmp_path / "damaged.json", "--results", tmp_path / "choice.json")
    assert not (tmp_path / "choice.json").exists()
