"""Data sets as three disjoint splits, and the batches of an epoch as a pure function of (seed, epoch, number)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rd_deploy.common import UserError, nearest, require
from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment, shift_and_flip
from rd_train.formats import find_idx, read_idx_pair

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SPLIT_SEED = 20  # fixed: splits never depend on a run's seed


class Split(Protocol):
    """One of train, validation and test; ``labels`` is int64 (N,) on the CPU."""

    labels: Tensor

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """float32 (len(indices), C, size, size), preprocessed as for deployment, without augmentation."""

    def augmented(self, indices: Tensor, seed: int) -> Tensor:
        """The same with training augmentation; a pure function of ``indices`` and ``seed``."""


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, the same whatever the run's seed, and what deployment must know about the images."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class MemorySplit:
    """Images held in memory as uint8 (N, H, W, C).

    The work is done by NumPy and not by torch: it runs in a background thread, where torch would start a second pool of
    threads that fights with the training step for the cores.
    """

    pixels: np.ndarray
    labels: Tensor
    preprocessing: Preprocessing
    augment: Augment

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.preprocessing.apply(self.pixels[indices.numpy()]))

    def augmented(self, indices: Tensor, seed: int) -> Tensor:
        framed = self.preprocessing.frame(self.pixels[indices.numpy()])
        varied = shift_and_flip(framed, self.augment, np.random.default_rng(seed))
        return torch.from_numpy(self.preprocessing.normalise(varied))


# --- splits


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """A fixed permutation whose every prefix holds the classes in their proportions.

    Each class is shuffled, its k-th of n members gets the position (k + 1/2) / n, and all are sorted by position.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")


def limited(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of the whole training split, or of its first ``limit`` images in stratified order."""
    if limit is None:
        return np.arange(len(labels))
    if not 1 <= limit <= len(labels):
        raise UserError(f"limit must be from 1 to the {len(labels):,} training images, not {limit}")
    return stratified_order(labels)[:limit]


def check_labels(labels: np.ndarray, classes: int, where: str, *, every: bool = False) -> None:
    """Labels must lie in 0 .. classes - 1; with ``every``, each class must occur."""
    if classes < 2:
        raise UserError(f"{where} has fewer than 2 classes; there is nothing to learn")
    if len(labels) == 0:
        raise UserError(f"{where} has no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{where} has labels outside 0 to {classes - 1}: {labels.min()} to {labels.max()}")
    empty = np.setdiff1d(np.arange(classes), labels)
    if every and len(empty):
        raise UserError(f"{where} has no images of class {empty[0]}; every class needs some")


# --- data sets held in memory


@dataclass(frozen=True)
class Pixels:
    """A data set as it was read: images uint8 (N, H, W, C) and labels int64 (N,), not split yet."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    validation: int  # how many of ``images`` are held out
    classes: list[str]


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, C), in [0, 1], from exact counts."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[3])])
    share, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    if not std.all():
        raise UserError("a colour channel is the same in every pixel of the training images; there is nothing to learn")
    return tuple(mean.tolist()), tuple(std.tolist())


