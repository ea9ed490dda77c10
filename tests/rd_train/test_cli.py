"""rd-train as its users call it: errors of one line with exit code 2, and the files of a run."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_loop import assert_same, stop_at

from rd_deploy.common import UserError, run_command
from rd_train.cli import _parse, _recipe, command
from rd_train.plan import settle
from rd_train.recipe import AS_RELEASED, AS_RELEASED_BY_STEM, Recipe
from rd_train.recipe_files import dump_yaml, preset_names, preset_values
from rd_train.run import run
from rd_train.sources import DEBIAN_FASHION

SMALL = ["--arch", "plain20", "--width", "0.25", "--train_limit", "200", "--threads", "1", "--batch_size", "50",
         "--warmup_epochs", "0.2"]  # fmt: skip


# What torch says where the system has none left.
CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def call(*arguments: str) -> int:
    return run_command("rd-train", lambda: command(list(arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "nested" / "run"
    assert call("digits", *SMALL, "--method", "jointrd", "--epochs", "2", "--out", str(folder)) == 0
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
    assert "already holds recipe.yaml" in capsys.readouterr().err
    assert (finished / "model.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "did you mean 'digits'"),
        (["--epochs", "0"], "epochs=0 must be from 1"),
        (["--epochs", "many"], "epochs=many is not a whole number"),
        (["--epochs", "0x" + "f" * 6000], "epochs is a number of more than 63 bits"),
        (["--lr", "0x" + "f" * 600], "an option has a value out of all range"),
        (["--epocs", "3"], "unknown option --epocs (did you mean 'epochs'?)"),
        (["--epoch", "3"], "unknown option --epoch"),
        (["--method", "foo"], "method=foo is not one of ce, kd, jointrd"),
        (["--size", "x"], "size=x is not a whole number"),
        (["--download", "maybe"], "maybe"),
        (["--lr", "inf"], "lr=inf"),
        (["--arch", "plain21"], "unknown architecture 'plain21'"),
        (["--data", "cifar"], "cifar10"),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--data", "fashion-mnist", "--data-dir", "~nosuchuser/x"], "nosuchuser"),
        (["--teacher-weights", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--teacher-weights", "n" * 300], "File name too long"),
        (["--teacher", "resnet18"], "same family"),
        (["--resume", "nowhere"], "holds no run"),
        (["--resume", ""], "--resume is empty"),
        (["--out", ""], "--out is empty"),
        (["--out=~nosuchuser/x"], "nosuchuser"),
        (["--data-dir", ""], "data_dir is empty"),
        (["--overwrite"], "give both"),
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--resume", ".", "--epochs", "3"], "leave the other options away"),
        (["digits", "--resume", "."], "leave the other options away"),
        (["--flip=maybe"], "flip=maybe is not true or false"),
        (["--crop-padding", "300"], "crop_padding=300 must be from 0 to 256"),
        (["--smallest-crop", "0"], "smallest_crop=0.0 must be from 0.001"),
        (["--device", "cuda"], "no GPU"),
        (["--precision", "fp16"], "precision=fp16 is not one of auto, fp32, bf16"),
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


def test_as_a_module_it_is_the_same_command(tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "rd_train", "digit"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rd-train: error: unknown preset 'digit'")
    assert done.stderr.count("\n") == 1


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert call("digits", *SMALL, "--out", str(out)) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_list_names_the_presets(capsys):
    assert call("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in preset_names())


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason=f"needs Debian's dataset-fashion-mnist ({DEBIAN_FASHION})")
def test_fashion_mnist_smoke(tmp_path):
    flags = ["--width", "0.25", "--train_limit", "400", "--epochs", "1", "--warmup_epochs", "0.5", "--threads", "1"]
    assert call("fashion-plain20", *flags, "--out", str(tmp_path / "run")) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["data"], result["train_images"], result["test_images"]) == ("fashion-mnist", 400, 10_000)


def test_tensorboard_logs_by_option(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
    assert call("digits", *SMALL, "--epochs", "1", "--method", "ce", "--tensorboard", "--out", str(tmp_path)) == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_tensorboard_an_earlier_run_stays(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # an import of it fails
    for out, flags in (("run", ["--overwrite"]), ("new", [])):
        assert call("digits", *SMALL, *flags, "--tensorboard", "--out", str(tmp_path / out)) == 2
        assert "tensorboard is not usable here" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert not (tmp_path / "new").exists()


def test_folders_after_an_equals_sign_may_be_in_the_home(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(finished.parent))
    monkeypatch.chdir(tmp_path)
    for arguments in (["--resume=~/run"], ["digits", "--out=~/run"]):
        assert call(*arguments) == 2
        assert str(finished) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    tmp_path.joinpath("run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as a run that is training holds it
    assert call("digits", *SMALL, "--method", "ce", "--out", str(tmp_path / "run")) == 2
    os.close(handle)
    assert f"another rd-train is training in {tmp_path / 'run'}" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_came_while_data_were_read_is_not_deleted(finished, capsys):
    recipe = settle(Recipe(**yaml.safe_load((finished / "recipe.yaml").read_text())))
    with pytest.raises(UserError, match="already holds"):
        run(recipe, finished)
    assert (finished / "result.json").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MEMORY)])
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fit(*arguments, **options):
        raise error

    monkeypatch.setattr("rd_train.run.fit", fit)
    assert call("digits", *SMALL, "--method", "ce", "--out", str(tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("rd-train: error: not enough memory")


def test_what_stands_in_the_folder_is_not_deleted_by_accident(finished, tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    assert call("digits", *SMALL, "--out", str(tmp_path)) == 2
    assert "already holds report.md" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "mine"
    teacher = finished / "teacher.pt"
    assert call("digits", *SMALL, "--teacher-weights", str(teacher), "--out", str(finished), "--overwrite") == 2
    assert teacher.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "epochs: x"),
        ("recipe.yaml", "device: auto"),
        ("recipe.yaml", "threads:"),
        ("metrics.jsonl", "garbage\n{}\n"),
        ("metrics.jsonl", "{}\n{}\n"),
        ("metrics.jsonl", "\xff\xfe"),
        ("student-state.pt", "not a zip"),
    ],
)
def test_a_damaged_run_is_one_line(finished, tmp_path, capsys, name, content):
    for path in finished.iterdir():
        if path.name != "result.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    capsys.readouterr()
    assert call("--resume", str(tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": 5},
        {"best": {}},
        {"sums": {"loss": "a"}},
        {"step": -5},
        {"step": 10**9},
        {"task": {}},
    ],
)
def test_a_state_that_does_not_fit_is_one_line(finished, tmp_path, capsys, change):
    for path in finished.iterdir():
        if path.name != "result.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    state = torch.load(tmp_path / "student-state.pt", weights_only=True)
    torch.save({**state, **change}, tmp_path / "student-state.pt")
    capsys.readouterr()
    assert call("--resume", str(tmp_path)) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_run_goes_on_with_its_files_elsewhere(tmp_path, monkeypatch):
    """Only what does not change its sums, and the recipe then says so."""
    taken = []

    def take(recipe, folder, **options):
        assert options["resume"]
        taken.append(recipe)
        raise UserError("taken")

    monkeypatch.setattr("rd_train.run.run", take)
    recipe = settle(Recipe(data="folder", data_dir=str(tmp_path / "old"), method="ce", max_corrupt=1000, device="cpu"))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert call("--resume", str(tmp_path), "--data-dir", "new", "--workers=3", "--max-corrupt", "10") == 2
    assert taken == [replace(recipe, data_dir=str(tmp_path / "new"), workers=3, max_corrupt=10)]
    assert call("--resume", str(tmp_path), "--save-minutes", "1") == 2
    assert taken[1] == replace(recipe, save_minutes=1.0)
    # Where the old place is another one here: a link, on this machine.
    (tmp_path / "old").symlink_to(tmp_path / "elsewhere")
    assert call("--resume", str(tmp_path)) == 2
    assert taken[2] == replace(recipe, data_dir=str(tmp_path / "elsewhere"))


def test_a_run_goes_on_on_another_machine(tmp_path, monkeypatch, capsys):
    """With the same numbers as far as there are such, and what changes their rounding is said."""
    taken = []

    def take(recipe, folder, **options):
        taken.append(recipe)
        raise UserError("taken")

    def resumed(*arguments: str) -> tuple[Recipe, list[str]]:
        assert call("--resume", str(tmp_path), *arguments) == 2
        said = capsys.readouterr()
        assert said.err == "rd-train: error: taken\n"
        return taken[-1], said.out.splitlines()

    monkeypatch.setattr("rd_train.run.run", take)
    monkeypatch.setattr("rd_train.bf16.cpu_multiplies_bf16", lambda: True)
    recipe = settle(Recipe(method="ce", device="cpu", threads=4))
    assert recipe.precision == "bf16"
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert resumed() == (recipe, [])
    monkeypatch.setattr("rd_train.bf16.cpu_multiplies_bf16", lambda: False)
    emulated, notes = resumed()
    assert emulated == replace(recipe, precision="bf16-emulated")
    [note] = notes
    assert note.startswith("note     goes on with precision=bf16-emulated (bf16 before): not bit-equal")
    other, [note] = resumed("--precision", "fp32", "--threads=1")
    assert other == replace(recipe, precision="fp32", threads=1)
    assert "precision=fp32 (bf16 before), threads=1 (4 before)" in note
    # Of a GPU, on a machine without one.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(replace(recipe, device="cuda")))
    assert call("--resume", str(tmp_path)) == 2
    assert "use --device cpu" in capsys.readouterr().err
    other, [note] = resumed("--device", "cpu")
    assert other == emulated
    assert "device=cpu (cuda before), precision=bf16-emulated" in note
    (tmp_path / "recipe.yaml").write_text(dump_yaml(replace(recipe, compile=True)))
    other, [note] = resumed("--compile", "false")
    assert other == emulated
    assert "compile=False (True before)" in note


def test_numbers_of_another_machine_are_gone_on_with(tmp_path, monkeypatch):
    flags = ["--method", "ce", "--epochs", "2", "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path)]
    stop_at(monkeypatch, 5)
    assert call("digits", *SMALL, *flags) == 130
    monkeypatch.undo()
    assert call("--resume", str(tmp_path), "--precision", "bf16-emulated", "--threads", "2") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["precision"], result["threads"]) == ("bf16-emulated", 2)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (recipe["precision"], recipe["threads"]) == ("bf16-emulated", 2)


def test_one_command_starts_a_run_goes_on_with_it_and_tells_its_result(tmp_path, monkeypatch, capsys):
    run = ["digits", *SMALL, "--method", "ce", "--epochs", "2", "--device", "cpu"]
    command = [*run, "--go-on", "--out", str(tmp_path / "run")]
    stop_at(monkeypatch, 5)
    assert call(*command) == 130
    monkeypatch.undo()
    assert call(*command, "--save-minutes", "5", "--max-corrupt=3") == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["save_minutes"] == 5
    assert call(*run, "--out", str(tmp_path / "whole")) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")
    capsys.readouterr()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert call(*command) == 0
    said = capsys.readouterr().out
    accuracy = json.loads((tmp_path / "whole" / "result.json").read_text())["test_accuracy"]
    assert f"holds this run, complete\ntest accuracy {accuracy:.2%}" in said
    # Another run is not this one, even if it has a result.
    assert call(*command, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run'} holds another run, seed=0 there, 1 here; give the options of that one" in error
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "result.json").write_text("[]")
    assert call(*command) == 2
    assert "result.json is damaged" in capsys.readouterr().err


def test_a_command_goes_on_as_the_run_began_but_for_what_it_names(tmp_path, monkeypatch, capsys):
    taken = []

    def take(recipe, folder, **options):
        taken.append((recipe, options.get("resume", False)))
        raise UserError("taken")

    def goes_on(*arguments: str) -> tuple[Recipe, bool] | str:
        assert call("fashion-plain20", "--out", str(tmp_path), "--go-on", *arguments) == 2
        error = capsys.readouterr().err
        return taken[-1] if "taken" in error else error

    monkeypatch.setattr("rd_train.run.run", take)
    monkeypatch.setattr("rd_train.bf16.cpu_multiplies_bf16", lambda: True)
    began, resumed = goes_on("--data-dir", str(tmp_path), "--threads", "3", "--max-corrupt", "50")
    assert not resumed
    (tmp_path / "recipe.yaml").write_text(dump_yaml(began))
    assert (began.precision, began.threads) == ("bf16", 3)
    assert goes_on() == (began, True)
    assert goes_on("--precision", "auto", "--threads", "2") == (replace(began, threads=2), True)
    # What has no effect makes no other run.
    (tmp_path / "recipe.yaml").write_text(dump_yaml(replace(began, method="ce")))
    assert "method=ce there, rd here" in goes_on()
    former = replace(began, kd_weight=0.0, kd_start=0.0)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(former))
    assert goes_on("--kd-weight", "0") == (former, True)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(began))
    # A precision that was asked for is another run's, unless it is the same bf16 in another way.
    assert "precision=bf16 there, fp32 here" in goes_on("--precision", "fp32")
    monkeypatch.setattr("rd_train.bf16.cpu_multiplies_bf16", lambda: False)
    emulated = replace(began, precision="bf16-emulated")
    assert goes_on() == goes_on("--precision", "bf16") == (emulated, True)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(emulated))
    monkeypatch.setattr("rd_train.bf16.cpu_multiplies_bf16", lambda: True)
    assert goes_on() == (emulated, True)
    assert goes_on("--precision", "bf16") == (began, True)
    assert "epochs=10 there, 3 here" in goes_on("--epochs", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--go-on"], "goes on with the run that --out names; give both"),
        (["--go-on", "--out", "x", "--overwrite"], "give one of the two"),
        (["--go-on", "--out", "x", "--dry"], "leave --go-on away"),
        (["--go-on", "--resume", "x"], "leave the other options away"),
        (["--goon"], "did you mean 'go-on'?"),
    ],
)
def test_what_going_on_does_not_go_with(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_earlier_version_goes_on_where_nothing_is_otherwise(tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr("rd_train.run.run", lambda recipe, folder, **options: taken.append(recipe))
    recipe = settle(Recipe(method="ce", device="cpu"))
    lines = dump_yaml(recipe).splitlines(keepends=True)
    added = ("flip", "crop_padding", "smallest_crop", "save_minutes")
    (tmp_path / "recipe.yaml").write_text("".join(line for line in lines if not line.startswith(added)))
    with pytest.raises(TypeError):  # run gave no result
        command(["--resume", str(tmp_path)])
    assert taken == [recipe]
    (tmp_path / "recipe.yaml").write_text("".join(line for line in lines if not line.startswith("ema")))
    assert call("--resume", str(tmp_path)) == 2
    assert "written by another version" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("".join(lines))
    assert call("--resume", str(tmp_path), "--data-dir", "x") == 2  # of digits
    assert "has no data_dir to change" in capsys.readouterr().err
    # Debian's package has a place of its own, which another machine may lack.
    (tmp_path / "recipe.yaml").write_text("".join(lines).replace("data: digits", "data: fashion-mnist"))
    with pytest.raises(TypeError):
        command(["--resume", str(tmp_path), "--data-dir", str(tmp_path)])
    assert taken[-1].data_dir == str(tmp_path)
    (tmp_path / "recipe.yaml").write_text("".join(lines))
    assert call("--resume", str(tmp_path), "--teacher-weights", "x.pt") == 2
    assert "leave the other options away" in capsys.readouterr().err


def test_a_bare_flag_is_true():
    given = _recipe(_parse(["--flip", "--epochs", "2"], {}))
    assert given.flip is True
    assert _recipe(_parse(["--flip", "false"], {})).flip is False
    assert _parse([], {}).flip is None


def test_options_without_effect_are_said(tmp_path, capsys):
    assert call("digits", *SMALL, "--epochs", "1", "--method", "ce", "--kd-weight", "0.9", "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "without effect here: kd_weight" in said
    assert f"folder   {tmp_path}\n" in said


def test_what_is_probably_a_mistake_is_said(capsys, monkeypatch):
    monkeypatch.setattr("rd_train.plan.available_threads", lambda: 1)
    flags = ["--epochs", "1", "--method", "ce", "--sync-bn", "--batch-size", "500", "--train-limit", "1000"]
    assert call("digits", *SMALL, *flags, "--threads", "2", "--dry") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert [line.split()[1:4] for line in notes[:3]] == [
        ["without", "effect", "here:"],
        ["2", "steps", "an"],
        ["2", "threads", "on"],
    ]
    assert "sync_bn (one process)" in notes[0]


def test_a_teacher_file_must_be_the_one_that_was_named(finished, tmp_path, capsys):
    flags = ["--teacher-weights", str(finished / "teacher.pt"), "--teacher", "resnet32", "--out", str(tmp_path)]
    assert call("digits", *SMALL, *flags) == 2
    assert "is a resnet20, not the resnet32" in capsys.readouterr().err


def test_the_default_method_is_ours(tmp_path, capsys):
    flags = ["--teacher-epochs", "1", "--epochs", "2", "--audit", "--out", str(tmp_path)]
    assert call("digits", *SMALL, *flags) == 0
    assert "without effect" not in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["method"] == "rd"
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "audit.png" in (tmp_path / "report.md").read_text()


def asked(monkeypatch, *arguments: str) -> Recipe:
    """The recipe that a command would run."""
    seen = []

    def start(options, named):
        seen.append(_recipe(options))
        return {"folder": "x", "teacher_test_accuracy": None, "test_accuracy": 0.5, "corrupt_images": 0}

    monkeypatch.setattr("rd_train.cli._start", start)
    assert call(*arguments) == 0
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "stem"),
    [(["imagenet-plain50"], "imagenet"), (["cifar10-plain18"], "small"), (["--arch", "plain34"], "imagenet")],
)
def test_as_released_sets_each_entry_and_nothing_else(arguments, stem, monkeypatch, capsys):
    recipe = asked(monkeypatch, *arguments, "--as-released")
    table = AS_RELEASED | AS_RELEASED_BY_STEM[stem]
    assert {name: getattr(recipe, name) for name in table} == table
    plain34 = {**preset_values("digits"), "arch": "plain34"}
    before = Recipe(**(preset_values(arguments[0]) if len(arguments) == 1 else plain34))
    changed = {name for name, value in recipe.to_dict().items() if value != getattr(before, name)}
    # Besides: what goes by method and initialisation, without effect here.
    assert changed - {"summary"} <= {*table, "kd_weight", "kd_start", "kd_probability", "init_noise"}
    assert recipe.unused() == []
    # By hand, from the facts in docs/method.md.
    assert (recipe.method, recipe.shortcuts, recipe.init, recipe.teacher_bn, recipe.clip_norm) == (
        "jointrd", "projection", "kaiming", "eval", 0.0,
    )  # fmt: skip
    ends = {"imagenet": (1e-4, 0.005), "small": (0.0, 0.5)}
    assert (recipe.feature_weight, recipe.splice_weight_end) == ends[stem]


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_as_released_refuses_what_contradicts_it(stem, monkeypatch, capsys):
    monkeypatch.setattr("rd_train.cli._start", lambda options, named: pytest.fail("was started"))
    others = {"method": "rd", "shortcuts": "none", "init": "dirac", "teacher_bn": "batch", "reparam": "dirac",
              "feature_reduction": "mean", "warm_start": "true", "optimizer": "muon"}  # fmt: skip
    for name in AS_RELEASED | AS_RELEASED_BY_STEM[stem]:
        value = others.get(name, "1" if name == "recalibrate" else "0.25")
        assert call("--arch", "plain18", "--stem", stem, "--as-released", f"--{name}", value) == 2
        assert f"--as-released sets {name}=" in capsys.readouterr().err
    assert call("fashion-plain20", "--arch", "resnet20", "--as-released") == 2
    assert "for plain students" in capsys.readouterr().err


def test_as_released_refuses_a_recipe_that_contradicts_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("splice_window: 0.3")
    assert call(str(tmp_path / "mine.yaml"), "--as-released") == 2
    assert "sets splice_window=0.5, this run splice_window=0.3" in capsys.readouterr().err


def test_the_recipe_of_a_run_by_another_method_has_that_methods_defaults(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    ours = settle(Recipe(clip_norm=0.5, lr=0.02, device="cpu"))
    path.write_text(dump_yaml(ours))
    assert asked(monkeypatch, str(path)) == ours
    assert "note" not in capsys.readouterr().out
    theirs = asked(monkeypatch, str(path), "--method", "jointrd", "--teacher-bn", "batch")
    # By hand: what was not rd's default stays, and so does what is given.
    expected = {"method": "jointrd", "optimizer": "sgd", "splice_weight_end": 0.5}
    expected |= {"kd_start": 0.0, "kd_probability": 1.0}  # without effect
    assert theirs == replace(ours, **expected)
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert f"otherwise than in {path}: " in note
    assert sorted(note.partition(": ")[2].split(", ")) == [
        "kd_probability=1.0 (0.6 there)", "kd_start=0.0 (0.5 there)",
        "optimizer=sgd (muon there)", "splice_weight_end=0.5 (0.0 there)",
    ]  # fmt: skip
    assert asked(monkeypatch, str(path), "--reparam", "identity").init_noise == 0.3  # goes by that
    capsys.readouterr()
    # What a person, or a preset, names is meant, whatever the method.
    (tmp_path / "mine.yaml").write_text("method: ce\noptimizer: sgd")
    assert asked(monkeypatch, str(tmp_path / "mine.yaml"), "--method", "rd").optimizer == "sgd"
    assert asked(monkeypatch, "finetune", "x.pt", "--method", "rd", "--teacher-weights", "y.pt").optimizer == "sgd"
    assert "note" not in capsys.readouterr().out


def test_the_recipe_of_a_run_distils_as_it_did_unless_the_method_is_another(tmp_path, monkeypatch):
    def asked_of(*arguments: str) -> tuple:
        recipe = asked(monkeypatch, str(tmp_path / "recipe.yaml"), *arguments)
        return recipe.kd_weight, recipe.kd_start, recipe.kd_probability

    for arch in ("plain20", "plain56"):
        ours = settle(Recipe(arch=arch, device="cpu"))
        # By an earlier version, by which rd distilled no logits at any depth.
        former = replace(ours, kd_weight=0.0, kd_start=0.0, kd_probability=1.0)
        (tmp_path / "recipe.yaml").write_text(dump_yaml(former))
        for other in ("plain20", "plain56"):
            assert asked_of("--arch", other) == (0.0, 0.0, 1.0)
        assert asked_of("--method", "kd") == (0.5, 0.0, 1.0)
        assert asked_of("--kd-weight", "0.5") == (0.5, 0.0, 1.0)
        (tmp_path / "recipe.yaml").write_text(dump_yaml(ours))
        assert asked_of("--arch", "plain20") == (0.5, 0.5, 0.6)
        assert asked_of("--arch", "plain56") == (0.0, 0.5, 0.6)
        assert asked_of("--method", "kd") == (0.5, 0.0, 1.0)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(replace(ours, arch="plain20", kd_weight=0.5, kd_start=0.2)))
    assert asked_of("--arch", "plain56") == (0.5, 0.2, 0.6)  # what was decided


def test_the_recipe_of_a_run_on_other_data_varies_images_as_is_usual_for_these(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    ours = settle(Recipe(data="fashion-mnist", crop_padding=3, device="cpu"))
    path.write_text(dump_yaml(ours))
    assert (ours.flip, ours.crop_padding, ours.smallest_crop) == (True, 3, 1.0)
    other = asked(monkeypatch, str(path), "--data", "folder", "--data-dir", "x")
    assert (other.flip, other.crop_padding, other.smallest_crop) == (True, 3, 0.08)  # what was given, stays
    assert "smallest_crop=0.08 (1.0 there)" in capsys.readouterr().out
    assert asked(monkeypatch, str(path), "--data", "digits").flip is False
    # Of a run from before recipes had it: by the data, too.
    path.write_text(
        dump_yaml(ours).replace("flip: true", "flip: null").replace("crop_padding: 3", "crop_padding: null")
    )
    assert asked(monkeypatch, str(path)) == replace(ours, crop_padding=2)
    assert asked(monkeypatch, str(path), "--data", "digits").crop_padding == 1


def test_branches_of_a_deep_run_go_with_what_asked_for_them(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    ours = settle(Recipe(arch="plain56", device="cpu"))
    path.write_text(dump_yaml(ours))
    assert (ours.reparam, ours.init_noise) == ("identity", 0.3)
    for options in (["--arch", "plain20"], ["--method", "ce"], ["--optimizer", "sgd"], ["--reparam", "none"]):
        other = asked(monkeypatch, str(path), *options)
        assert (other.reparam, other.init_noise) == ("none", 0.1), options
    assert asked(monkeypatch, str(path), "--arch", "plain110").reparam == "identity"
    capsys.readouterr()
    # Of a run from before there were any: it meant none, and its rate.
    path.write_text(dump_yaml(replace(ours, reparam="none", init_noise=0.1, muon_lr=0.004)))
    former = asked(monkeypatch, str(path))
    assert (former.reparam, former.init_noise, former.muon_lr) == ("none", 0.1, 0.004)
    assert "note" not in capsys.readouterr().out
