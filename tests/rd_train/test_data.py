"""Data sets in memory: splits, statistics, padding; and batches that any step can resume."""

import gzip
import threading
import time
from itertools import combinations, islice

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from rd_deploy.common import UserError
from rd_train.augment import Augment
from rd_train.data import (
    DATASETS,
    READERS,
    MemorySplit,
    batches,
    channel_statistics,
    evaluation_batches,
    load_dataset,
    steps_per_epoch,
)
from rd_train.recipe import IN_MEMORY
from rd_train.sources import DEBIAN_FASHION

needs_fashion = pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="the package dataset-fashion-mnist is missing")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def fashion():
    return load_dataset("fashion-mnist")


def hashes(split):
    return {pixels.tobytes() for pixels in split.pixels}


def parts(dataset):
    return dataset.train, dataset.val, dataset.test


def test_digits_are_scikit_learns(digits):
    original = load_digits()
    known = {image.tobytes(): label for image, label in zip(original.images, original.target, strict=True)}
    seen = 0
    for split in parts(digits):
        grey = np.rint(split.pixels[..., 0] / (255 / 16))
        assert [known[image.tobytes()] for image in grey] == split.labels.tolist()
        seen += len(split)
    assert seen == 1797
    assert [len(split) for split in parts(digits)] == [1257, 180, 360]


def test_digits_splits_share_no_image_and_hold_every_class(digits):
    for one, other in combinations(parts(digits), 2):
        assert not hashes(one) & hashes(other)
    for split in parts(digits):
        share = torch.bincount(split.labels) / len(split)
        assert (share - 0.1).abs().max() < 0.015


def test_splits_do_not_depend_on_torchs_or_numpys_seed(digits):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 (the global seed is what must not matter)
    again = load_dataset("digits")
    for one, other in zip(parts(digits), parts(again), strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert torch.equal(one.labels, other.labels)


def test_training_split_is_normalised(digits):
    images = digits.train.images(torch.arange(len(digits.train))).double()
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(correction=0) - 1) < 1e-6


def test_statistics_are_exact_whatever_the_blocks(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 7, 2), np.uint8)
    chosen = np.arange(1, 40, 2)
    expected = images[chosen].reshape(-1, 2) / 255
    for block in (1 << 24, 100):  # bytes: all at once, an image or two
        monkeypatch.setattr("rd_train.data.STATISTICS_BLOCK", block)
        mean, std = channel_statistics(images, chosen)
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, expected.std(0), rtol=1e-12)


@needs_fashion
def test_fashion_is_torchvisions_order_and_labels(fashion):
    with gzip.open(DEBIAN_FASHION / "t10k-images-idx3-ubyte.gz") as stream:
        expected = np.frombuffer(stream.read()[16:], np.uint8).reshape(-1, 28, 28)
    assert np.array_equal(fashion.test.pixels[..., 0], expected)
    assert fashion.classes == torchvision.datasets.FashionMNIST.classes
    assert [len(split) for split in parts(fashion)] == [55_000, 5_000, 10_000]
    assert torch.bincount(fashion.val.labels).tolist() == [500] * 10
    assert abs(fashion.preprocessing.mean[0] - 0.286) < 1e-3  # the published constants
    assert abs(fashion.preprocessing.std[0] - 0.353) < 1e-3


@needs_fashion
def test_fashion_splits_share_no_image(fashion):
    for one, other in combinations(parts(fashion), 2):
        assert not hashes(one) & hashes(other)


@needs_fashion
def test_fashion_padded_to_32(fashion):
    padded = load_dataset("fashion-mnist", size=32)
    record = padded.preprocessing
    assert (record.size, record.resize, record.pad) == (32, 28, 2)
    indices = torch.tensor([3, 9])
    large, small = padded.test.images(indices), fashion.test.images(indices)
    assert torch.equal(large[:, :, 2:-2, 2:-2], small)
    black = -record.mean[0] / record.std[0]
    assert (large[:, :, :2] - black).abs().max() < 1e-6
    assert torch.equal(torch.from_numpy(record.apply(padded.test.pixels[[3, 9]])), large)


def test_odd_padding_keeps_the_image_whole(digits):
    image = load_dataset("digits", size=11).val.images(torch.arange(2))
    assert image.shape == (2, 1, 11, 11)
    assert torch.equal(image[:, :, 2:10, 2:10], digits.val.images(torch.arange(2)))