def memory_dataset(name: str, data: Pixels, size: int | None, limit: int | None, augment: Augment) -> Dataset:
    """Split, normalise by the training split's statistics (before ``limit``), and pad to ``size`` if it is larger."""
    if augment.smallest_crop != 1:
        raise UserError("smallest_crop is for image folders; the images of this data set are shifted by crop_padding")
    check_labels(data.labels, len(data.classes), f"{name}'s training set", every=True)
    check_labels(data.test_labels, len(data.classes), f"{name}'s test set")
    order = stratified_order(data.labels)
    held_out, kept = order[len(order) - data.validation :], order[: len(order) - data.validation]
    check_labels(data.labels[kept], len(data.classes), f"{name}'s training split", every=True)
    height, width, channels = data.images.shape[1:]
    native = min(height, width)
    size = native if size is None else size
    if not native <= size <= 1024:
        raise UserError(f"size must be from {native} (the images' own) to 1024 for {name}, not {size}")
    statistics = channel_statistics(data.images[kept])
    preprocessing = Preprocessing(size, native, channels, *statistics, pad=(size - native + 1) // 2)
    kept = kept[limited(data.labels[kept], limit)]

    def split(images: np.ndarray, labels: np.ndarray) -> MemorySplit:
        return MemorySplit(images, torch.from_numpy(labels), preprocessing, augment)

    return Dataset(
        name,
        split(data.images[kept], data.labels[kept]),
        split(data.images[held_out], data.labels[held_out]),
        split(data.test_images, data.test_labels),
        data.classes,
        preprocessing,
    )


def read_digits() -> Pixels:
    """scikit-learn's 1,797 scans of 8x8 pixels: 1,437 to train and validate with, 360 to test, stratified."""
    digits = require("sklearn.datasets", "train").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 grey levels, 0 to 16
    labels = digits.target.astype(np.int64)
    order = stratified_order(labels)
    test, rest = order[:360], order[360:]
    return Pixels(images[rest], labels[rest], images[test], labels[test], 180, [str(digit) for digit in range(10)])


def read_idx_folder(folder: Path, classes: list[str] | None) -> Pixels:
    """Train and t10k IDX files; a twelfth of the training images is held out (5,000 of 60,000)."""
    images, labels = read_idx_pair(folder, "train")
    test_images, test_labels = read_idx_pair(folder, "t10k")
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{folder}: training images are {images.shape[1:3]} pixels, test images are not")
    classes = classes or [str(label) for label in range(int(labels.max()) + 1)]
    return Pixels(images, labels, test_images, test_labels, max(1, len(labels) // 12), classes)


def find_fashion(folder: Path | None, download: bool) -> Path:
    """The folder of Fashion-MNIST's IDX files, downloaded if asked for and not there."""
    places = [folder, folder / "FashionMNIST" / "raw"] if folder else [DEBIAN_FASHION]
    found = next((place for place in places if find_idx(place, "train", "images")), None)
    if found:
        return found
    if not download:
        raise UserError(
            f"Fashion-MNIST is not in {' or '.join(map(str, places))}: apt-get install dataset-fashion-mnist, "
            "or give its folder with --data-dir, or --download it there"
        )
    if folder is None:
        raise UserError("--download needs a folder to download to: give --data-dir")
    _download(lambda: require("torchvision.datasets", "train").FashionMNIST(str(folder), download=True))
    return places[1]


def _download(fetch: Callable[[], object]) -> None:
    try:
        fetch()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; torchvision says RuntimeError of a bad checksum
        raise UserError(f"the download failed ({error}); check the network or give --data-dir") from error


def _idx_folder(folder: Path | None) -> Path:
    if folder is None:
        raise UserError("data set 'idx' needs the folder of its IDX files: give --data-dir")
    return folder


READERS: dict[str, Callable[[Path | None, bool], Pixels]] = {
    "digits": lambda folder, download: read_digits(),
    "fashion-mnist": lambda folder, download: read_idx_folder(find_fashion(folder, download), FASHION_CLASSES),
    "idx": lambda folder, download: read_idx_folder(_idx_folder(folder), None),
}
AUGMENTS = {
    "digits": Augment(crop_padding=1),
    "fashion-mnist": Augment(crop_padding=2, flip=True),
    "idx": Augment(crop_padding=2),
}
DOWNLOADS = ("fashion-mnist",)
DATASETS = tuple(AUGMENTS)


def load_dataset(
    name: str,
    folder: str | Path | None = None,
    *,
    size: int | None = None,
    limit: int | None = None,
    download: bool = False,
    augment: Augment | None = None,
) -> Dataset:
    """Read a data set; anything wrong with it is a `UserError`.

    ``folder``: where its files are (digits need none). ``size``: pixels of the square the network sees, by default the
    images' own. ``limit``: train on the first so many images only. ``augment``: by default the data set's own.
    """
    if name not in DATASETS:
        raise UserError(f"data set '{name}' is unknown{nearest(name, DATASETS)}")
    if download and name not in DOWNLOADS:
        raise UserError(f"--download is for {', '.join(DOWNLOADS)}, not for {name}")
    folder = None if folder is None else Path(folder).expanduser()
    if folder is not None and not folder.is_dir() and not download:
        raise UserError(f"data folder {folder} does not exist; give an existing one with --data-dir")
    augment = augment or AUGMENTS[name]
    return memory_dataset(name, READERS[name](folder, download), size, limit, augment)


# --- batches


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Training batches in an epoch: the last incomplete one is dropped, unless it is the only one."""
    return max(1, len(split) // batch_size)


def derive_seed(*numbers: int) -> int:
    """A well-mixed non-negative 63-bit seed from several numbers (each taken modulo 2**64)."""
    sequence = np.random.SeedSequence([number % 2**64 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, train: bool, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 (B, C, size, size), labels int64 (B,)) from batch number ``start`` on.

    Batch i is a pure function of (seed, epoch, i), so training resumes bit-exactly anywhere. ``train``: shuffled,
    augmented, the last incomplete batch dropped (unless it is the only one); otherwise everything in order, unvaried.
    One batch is prepared ahead in a thread, whose errors are raised here.
    """
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, not {batch_size}")
    count = steps_per_epoch(split, batch_size) if train else -(-len(split) // batch_size)
    order = torch.arange(len(split))
    if train:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = order[number * batch_size : (number + 1) * batch_size]
        images = split.augmented(indices, derive_seed(seed, epoch, number)) if train else split.images(indices)
        return images, split.labels[indices]

    return _one_ahead(make, range(start, count))


def _one_ahead(make: Callable[[int], tuple[Tensor, Tensor]], numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``make(number)`` in order, computing the next while the caller works; closing it ends the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        upcoming = None
        for number in numbers:
            current, upcoming = upcoming or worker.submit(make, number), None
            if number + 1 < numbers.stop:
                upcoming = worker.submit(make, number + 1)
            yield current.result()
