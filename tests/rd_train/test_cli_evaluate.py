"""``rd-train evaluate``: accuracies against a loop of its own, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from photographs import write_imagenet

from rd_deploy.common import UserError
from rd_train.checkpoint import Checkpoint, save_checkpoint
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
    assert f"digits: {len(labels):,} images ({split}), 10 classes" in said
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
    assert "folder: 9 images (test), 2 classes; 1 corrupt left out\n" in capsys.readouterr().out


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
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message):
            command(["evaluate", str(path), *flags])
    saved(path, digits)
    with pytest.raises(UserError, match="does not say which data it was trained on; pass --data"):
        command(["evaluate", str(path)])
    for wrong in ({"split_seed": "x"}, {"data_dir": 3}, {"max_corrupt": []}, {"train_limit": 0.5}):
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