def test_limit_takes_a_stratified_part_of_the_same_split(digits):
    part = load_dataset("digits", limit=200)
    assert len(part.train) == 200
    assert hashes(part.train) <= hashes(digits.train)
    assert torch.bincount(part.train.labels).min() >= 18
    assert part.preprocessing == digits.preprocessing
    assert np.array_equal(part.val.pixels, digits.val.pixels)


# --- batches


def test_an_epoch_shows_each_training_image_at_most_once(digits):
    split = load_dataset("digits", augment=Augment()).train
    seen = torch.cat([images for images, _ in batches(split, 100, seed=0, epoch=0)])
    assert len(seen) == 1200 == 100 * steps_per_epoch(split, 100)
    assert len({image.numpy().tobytes() for image in seen}) == 1200


def test_labels_belong_to_their_images():
    split = load_dataset("digits", augment=Augment()).train
    every = split.images(torch.arange(1257)).numpy()
    known = {image.tobytes(): label for image, label in zip(every, split.labels.tolist(), strict=True)}
    for images, labels in batches(split, 64, seed=3, epoch=1):
        assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize("start", [0, 1, 7, 18, 19, 25])
def test_resuming_equals_skipping(digits, start):
    whole = list(batches(digits.train, 64, seed=1, epoch=4))
    resumed = list(batches(digits.train, 64, seed=1, epoch=4, start=start))
    assert len(resumed) == max(0, 19 - start)
    for (images, labels), (again, same) in zip(whole[start:], resumed, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)


def test_skipped_batches_are_not_computed(digits):
    split = Counting(digits.train)
    assert len(list(batches(split, 64, seed=1, epoch=4, start=15))) == 4
    assert split.calls == 4


