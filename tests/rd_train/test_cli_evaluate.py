"""``rd-train evaluate``: accuracies against a loop of its own, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from photographs import write_caltech101, write_imagenet

from rd_deploy.common import UserError
from rd_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rd_train.cli import command
from rd_train.data import load_dataset
from rd_train.networks import Network, parse_arch


def saved(path, dataset, classes=None, **recipe):
    """A network of random weights that says it was trained on a data set."""
    torch.manual_seed(0)
    arch = parse_arch("plain20", classes=len(dataset.classes), in_channels=dataset.preprocessing.channels, width=0.25)
    network = Network(arch).eval()
    values = Checkpoint(arch, network.state_dict(), dataset.preprocessing, classes or dataset.classes, recipe)
    save_checkpoint(path, values)
    return network


@pytest.mark.parametrize("split", ["test", "val"])
def test_accuracy_is_that_of_a_loop_over_the_images(tmp_path, capsys, split):
    dataset = load_dataset("digits")
    network = saved(tmp_path / "model.pt", dataset, data="digits").double()
    out = tmp_path / "x.json"
    flags = ["--split", split, "--precision", "fp32", "--threads", "1", "--out", str(out)]
    assert command(["evaluate", str(tmp_path / "model.pt"), *flags]) == 0
    result = json.loads(out.read_text())
    part = getattr(dataset, split)
    pixels = part.pixels[..., 0].astype(np.float64)
    mean, std = dataset.preprocessing.mean[0], dataset.preprocessing.std[0]
    with torch.no_grad():
        logits = network(torch.from_numpy((pixels / 255 - mean) / std)[:, None])
    labels = part.labels.numpy()
    right = int((logits.argmax(1).numpy() == labels).sum())
    assert result["images"] == len(labels)
    assert result["accuracy"] == right / len(labels)
    assert np.array(result["confusion"]).sum(1).tolist() == np.bincount(labels).tolist()
    assert np.trace(result["confusion"]) == right
    loss = torch.nn.functional.cross_entropy(logits, part.labels)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert result["interval"][0] < result["accuracy"] < result["interval"][1]
    said = capsys.readouterr().out
    every = sum(dataset.counts)
    assert (result["images_of_splits"], every) == (every, 1797)
    assert f"digits: {len(labels):,} images ({split}, of 1,797 in the three splits), 10 classes" in said
    assert f"accuracy {right / len(labels):.2%} (" in said


def test_all_images_are_those_of_the_three_splits(tmp_path):
    dataset = load_dataset("digits")
    saved(tmp_path / "model.pt", dataset, data="digits", train_limit=300)
    found = {}
    for split in ("train", "val", "test", "all"):
        flags = ["--split", split, "--precision", "fp32", "--threads", "1", "--out", str(tmp_path / "x.json")]
        assert command(["evaluate", str(tmp_path / "model.pt"), *flags]) == 0
        found[split] = json.loads((tmp_path / "x.json").read_text())
    every = found.pop("all")
    images = {split: each["images"] for split, each in found.items()}
    assert images == {"train": 300, "val": len(dataset.val), "test": len(dataset.test)}
    assert every["images"] == sum(images.values())
    assert np.array_equal(every["confusion"], sum(np.array(each["confusion"]) for each in found.values()))
    loss = sum(each["loss"] * each["images"] for each in found.values()) / every["images"]
    assert every["loss"] == pytest.approx(loss)


def test_other_data_of_the_same_classes(tmp_path, capsys):
    write_imagenet(tmp_path / "one", train=20, val=3)
    write_imagenet(tmp_path / "other", train=20, val=5)
    bad = next((tmp_path / "other" / "val" / "n01440764").iterdir())
    bad.write_bytes(bad.read_bytes()[:200])
    dataset = load_dataset("folder", tmp_path / "one", size=32)
    saved(tmp_path / "model.pt", dataset, data="folder", data_dir=str(tmp_path / "one"))
    counts = {}
    for name, flags in (("one", []), ("other", ["--data-dir", str(tmp_path / "other"), "--workers", "0"])):
        flags += ["--threads", "1", "--out", str(tmp_path / "x.json")]
        assert command(["evaluate", str(tmp_path / "model.pt"), *flags]) == 0
        result = json.loads((tmp_path / "x.json").read_text())
        counts[name] = result["images"], result["corrupt_images"], [each["name"] for each in result["classes"]]
    with pytest.raises(UserError, match="more corrupt images than rd-train's --max-corrupt 0"):
        command(["evaluate", str(tmp_path / "model.pt"), *flags, "--max-corrupt", "0"])
    assert counts == {"one": (6, 0, dataset.classes), "other": (9, 1, dataset.classes)}
    assert (
        "folder: 9 images (test, of 50 in the three splits), 2 classes; 1 corrupt left out\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/../caltech", "elsewhere"])
def test_test_images_are_not_those_of_training_however_the_folder_is_written(tmp_path, capsys, spelled):
    """Caltech101's images are divided by a seed, which is the training's wherever its images lie now."""
    root = tmp_path / "caltech"
    write_caltech101(root)
    (tmp_path / "elsewhere").symlink_to(root)
    dataset = load_dataset("caltech101", root, size=32, split_seed=3)
    saved(tmp_path / "model.pt", dataset, data="caltech101", data_dir=str(root), split_seed=3, train_limit=40)
    labels = {}
    for seed, flags in ((3, []), (0, ["--split-seed", "0"])):
        place = tmp_path / spelled.format(root)
        flags += ["--data-dir", str(place), "--workers", "0", "--threads", "1", "--precision", "fp32"]
        assert command(["evaluate", str(tmp_path / "model.pt"), *flags, "--out", str(tmp_path / "x.json")]) == 0
        result = json.loads((tmp_path / "x.json").read_text())
        assert result["split_seed"] == seed
        assert f"(test of split seed {seed}, " in capsys.readouterr().out
        labels[seed] = result["loss"]
    expected = load_dataset("caltech101", root, size=32, split_seed=3)
    network = Network(parse_arch("plain20", classes=2, in_channels=3, width=0.25))
    network.load_state_dict(load_checkpoint(tmp_path / "model.pt").state_dict)
    images = expected.test.images(torch.arange(len(expected.test)))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network.eval()(images), expected.test.labels)
    assert labels[3] == pytest.approx(float(loss), rel=1e-4)
    assert labels[0] != labels[3]
    flags = ["--split", "train", "--data-dir", str(root), "--workers", "0", "--out", str(tmp_path / "x.json")]
    assert command(["evaluate", str(tmp_path / "model.pt"), *flags]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["images"] == 40


def test_there_is_no_matrix_of_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("rd_train.cli_evaluate.MOST_CONFUSED", 9)
    saved(tmp_path / "model.pt", load_dataset("digits"), data="digits")
    assert command(["evaluate", str(tmp_path / "model.pt"), "--threads", "1", "--out", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["confusion"], len(result["classes"]), result["split_seed"]) == (None, 10, None)


def test_a_network_whose_sums_overflow_is_refused(tmp_path):
    digits = load_dataset("digits")
    network = saved(tmp_path / "model.pt", digits, data="digits")
    network.conv1.weight.data.fill_(3e38)
    save_checkpoint(
        tmp_path / "model.pt",
        Checkpoint(network.arch, network.state_dict(), digits.preprocessing, digits.classes, {"data": "digits"}),
    )
    with pytest.raises(UserError, match="gives NaN or infinite logits for these images; train again"):
        command(["evaluate", str(tmp_path / "model.pt"), "--threads", "1", "--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_what_cannot_be_measured_is_refused(tmp_path):
    digits = load_dataset("digits")
    path = tmp_path / "model.pt"
    saved(path, digits, data="digits")
    cases = {
        "unknown": ["--data", "digit"],
        "--out is empty": ["--out", ""],
        "in a folder that is there": ["--out", str(tmp_path / "no" / "x.json")],
        "invalid choice": ["--split", "both"],
        "unrecognized arguments: --epochs": ["--epochs", "3"],
        "it is no regular file": ["--out", "/dev/null"],
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message):
            command(["evaluate", str(path), *flags])
    saved(path, digits)
    with pytest.raises(UserError, match="does not say which data it was trained on; pass --data"):
        command(["evaluate", str(path)])
    for wrong in (
        {"split_seed": "x"},
        {"data_dir": 3},
        {"data_dir": "a\0b"},
        {"max_corrupt": []},
        {"train_limit": 0.5},
    ):
        saved(path, digits, data="digits", **wrong)
        with pytest.raises(UserError):
            command(["evaluate", str(path)])
    for classes, message in (
        (digits.classes[::-1], "the order of their classes"),
        ([*digits.classes[:-1], "ten"], "'ten'"),
    ):
        saved(path, digits, classes, data="digits")
        with pytest.raises(UserError, match=message):
            command(["evaluate", str(path)])
    with pytest.raises(UserError, match="does not exist"):
        command(["evaluate", str(tmp_path / "gone.pt")])
