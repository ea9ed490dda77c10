"""The layouts of the paper's data: each recipe runs on files laid out exactly so; others are told what is wrong."""

import json
import shutil

import pytest
from cifar_files import write_cifar
from photographs import (
    write_caltech101,
    write_imagenet,
    write_mit67,
    write_photographs,
    write_shards,
)

from rd_deploy.common import UserError, run_command
from rd_train.checkpoint import load_checkpoint
from rd_train.cli import command
from rd_train.data import load_dataset

TINY = ["--size", "32", "--width", "0.0625", "--batch-size", "8", "--epochs", "1", "--warmup-epochs", "0.5"]
TINY += ["--threads", "1", "--workers", "0"]


def call(*arguments: str) -> int:
    return run_command("rd-train", lambda: command(list(arguments)))


def finished(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


# --- CIFAR


@pytest.mark.parametrize("classes", [10, 100])
def test_cifars_recipes_run_on_their_files(tmp_path, classes):
    write_cifar(tmp_path / "data", classes, per_file=40 if classes == 10 else 250)
    flags = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert call(f"cifar{classes}-plain18", *TINY, *flags) == 0
    result = finished(tmp_path / "run")
    assert (result["data"], result["arch"], result["method"]) == (f"cifar{classes}", "plain18", "rd")
    assert result["train_images"] == (180 if classes == 10 else 225)
    kept = load_checkpoint(tmp_path / "run" / "model.pt")
    assert (kept.arch.stem, len(kept.classes), kept.preprocessing.size) == ("small", classes, 32)


# --- ImageNet


def test_imagenets_recipe_runs_on_imagenets_folders(tmp_path, capsys):
    write_imagenet(tmp_path / "imagenet", train=14)
    flags = ["--data-dir", str(tmp_path / "imagenet"), "--teacher-epochs", "1", "--out", str(tmp_path / "run")]
    # The recipe's own learning rate is too high for a training of three steps.
    assert call("imagenet-plain50", *TINY, *flags, "--lr", "0.001") == 0
    result = finished(tmp_path / "run")
    assert (result["arch"], result["method"], result["test_images"]) == ("plain50", "rd", 12)
    assert load_checkpoint(tmp_path / "run" / "model.pt").classes == ["n01440764", "n01443537"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("student epoch")]
    assert len(lines) == 1
    assert "is the bottleneck" in lines[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("images_per_second", "loader_images_per_second", "model_images_per_second"):
        assert all(row[name] > 0 for row in rows)
    # What both do at once, each does alone at least as fast.
    assert all(row["model_images_per_second"] >= row["images_per_second"] for row in rows)


def test_imagenets_recipe_runs_on_shards_with_a_corrupt_image(tmp_path, capsys):
    write_shards(tmp_path / "shards")
    shard = tmp_path / "shards" / "imagenet1k-train-0001.tar"
    data = shard.read_bytes()
    at = data.index(b"\xff\xd8\xff")
    shard.write_bytes(data[: at + 20] + bytes(400) + data[at + 420 :])
    flags = ["--data", "webdataset", "--data-dir", str(tmp_path / "shards"), "--teacher-epochs", "1", "--lr", "0.001"]
    assert call("imagenet-plain50", *TINY, *flags, "--out", str(tmp_path / "run")) == 0
    result = finished(tmp_path / "run")
    assert (result["data"], result["corrupt_images"], result["test_images"]) == ("webdataset", 1, 8)
    assert result["method"] == "rd"
    assert "imagenet1k-train-0001.tar/" in (tmp_path / "run" / "skipped.txt").read_text()
    printed = capsys.readouterr()
    assert "skipped  image" in printed.err
    assert "left out 1 corrupt images, named in" in printed.out
    assert "corrupt images left out | 1," in (tmp_path / "run" / "report.md").read_text()


def test_validation_images_as_they_are_downloaded(tmp_path):
    write_imagenet(tmp_path)
    for folder in (tmp_path / "val").iterdir():
        for file in folder.iterdir():
            file.rename(tmp_path / "val" / file.name)
        folder.rmdir()
    with pytest.raises(UserError, match=r"val holds images without class folders.*ImageNet\(FOLDER, split='val'\)"):
        load_dataset("folder", tmp_path)


def test_training_images_as_they_are_downloaded(tmp_path):
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "n01440764.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"train holds tar files: extract each .* --data webdataset"):
        load_dataset("folder", tmp_path)


def test_test_images_without_labels(tmp_path):
    write_imagenet(tmp_path)
    write_photographs(tmp_path / "test", ["ILSVRC2012_test_00000001.JPEG"])
    with pytest.raises(UserError, match=r"test holds images without class folders.*move them elsewhere"):
        load_dataset("folder", tmp_path)


# --- MIT67


def test_mit67_is_divided_by_its_lists(tmp_path):
    write_mit67(tmp_path)
    dataset = load_dataset("mit67", tmp_path, size=16)
    assert dataset.classes == ["airport_inside", "tv_studio"]
    train, val, test = (set(split.listing.files) for split in (dataset.train, dataset.val, dataset.test))
    assert train | val == set((tmp_path / "TrainImages.txt").read_text().split())
    assert test == set((tmp_path / "TestImages.txt").read_text().split())
    assert not train & val
    assert val
    for split in (dataset.train, dataset.val, dataset.test):
        for file, label in zip(split.listing.files, split.labels.tolist(), strict=True):
            assert file.startswith(dataset.classes[label] + "/")


def test_mit67s_lists_with_the_line_ends_of_windows(tmp_path):
    write_mit67(tmp_path)
    before = load_dataset("mit67", tmp_path).train.listing.files
    path = tmp_path / "TrainImages.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load_dataset("mit67", tmp_path).train.listing.files == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tv_studio/gone.jpg", "gone.jpg is missing"),
        ("../../etc/passwd", "is not CLASS/FILE"),
        ("../passwd", "is not CLASS/FILE"),
        ("/etc", "is not CLASS/FILE"),
        ("tv_studio/tv_studio_0000.jpg", "is in TrainImages.txt and in TestImages.txt"),
        ("zoo/x.jpg", "names class 'zoo', unknown in training"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, line, message):
    write_mit67(tmp_path)
    with (tmp_path / "TestImages.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        load_dataset("mit67", tmp_path)


def test_incomplete_mit67_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"TrainImages\.txt is missing; download"):
        load_dataset("mit67", tmp_path)
    write_mit67(tmp_path)
    shutil.rmtree(tmp_path / "Images")
    with pytest.raises(UserError, match="no folder 'Images'"):
        load_dataset("mit67", tmp_path)


# --- Caltech101


def test_caltech101_is_divided_by_its_protocol(tmp_path):
    write_caltech101(tmp_path, counts=(31, 90))
    datasets = [load_dataset("caltech101", tmp_path, split_seed=seed) for seed in (0, 0, 1)]
    tests = []
    for dataset in datasets:
        assert dataset.classes == ["Motorbikes", "accordion"]
        counts = [[(split.labels == label).sum().item() for label in range(2)]
                  for split in (dataset.train, dataset.val, dataset.test)]  # fmt: skip
        assert counts == [[27, 27], [3, 3], [50, 1]]
        parts = [set(split.listing.files) for split in (dataset.train, dataset.val, dataset.test)]
        assert len(set.union(*parts)) == 110 + 1
        tests.append(parts[2])
    assert tests[0] == tests[1] != tests[2]
    inner = load_dataset("caltech101", tmp_path / "101_ObjectCategories")
    assert set(inner.test.listing.files) == tests[0]


def test_caltech101_with_a_class_too_small(tmp_path):
    write_caltech101(tmp_path, counts=(30, 40))
    with pytest.raises(UserError, match="accordion has 30 images, not more than 30: incomplete"):
        load_dataset("caltech101", tmp_path)
