"""Fine-tuning: what is taken from the model.pt and what is new; the transfer recipes; resume."""

import json
from dataclasses import replace

import pytest
import torch
from photographs import write_caltech101, write_imagenet, write_mit67
from test_loop import assert_same, stop_at

from rd_deploy.common import Stopped, UserError, run_command
from rd_deploy.preprocessing import Preprocessing
from rd_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rd_train.cli import command
from rd_train.data import load_dataset
from rd_train.networks import Network, parse_arch
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.recipe_files import dump_yaml
from rd_train.run import run
from rd_train.start import from_start, start_from

RECORD = Preprocessing(32, 40, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
TINY = ["--batch-size", "8", "--epochs", "1", "--warmup-epochs", "0.5", "--threads", "1", "--workers", "0"]


def write_model(path, name: str = "plain18", preprocessing: Preprocessing = RECORD, **options) -> Checkpoint:
    torch.manual_seed(3)
    arch = parse_arch(name, **{"width": 1 / 16, "classes": 5, "in_channels": preprocessing.channels} | options)
    names = [f"old {number}" for number in range(arch.classes)]
    checkpoint = Checkpoint(arch, Network(arch).state_dict(), preprocessing, names)
    save_checkpoint(path, checkpoint)
    return checkpoint


def call(*arguments: str) -> int:
    return run_command("rd-train", lambda: command(list(arguments)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_mit67(root / "mit67")
    write_caltech101(root / "caltech101")
    write_imagenet(root / "folder")
    return root


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("mit67", "plain18", {}),
        ("caltech101", "resnet18", {"stem": "small"}),
        ("folder", "plain20", {"reparam": "branches"}),
        ("folder", "plain44", {"reparam": "identity"}),  # as the default trains it
    ],
)
def test_each_transfer_recipe_runs(data, tmp_path, kind, name, options, capsys):
    old = write_model(tmp_path / "model.pt", name, **options)
    flags = ["--data", kind, "--data-dir", str(data / kind), "--out", str(tmp_path / "run")]
    assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags) == 0
    new = load_checkpoint(tmp_path / "run" / "model.pt")
    assert new.arch == replace(old.arch, classes=2)
    assert new.preprocessing == RECORD
    assert len(new.classes) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["data"], result["method"], result["init"]) == (kind, "ce", "start_weights")
    printed = capsys.readouterr().out
    assert "model.pt, with a new classifier of 2 classes" in printed
    assert "without effect" not in printed


def test_training_starts_from_the_weights_with_a_new_classifier(tmp_path):
    old = write_model(tmp_path / "model.pt")
    torch.manual_seed(0)
    new = replace(old.arch, classes=2), ["cat", "dog"]
    network = start_from(load_checkpoint(tmp_path / "model.pt"), *new)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in old.state_dict.items() if not name.startswith("fc."))
    assert state["fc.weight"].shape[0] == 2
    torch.manual_seed(1)
    again = start_from(load_checkpoint(tmp_path / "model.pt"), *new).state_dict()
    assert not torch.equal(again["fc.weight"], state["fc.weight"])


def test_a_run_that_learns_nothing_keeps_the_weights(data, tmp_path):
    old = write_model(tmp_path / "model.pt")
    flags = ["--data-dir", str(data / "folder"), "--lr", "1e-12", "--weight-decay", "0", "--out", str(tmp_path / "run")]
    assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags) == 0
    new = load_checkpoint(tmp_path / "run" / "model.pt").state_dict
    for name, value in old.state_dict.items():
        if name.endswith("weight") and not name.startswith("fc."):
            torch.testing.assert_close(new[name], value)


def test_a_network_of_the_same_classes_keeps_its_classifier(data, tmp_path, capsys):
    old = write_model(tmp_path / "model.pt", classes=2)
    names = load_dataset("folder", data / "folder").classes
    flags = ["--data-dir", str(data / "folder"), "--lr", "1e-12", "--weight-decay", "0"]
    for classes, kept in ((names, True), (names[::-1], False)):
        save_checkpoint(tmp_path / "model.pt", replace(old, classes=classes))
        run = tmp_path / f"run-{kept}"
        assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags, "--out", str(run)) == 0
        new = load_checkpoint(run / "model.pt").state_dict["fc.weight"]
        assert torch.allclose(new, old.state_dict["fc.weight"]) == kept
        said = "its classifier, which knows these classes" if kept else "a new classifier of 2 classes"
        assert f"model.pt, with {said}\n" in capsys.readouterr().out


