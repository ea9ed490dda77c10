"""rd-train as its users call it: errors of one line with exit code 2, and the files of a run."""

import json
from pathlib import Path

import pytest
import yaml

from rd_deploy.common import run_command
from rd_train.cli import command
from rd_train.recipe import preset_names

FASHION = Path("/usr/share/datasets/fashion-mnist")
SMALL = ["--arch", "plain20", "--width", "0.25", "--train_limit", "200", "--threads", "1", "--batch_size", "50",
         "--warmup_epochs", "0.2"]  # fmt: skip


def call(*arguments: str) -> int:
    return run_command("rd-train", lambda: command(list(arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "nested" / "run"
    assert call("digits", *SMALL, "--epochs", "2", "--out", str(folder)) == 0
    return folder


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"model.pt", "teacher.pt", "metrics.jsonl", "curves.png", "recipe.yaml", "result.json", "report.md"}
    assert not [name for name in names if name.startswith(".")]
    result = json.loads((finished / "result.json").read_text())
    assert {"test_accuracy", "teacher_test_accuracy", "val_accuracy", "epochs", "seed", "method", "step_cost",
            "seconds"} <= set(result)  # fmt: skip
    assert 0 <= result["test_accuracy"] <= 1
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        ("teacher", 1),
        ("teacher", 2),
        ("student", 1),
        ("student", 2),
    ]
    assert {"ce", "feature", "splice1_ce", "splice2_ce", "splice1_feature", "splice2_feature"} <= set(rows[-1])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['test_accuracy']:.2%}" in (finished / "report.md").read_text()


def test_the_saved_recipe_is_what_ran(finished):
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert (values["epochs"], values["width"], values["data"], values["threads"]) == (2, 0.25, "digits", 1)
    assert values["precision"] in ("fp32", "bf16")  # auto was settled


def test_best_epoch_is_validations(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    students = [row for row in rows if row["phase"] == "student"]
    best = max(students, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    result = json.loads((finished / "result.json").read_text())
    assert (result["best_epoch"], result["val_accuracy"]) == (best["epoch"], best["val_accuracy"])


def test_a_finished_run_is_neither_resumed_nor_overwritten_by_accident(finished, capsys):
    before = (finished / "model.pt").read_bytes()
    assert call("--resume", str(finished)) == 2
    assert "already complete" in capsys.readouterr().err
    assert call("digits", *SMALL, "--out", str(finished)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "did you mean 'digits'"),
        (["--epochs", "0"], "epochs=0 must be positive"),
        (["--epochs", "many"], "epochs"),
        (["--epocs", "3"], "--epocs"),
        (["--method", "foo"], "method"),
        (["--arch", "plain21"], "unknown architecture 'plain21'"),
        (["--data", "cifar"], "cifar10"),
        (["--data", "fashion-mnist", "--data_dir", "nowhere"], "nowhere"),
        (["--teacher_weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--teacher", "resnet18"], "same family"),
        (["--resume", "nowhere"], "holds no run"),
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--resume", ".", "--epochs", "3"], "leave the other options away"),
        (["--device", "cuda"], "no GPU"),
        (["--precision", "fp16"], "precision"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments == ["--device", "cuda"]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert call("digits", *SMALL, "--out", str(out)) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_list_names_the_presets(capsys):
    assert call("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in preset_names())


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"needs Debian's dataset-fashion-mnist ({FASHION})")
def test_fashion_mnist_smoke(tmp_path):
    flags = ["--width", "0.25", "--train_limit", "400", "--epochs", "1", "--warmup_epochs", "0.5", "--threads", "1"]
    assert call("fashion-plain20", *flags, "--out", str(tmp_path / "run")) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["data"], result["train_images"], result["test_images"]) == ("fashion-mnist", 400, 10_000)


def test_tensorboard_logs_by_option(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
    assert call("digits", *SMALL, "--epochs", "1", "--method", "ce", "--tensorboard", "--out", str(tmp_path)) == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))