def test_seed_and_epoch_change_order_and_augmentation(digits):
    def first(**numbers):
        return next(batches(digits.train, 64, **numbers))

    images, labels = first(seed=0, epoch=0)
    for other in ({"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}, {"seed": -1, "epoch": 0}):
        assert not torch.equal(images, first(**other)[0])
        assert not torch.equal(labels, first(**other)[1])
    indices = torch.arange(64)
    assert not torch.equal(digits.train.augmented(indices, 1), digits.train.augmented(indices, 2))


def test_every_batch_is_augmented_with_a_seed_of_its_own(digits):
    split = Counting(digits.train)
    for epoch in range(2):
        list(batches(split, 64, seed=0, epoch=epoch))
    assert len(set(split.seeds)) == split.calls == 38


class OnDevice(MemorySplit):
    """A split whose images lie on a device, as those of benchmarks/accuracy/gpu.py."""

    def augmented(self, indices, seed, part=slice(None)):
        return super().augmented(indices, seed, part).to("meta")


def test_pinned_batches_are_new_copies_of_what_is_on_the_cpu(digits, monkeypatch):
    made = []

    def pin(x):
        made.append(x.clone())
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)  # which needs a GPU
    options = {"seed": 1, "epoch": 4, "start": 16}
    expected = list(batches(digits.train, 64, **options))
    assert not made
    found = list(batches(digits.train, 64, pinned=True, **options))
    assert len(found) == 3
    assert [id(x) for batch in found for x in batch] == [id(x) for x in made]
    assert all(torch.equal(*pair) for pairs in map(zip, found, expected) for pair in pairs)
    made.clear()
    split = OnDevice(digits.train.pixels, digits.train.labels, digits.train.preprocessing, digits.train.augment)
    for images, labels in batches(split, 64, pinned=True, **options):
        assert images.is_meta
        assert any(labels is x for x in made)
    assert len(made) == 3


def all_of(split, train, rank=0, world=1):
    share = {"rank": rank, "world": world}
    if train:
        return list(batches(split, 60, seed=5, epoch=2, **share))
    return [(images, split.labels[indices]) for images, indices in evaluation_batches(split, 60, **share)]


@pytest.mark.parametrize("world", [2, 3])
def test_slices_of_processes_make_up_the_batches_of_one(world):
    split = load_dataset("digits", augment=Augment(crop_padding=1, flip=True)).train
    whole = all_of(split, True)
    shares = [all_of(split, True, rank, world) for rank in range(world)]
    assert len(whole) == 20
    for (images, labels), *parts_of_it in zip(whole, *shares, strict=True):
        assert all(len(part[1]) == 60 // world for part in parts_of_it)
        assert torch.equal(images, torch.cat([part[0] for part in parts_of_it]))
        assert torch.equal(labels, torch.cat([part[1] for part in parts_of_it]))


def test_processes_evaluate_every_image_once(digits):
    whole, shares = all_of(digits.test, False), [all_of(digits.test, False, rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    for number, (images, labels) in enumerate(whole):
        part = shares[number % 4][number // 4]
        assert torch.equal(images, part[0])
        assert torch.equal(labels, part[1])


@pytest.mark.parametrize(
    ("size", "world", "reason"), [(64, 3, "multiple of 3"), (4, 4, "at least 8"), (1258, 2, "less than one")]
)
def test_shares_must_be_equal(digits, size, world, reason):
    with pytest.raises(UserError, match=reason):
        batches(digits.train, size, seed=0, epoch=0, world=world)


def test_evaluation_is_complete_in_order_and_unvaried(digits):
    found = [(images, digits.test.labels[indices]) for images, indices in evaluation_batches(digits.test, 100)]
    assert [len(labels) for _, labels in found] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in found]), digits.test.labels)
    assert torch.equal(torch.cat([images for images, _ in found]), digits.test.images(torch.arange(360)))


def test_set_smaller_than_a_batch_is_one_batch():
    split = load_dataset("digits", limit=10).train
    assert steps_per_epoch(split, 64) == 1
    assert [len(labels) for _, labels in batches(split, 64, seed=0, epoch=0)] == [10]


class Counting:
    """A split that counts what is asked of it and can fail."""

    def __init__(self, split, fail_at=None):
        self.split, self.labels, self.fail_at = split, split.labels, fail_at
        self.corrupt, self.ahead = split.corrupt, split.ahead
        self.calls, self.seeds = 0, []

    def __len__(self):
        return len(self.split)

    def augmented(self, indices, seed, part=slice(None)):
        self.calls += 1
        self.seeds.append(seed)
        if self.calls == self.fail_at:
            raise UserError("image 3 is bad")
        return self.split.augmented(indices, seed, part)


def test_one_batch_is_prepared_ahead_and_no_more(digits):
    split = Counting(digits.train)
    iterator = batches(split, 64, seed=0, epoch=0)
    next(iterator)
    for _ in range(200):
        if split.calls == 2:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert split.calls == 2
    iterator.close()


def test_error_in_the_background_reaches_the_caller_in_its_turn(digits):
    iterator = batches(Counting(digits.train, fail_at=3), 64, seed=0, epoch=0)
    assert len(list(islice(iterator, 2))) == 2
    with pytest.raises(UserError, match="image 3 is bad"):
        next(iterator)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_abandoned_iterator_leaves_no_thread(digits, taken):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    iterator = batches(digits.train, 64, seed=0, epoch=0)
    for _ in islice(iterator, taken):
        pass
    del iterator
    assert not ours()


# --- bad input


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'fashion-mnist'"):
        load_dataset("fashion_mnist")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"size": 7}, "size must be from 8"),
        ({"size": 1025}, "to 1024"),
        ({"limit": 0}, "train_limit=.* must be"),
        ({"limit": 1258}, "1,257 training images"),
        ({"download": True}, "--download is for"),
        ({"augment": Augment(smallest_crop=0.5)}, "smallest_crop is for image folders"),
    ],
)
def test_wrong_options_are_refused(values, reason):
    with pytest.raises(UserError, match=reason):
        load_dataset("digits", **values)


def test_batch_size_must_be_positive(digits):
    with pytest.raises(UserError, match="batch size"):
        batches(digits.train, 0, seed=0, epoch=0)


def test_missing_fashion_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*--data-dir.*--download"):
        load_dataset("fashion-mnist", tmp_path)


def test_fashion_is_downloaded_only_when_asked_and_failure_is_one_line(tmp_path, monkeypatch):
    def offline(root, download):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    with pytest.raises(UserError, match=r"download failed \(network is unreachable\)"):
        load_dataset("fashion-mnist", tmp_path, download=True)


@needs_fashion
def test_downloaded_fashion_is_found_in_torchvisions_layout(tmp_path, monkeypatch):
    def fetch(root, download):
        (tmp_path / "FashionMNIST").mkdir()
        (tmp_path / "FashionMNIST" / "raw").symlink_to(DEBIAN_FASHION)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    assert len(load_dataset("fashion-mnist", tmp_path, limit=10, download=True).train) == 10
    monkeypatch.delattr(torchvision.datasets, "FashionMNIST")  # what is there is not downloaded again
    assert len(load_dataset("fashion-mnist", tmp_path, limit=10, download=True).train) == 10


def test_every_name_is_listed():
    memory, encoded = {"digits", "fashion-mnist", "idx", "npz", "cifar10", "cifar100"}, {"folder", "webdataset"}
    assert set(DATASETS) == memory | encoded | {"mit67", "caltech101"}
    assert set(IN_MEMORY) == set(READERS)