def test_its_size_can_be_changed_and_its_normalisation_stays(data, tmp_path):
    write_model(tmp_path / "model.pt")
    flags = ["--data-dir", str(data / "folder"), "--size", "48", "--out", str(tmp_path / "run")]
    assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags) == 0
    record = load_checkpoint(tmp_path / "run" / "model.pt").preprocessing
    assert record == replace(RECORD, size=48, resize=55)


def test_resume_is_bit_equal_with_workers_around_corrupt_images(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model.pt")
    write_imagenet(tmp_path / "data")
    dataset = load_dataset("folder", tmp_path / "data")
    for file in (*dataset.train.listing.files[:2], dataset.val.listing.files[0]):
        path = tmp_path / "data" / "train" / file
        path.write_bytes(path.read_bytes()[:300])
    recipe = settle(
        Recipe(data="folder", data_dir=str(tmp_path / "data"), method="ce", batch_size=12, epochs=2, lr=0.01, workers=1,
               warmup_epochs=0.5, precision="fp32", device="cpu", threads=1, start_weights=str(tmp_path / "model.pt"))
    )  # fmt: skip
    assert settle(recipe) == recipe
    run(recipe, tmp_path / "whole")
    total = torch.load(tmp_path / "whole" / "student-state.pt", weights_only=True)["step"]
    assert total == 8  # what stop_at counts on
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert call("--resume", str(tmp_path / "run")) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")
    skipped = [set((tmp_path / name / "skipped.txt").read_text().splitlines()) for name in ("whole", "run")]
    assert skipped[0] == skipped[1]
    assert len(skipped[0]) == 3
    epochs = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line and "val" in line]
    assert sum("(1 corrupt images left out)" in line for line in epochs) == 4  # two runs of two epochs


def test_it_goes_on_without_what_it_started_from(tmp_path, monkeypatch, capsys):
    record = Preprocessing(8, 8, 1, (0.25,), (0.5,))
    write_model(tmp_path / "model.pt", "plain20", record)
    recipe = settle(
        Recipe(method="ce", batch_size=25, train_limit=100, epochs=2, lr=0.01, warmup_epochs=0.5, precision="fp32",
               device="cpu", threads=1, start_weights=str(tmp_path / "model.pt"))
    )  # fmt: skip
    run(recipe, tmp_path / "whole")
    stop_at(monkeypatch, 2)  # no epoch is finished, and there is no model.pt yet
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "model.pt").unlink()
    assert call("--resume", str(tmp_path / "run")) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "model.pt").preprocessing == record
    # Where nothing was saved, there is nothing but the start.
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text(dump_yaml(recipe))
    capsys.readouterr()
    assert call("--resume", str(tmp_path / "begun")) == 2
    assert f"start_weights {tmp_path / 'model.pt'} does not exist" in capsys.readouterr().err


def test_a_fine_tuned_teacher_teaches_a_fine_tuned_student(data, tmp_path, capsys):
    write_model(tmp_path / "resnet.pt", "resnet18")
    write_model(tmp_path / "plain.pt")
    where = ["--data-dir", str(data / "folder")]
    student = [
        "finetune",
        str(tmp_path / "plain.pt"),
        "--method",
        "rd",
        *TINY,
        *where,
        "--out",
        str(tmp_path / "student"),
    ]
    assert call(*student) == 2
    assert "fine-tune a ResNet first" in capsys.readouterr().err
    assert call("finetune", str(tmp_path / "resnet.pt"), *TINY, *where, "--out", str(tmp_path / "teacher")) == 0
    assert call(*student, "--teacher-weights", str(tmp_path / "teacher" / "model.pt")) == 0
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert (result["method"], result["arch"]) == ("rd", "plain18")
    assert result["teacher_test_accuracy"] is not None


