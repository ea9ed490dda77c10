"""Data sets as three disjoint splits, and the batches of an epoch as a pure function of (seed, epoch, number)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rd_deploy.common import UserError, nearest
from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment, shift_and_flip
from rd_train.image_folder import folder_splits
from rd_train.sources import DOWNLOADS, Pixels, read_cifar, read_digits, read_fashion, read_given_idx, read_npz_set
from rd_train.splits import check_labels, limited, stratified_order


class Split(Protocol):
    """One of train, validation and test; ``labels`` is int64 (N,) on the CPU."""

    labels: Tensor

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """float32 (len(indices), C, size, size), preprocessed as for deployment, without augmentation."""

    def augmented(self, indices: Tensor, seed: int, part: slice = slice(None)) -> Tensor:
        """The same with training augmentation; a pure function of ``indices`` and ``seed``.

        With ``part``, only ``[part]`` of the result, bit for bit: what one of several processes needs of a batch.
        """


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

    def augmented(self, indices: Tensor, seed: int, part: slice = slice(None)) -> Tensor:
        framed = self.preprocessing.frame(self.pixels[indices[part].numpy()])
        generator = np.random.default_rng(seed)
        varied = shift_and_flip(framed, self.augment, generator, batch=len(indices), part=part)
        return torch.from_numpy(self.preprocessing.normalise(varied))


# --- data sets held in memory


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
    order = stratified_order(data.labels) if data.given_validation is None else np.arange(len(data.labels))
    held_out, kept = order[len(order) - data.validation :], order[: len(order) - data.validation]
    validation = data.given_validation or (data.images[held_out], data.labels[held_out])
    check_labels(validation[1], len(data.classes), f"{name}'s validation set")
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
        split(*validation),
        split(data.test_images, data.test_labels),
        data.classes,
        preprocessing,
    )


READERS: dict[str, Callable[[Path | None, bool], Pixels]] = {
    "digits": lambda folder, download: read_digits(),
    "fashion-mnist": read_fashion,
    "idx": lambda folder, download: read_given_idx(folder),
    "npz": lambda path, download: read_npz_set(path),
    "cifar10": lambda folder, download: read_cifar(folder, download, 10),
    "cifar100": lambda folder, download: read_cifar(folder, download, 100),
}
AUGMENTS = {
    "digits": Augment(crop_padding=1),
    "fashion-mnist": Augment(crop_padding=2, flip=True),
    "idx": Augment(crop_padding=2),
    "npz": Augment(crop_padding=2),
    "cifar10": Augment(crop_padding=4, flip=True),
    "cifar100": Augment(crop_padding=4, flip=True),
    "folder": Augment(flip=True, smallest_crop=0.08),  # Szegedy et al. 2015
}
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

    ``folder``: where its files are (digits need none; npz is one file). ``size``: pixels of the square the network
    sees, by default the images' own. ``limit``: train on the first so many images only. ``augment``: by default the
    data set's own.
    """
    if name not in DATASETS:
        raise UserError(f"data set '{name}' is unknown{nearest(name, DATASETS)}")
    if download and name not in DOWNLOADS:
        raise UserError(f"--download is for {', '.join(DOWNLOADS)}, not for {name}")
    folder = None if folder is None else Path(folder)
    if folder is not None and not folder.is_dir() and not download and name != "npz":
        raise UserError(f"data folder {folder} does not exist; give an existing one with --data-dir")
    augment = augment or AUGMENTS[name]
    if name == "folder":
        if folder is None:
            raise UserError("data set 'folder' needs the folder of its images: give --data-dir")
        classes, preprocessing, splits = folder_splits(folder, 224 if size is None else size, limit, augment)
        return Dataset(name, *splits, classes, preprocessing)
    return memory_dataset(name, READERS[name](folder, download), size, limit, augment)


# --- batches


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Training batches in an epoch: the last incomplete one is dropped, unless it is the only one."""
    return max(1, len(split) // batch_size)


def derive_seed(*numbers: int) -> int:
    """A well-mixed non-negative 63-bit seed from several numbers (each taken modulo 2**64)."""
    sequence = np.random.SeedSequence([number % 2**64 for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def check_shares(images: int, batch_size: int, world: int) -> None:
    """Each of ``world`` processes needs the same number of a training batch's images, and BN 2 of them."""
    if world == 1:
        return
    if batch_size % world or batch_size // world < 2:
        raise UserError(
            f"batch_size={batch_size} is of all processes together: with {world} it must be a multiple of {world} "
            f"and at least {2 * world}"
        )
    if images < batch_size:
        raise UserError(f"{images} training images are less than one batch of {batch_size}; use a smaller --batch-size")


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    train: bool,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 (B, C, size, size), labels int64 (B,)) from batch number ``start`` on.

    Batch i is a pure function of (seed, epoch, i), so training resumes bit-exactly anywhere. ``train``: shuffled,
    augmented, the last incomplete batch dropped (unless it is the only one); otherwise everything in order, unvaried.
    One batch is prepared ahead in a thread, whose errors are raised here.

    Process ``rank`` of ``world`` gets its slice of every training batch (an equal share, see `check_shares`), and
    otherwise every ``world``-th whole batch, so that together they see each image once.
    """
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, not {batch_size}")
    if train:
        check_shares(len(split), batch_size, world)
    count = steps_per_epoch(split, batch_size) if train else -(-len(split) // batch_size)
    share = batch_size // world
    part = slice(rank * share, (rank + 1) * share)
    order = torch.arange(len(split))
    if train:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = order[number * batch_size : (number + 1) * batch_size]
        if train:
            return split.augmented(indices, derive_seed(seed, epoch, number), part), split.labels[indices[part]]
        return split.images(indices), split.labels[indices]

    return _one_ahead(make, range(start, count) if train else range(start + rank, count, world))


def _one_ahead(make: Callable[[int], tuple[Tensor, Tensor]], numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``make(number)`` in order, computing the next while the caller works; closing it ends the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        upcoming = None
        for number in numbers:
            current, upcoming = upcoming or worker.submit(make, number), None
            if number + numbers.step < numbers.stop:
                upcoming = worker.submit(make, number + numbers.step)
            yield current.result()
