"""Encoded images in batches: the same by any number of workers, and around images that cannot be read."""

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photographs import write_imagenet, write_photographs
from PIL import Image

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.context import Context
from rd_train.data import Meter, batches, evaluation_batches, load_dataset
from rd_train.encoded import encoded_preprocessing
from rd_train.evaluation import evaluate
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe
from rd_train.skipped import Skipped


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write_imagenet(root, train=60)
    return root


def ruin(split, index: int) -> str:
    """Cut an image of a split short; returns its name."""
    path = split.listing.root / split.listing.files[index]
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


def epoch(dataset, *, train: bool, batch_size: int = 24, start: int = 0) -> list:
    if train:
        return list(batches(dataset.train, batch_size, seed=1, epoch=2, start=start))
    return list(evaluation_batches(dataset.test, batch_size))


def same(one: list, other: list) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_batches_are_the_same_with_any_number_of_workers(photographs):
    dataset = load_dataset("folder", photographs, size=32)
    expected = epoch(dataset, train=True), epoch(dataset, train=False)
    assert len(expected[0]) == 4
    for workers in (1, 2):
        dataset = load_dataset("folder", photographs, size=32, workers=workers)
        try:
            assert same(epoch(dataset, train=True), expected[0])
            assert same(epoch(dataset, train=False), expected[1])
            assert same(epoch(dataset, train=True, start=2), expected[0][2:])
        finally:
            dataset.workers.close()


def test_workers_stay_for_all_epochs_and_end_when_closed(photographs):
    dataset = load_dataset("folder", photographs, size=16, workers=2)
    epoch(dataset, train=True)
    processes = set(dataset.workers._pool._processes)
    epoch(dataset, train=False)
    assert set(dataset.workers._pool._processes) == processes
    assert all(os.path.exists(f"/proc/{number}") for number in processes)  # noqa: PTH110
    dataset.workers.close()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{number}") for number in processes):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_dies_is_one_line(photographs):
    dataset = load_dataset("folder", photographs, size=16, workers=1)
    iterator = batches(dataset.train, 8, seed=0, epoch=0)
    next(iterator)
    for number in dataset.workers._pool._processes:
        os.kill(number, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process died"):
        list(iterator)
    dataset.workers.close()


def test_errors_of_workers_reach_the_caller(tmp_path):
    write_imagenet(tmp_path)
    dataset = load_dataset("folder", tmp_path, size=16, workers=1)
    (tmp_path / "train" / dataset.train.listing.files[3]).unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        epoch(dataset, train=True)
    dataset.workers.close()


def test_a_corrupt_image_is_replaced_by_the_next_of_its_class(tmp_path):
    write_imagenet(tmp_path)
    before = load_dataset("folder", tmp_path, size=16).train
    first, last = 4, int((before.labels == 0).sum()) - 1  # the last of a class is replaced by its first
    dataset = load_dataset("folder", tmp_path, size=16)
    for index in (first, first + 1, last):
        ruin(dataset.train, index)
    wanted = torch.tensor([0, first, first + 1, last, last + 1])
    assert torch.equal(dataset.train.images(wanted), before.images(torch.tensor([0, 6, 6, 0, last + 1])))
    assert set(dataset.train.corrupt) == {first, first + 1, last}
    # The whole epoch, too, is the same again, in another order of discovery and by other processes.
    expected = epoch(load_dataset("folder", tmp_path, size=16), train=True)
    assert same(epoch(dataset, train=True), expected)
    again = load_dataset("folder", tmp_path, size=16, workers=2)
    assert same(epoch(again, train=True, start=1), expected[1:])
    again.workers.close()


def test_corrupt_images_are_named_counted_and_limited(tmp_path, capsys):
    write_imagenet(tmp_path / "data")
    dataset = load_dataset("folder", tmp_path / "data", size=16, max_corrupt=2)
    dataset.skipped.record(tmp_path / "skipped.txt", resume=False)
    names = [ruin(dataset.train, index) for index in (2, 7)]
    dataset.train.images(torch.arange(10))
    dataset.train.images(torch.arange(10))
    listed = [line.split("\t") for line in (tmp_path / "skipped.txt").read_text().splitlines()]
    assert [str(tmp_path / "data" / name) for name, _ in listed] == names  # so that the data may move
    assert all("cannot be decoded" in reason for _, reason in listed)
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if line.startswith("skipped")] == [f"skipped  {reason}" for _, reason in listed]
    # A resumed run counts those as well.
    other = load_dataset("folder", tmp_path / "data", size=16, max_corrupt=2)
    other.skipped.record(tmp_path / "skipped.txt", resume=True)
    assert len(other.skipped) == 2
    absolute = "".join(f"{name}\t{reason}\n" for name, (_, reason) in zip(names, listed, strict=True))
    (tmp_path / "skipped.txt").write_text(absolute)  # as earlier versions named them
    other.skipped.record(tmp_path / "skipped.txt", resume=True)
    other.train.images(torch.arange(10))
    assert len(other.skipped) == 2
    (tmp_path / "cut.txt").write_text("train/cut sh")
    fresh = Skipped()
    fresh.record(tmp_path / "cut.txt", resume=True)
    fresh.add("a.jpg", "no image")
    assert (tmp_path / "cut.txt").read_text() == "a.jpg\tno image\n"
    with (tmp_path / "skipped.txt").open("a", encoding="utf-8") as file:
        file.write("train/cut sh")  # killed while it wrote
    other.skipped.record(tmp_path / "skipped.txt", resume=True)
    assert len(other.skipped) == 2
    name = ruin(dataset.train, 20)
    with pytest.raises(
        UserError, match=r"more corrupt images than rd-train's --max-corrupt 2: .*the others are in .*skipped\.txt"
    ):
        other.train.images(torch.arange(25))
    assert name not in (tmp_path / "skipped.txt").read_text()
    # A new run forgets them.
    other.skipped.record(tmp_path / "new.txt", resume=False)