def test_digits_from_digits_keep_the_networks_normalisation(tmp_path):
    record = Preprocessing(8, 8, 1, (0.25,), (0.5,))
    write_model(tmp_path / "model.pt", "plain20", record)
    flags = ["--data", "digits", "--train-limit", "50", "--out", str(tmp_path / "run")]
    assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags) == 0
    new = load_checkpoint(tmp_path / "run" / "model.pt")
    assert new.preprocessing == record
    assert len(new.classes) == 10


def test_the_recipe_of_a_fine_tuning_runs_again(tmp_path):
    write_model(tmp_path / "model.pt", "plain18", stem="small")
    recipe = from_start(Recipe(start_weights=str(tmp_path / "model.pt"), method="ce"))
    assert (recipe.arch, recipe.stem, recipe.width, recipe.shortcuts) == ("plain18", "small", 1 / 16, "none")
    assert from_start(recipe) == from_start(recipe, recipe.to_dict()) == recipe
    with pytest.raises(UserError, match=r"arch=plain34, but the network of .* has arch=plain18"):
        from_start(replace(recipe, arch="plain34"))


@pytest.mark.parametrize(("arch", "weight"), [("plain18", 0.5), ("plain50", 0.0)])
def test_whether_logits_are_distilled_goes_by_the_depth_of_the_start(tmp_path, arch, weight):
    write_model(tmp_path / "model.pt", arch, stem="small")
    shared = {"start_weights": str(tmp_path / "model.pt"), "method": "rd", "teacher_weights": "teacher.pt"}
    assert from_start(Recipe(**shared)).kd_weight == weight
    assert from_start(Recipe(kd_weight=0.3, **shared)).kd_weight == 0.3
    assert from_start(Recipe(kd_weight=0.5, **shared), {"kd_weight"}).kd_weight == 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fashion-plain20", "--data", "digits"], "arch=plain20, but the network of"),  # the preset names it
        (["mine.yaml", "--arch", "plain20"], "arch=plain20, but the network of"),
        (["mine.yaml", "--width", "1"], "width=1.0, but the network of"),
    ],
)
def test_another_network_than_is_named_is_refused(arguments, says, tmp_path, monkeypatch, capsys):
    """Even where the name is that of the default."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.pt", "plain32", Preprocessing(8, 8, 1, (0.5,), (0.5,)))
    (tmp_path / "mine.yaml").write_text("data: digits\n")
    assert call(*arguments, "--method", "ce", "--start-weights", "model.pt", "--out", "run") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "right after the word: rd-train finetune MODEL.pt"),
        (["finetune", "--data", "folder"], "name the network to start from"),
        (["finetune", "nowhere.pt", "--data-dir", "."], "nowhere.pt does not exist"),
        (["finetune", "x.pt", "--arch", "plain20"], "leave --arch away"),
        (["finetune", "--resume", "nowhere"], "leave the other options away"),
        (["finetune", "hostile.pt", "--data-dir", "."], "hostile.pt"),
        (["finetune", "grey.pt", "--data-dir", "."], "takes images of 1 channel(s), not RGB"),
        (["finetune", "grey.pt", "--data-dir", ".", "--warm-start", "--method", "kd"], "two different starts"),
        (["finetune", "grey.pt", "--out", ".", "--overwrite"], "unchanged"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pt").write_bytes(b"not a zip")
    write_model(tmp_path / "grey.pt", "plain20", Preprocessing(8, 8, 1, (0.5,), (0.5,)))
    if message == "unchanged":
        (tmp_path / "grey.pt").rename(tmp_path / "model.pt")
        arguments, message = [*arguments[:1], "model.pt", *arguments[2:]], "would delete the start_weights model.pt"
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_fine_tuned_network_finds_its_test_images_again(data, tmp_path):
    from rd_deploy.export.images import trained_on

    write_model(tmp_path / "model.pt")
    flags = ["--data", "caltech101", "--split-seed", "4", "--data-dir", str(data / "caltech101")]
    assert call("finetune", str(tmp_path / "model.pt"), *TINY, *flags, "--out", str(tmp_path / "run")) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "model.pt")
    dataset = trained_on(checkpoint, None, "missing", "unnamed", "elsewhere")
    expected = load_dataset("caltech101", data / "caltech101", split_seed=4)
    assert dataset.test.listing.files == expected.test.listing.files
    assert dataset.preprocessing == RECORD