def test_a_name_that_is_no_text_is_named_nevertheless(tmp_path, capsys):
    skipped = Skipped(1)
    skipped.record(tmp_path / "skipped.txt", resume=False)
    skipped.add(os.fsdecode(b"caf\xe9.jpg"), "image caf\udce9.jpg is damaged")
    assert "caf\\udce9.jpg" in (tmp_path / "skipped.txt").read_text(encoding="utf-8")
    assert "caf\\udce9.jpg" in capsys.readouterr().err


def test_another_process_names_them(tmp_path, capsys):
    skipped = Skipped(1)
    skipped.record(tmp_path / "skipped.txt", resume=False, write=False)
    skipped.add("a.jpg", "image a.jpg is damaged")
    assert len(skipped) == 1
    assert not (tmp_path / "skipped.txt").exists()
    assert capsys.readouterr().err == ""


def test_no_corrupt_image_is_tolerated_if_that_was_asked(tmp_path):
    write_imagenet(tmp_path)
    dataset = load_dataset("folder", tmp_path, size=16, max_corrupt=0)
    name = ruin(dataset.val, 0)
    with pytest.raises(UserError, match="more corrupt images than rd-train's --max-corrupt 0") as error:
        list(evaluation_batches(dataset.val, 8))
    assert name in str(error.value)


def test_a_class_of_corrupt_images_cannot_be_trained_on(tmp_path):
    write_imagenet(tmp_path)
    dataset = load_dataset("folder", tmp_path, size=16, max_corrupt=1000)
    for index in range(int((dataset.train.labels == 0).sum())):
        ruin(dataset.train, index)
    with pytest.raises(UserError, match=r"every image of the class of .* is corrupt"):
        epoch(dataset, train=True)


def test_evaluation_leaves_corrupt_images_out(tmp_path):
    write_imagenet(tmp_path, val=4)
    context = Context(Recipe(batch_size=2), load_dataset("folder", tmp_path, size=16), tmp_path, torch.device("cpu"),
                      None)  # fmt: skip
    network = Network(parse_arch("plain20", width=1 / 16, classes=2)).eval()
    split = context.dataset.test
    with torch.no_grad():
        logits = network(split.images(torch.arange(8)))
    right, losses = (
        logits.argmax(1) == split.labels,
        torch.nn.functional.cross_entropy(logits, split.labels, reduction="none"),
    )
    bad = [1, 4, 5, 6, 7]  # the whole second class, too, and so a whole batch
    for index in bad:
        ruin(split, index)
    good = [index for index in range(8) if index not in bad]
    context = replace(context, dataset=load_dataset("folder", tmp_path, size=16))
    accuracy, loss = evaluate(network, context.dataset.test, context)
    assert accuracy == pytest.approx(right[good].double().mean().item())
    assert loss == pytest.approx(losses[good].mean().item(), rel=1e-5)
    assert set(context.dataset.test.corrupt) == set(bad)


def test_preprocessing_is_imagenets_or_that_of_the_network_to_start_from():
    plain = encoded_preprocessing(None, None)
    assert (plain.size, plain.resize, plain.mean) == (224, 256, (0.485, 0.456, 0.406))
    theirs = Preprocessing(160, 160, 3, (0.5,) * 3, (0.5,) * 3)
    assert encoded_preprocessing(None, theirs) == theirs
    assert encoded_preprocessing(224, theirs) == replace(theirs, size=224, resize=256)
    small = Preprocessing(32, 28, 3, (0.5,) * 3, (0.5,) * 3, pad=2)
    assert encoded_preprocessing(None, small) == replace(small, resize=37, pad=0)
    with pytest.raises(UserError, match="takes images of 1 channel"):
        encoded_preprocessing(None, Preprocessing(28, 28, 1, (0.5,), (0.5,)))


def test_the_meter_counts_time_once_however_many_threads(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 6.0])
    monkeypatch.setattr("rd_train.data.time", SimpleNamespace(monotonic=lambda: next(now)))
    meter = Meter()
    with meter.making(30), meter.making(10):
        pass
    with meter.making(0):
        assert meter.images == 40
    assert meter.rate() == pytest.approx(40 / 2)


def test_an_image_too_elongated_to_be_resized_is_corrupt(tmp_path):
    write_photographs(tmp_path, [f"{name}/{number}.png" for name in "ab" for number in range(20)])
    dataset = load_dataset("folder", tmp_path, size=16)
    for split, look in ((dataset.test, dataset.test.images), (dataset.train, lambda i: dataset.train.augmented(i, 0))):
        Image.fromarray(np.zeros((1, 1 << 22), np.uint8)).save(tmp_path / split.listing.files[0])
        look(torch.arange(1))
        assert "too elongated" in split.corrupt[0]
