"""Data sets as three disjoint splits, and the batches of an epoch as a pure function of (seed, epoch, number)."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from rd_deploy.common import UserError, nearest, printable
from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment, shift_and_flip
from rd_train.decode import SUFFIXES
from rd_train.encoded import EncodedSplit, encoded_preprocessing
from rd_train.image_folder import caltech101_layout, folder_layout, mit67_layout
from rd_train.listing import Listing
from rd_train.recipe import BY_DATA
from rd_train.shards import shard_layout
from rd_train.skipped import MAX_CORRUPT, Skipped
from rd_train.sources import DOWNLOADS, Pixels, read_cifar, read_digits, read_fashion, read_given_idx, read_npz_set
from rd_train.splits import check_labels, lacking, limited, stratified_order
from rd_train.workers import Workers

STATISTICS_BLOCK = 1 << 24  # values that are counted at a time


class Split(Protocol):
    """One of train, validation and test; ``labels`` is int64 (N,) on the CPU.

    ``corrupt``: the indices, of those that were asked for, of images that cannot be read; another of their class stands
    in their place. ``ahead``: how many batches are worth preparing at a time.
    """

    labels: Tensor
    corrupt: Mapping[int, str]
    ahead: int

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
    skipped: Skipped = field(default_factory=Skipped)  # the corrupt images of all splits
    workers: Workers = field(default_factory=Workers)
    notes: list[str] = field(default_factory=list)  # what a user must know of what was read, a line each

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images that train, validate and test."""
        return len(self.train), len(self.val), len(self.test)


@dataclass(frozen=True)
class MemorySplit:
    """Images held in memory as uint8 (N, H, W, C).

    The work is done by NumPy and not by torch: it runs in a background thread, where torch would start a second pool of
    threads that fights with the training step for the cores.
    """

    corrupt: ClassVar[Mapping[int, str]] = MappingProxyType({})
    ahead: ClassVar[int] = 1

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


def channel_statistics(images: np.ndarray, chosen: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the ``chosen`` of uint8 images (N, H, W, C), in [0, 1], by counts.

    Block by block: `numpy.bincount` makes eight bytes of each.
    """
    counts = np.zeros((images.shape[3], 256), np.int64)
    for indices in np.array_split(chosen, 1 + len(chosen) * images[0].size // STATISTICS_BLOCK):
        block = images[indices]
        counts += [np.bincount(block[..., c].ravel(), minlength=256) for c in range(images.shape[3])]
    share, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    if not std.all():
        raise UserError("a colour channel is the same in every pixel of the training images; there is nothing to learn")
    return tuple(mean.tolist()), tuple(std.tolist())


def memory_dataset(
    name: str, data: Pixels, size: int | None, limit: int | None, augment: Augment, like: Preprocessing | None = None
) -> Dataset:
    """Split, normalise by the training split's statistics (before ``limit``), and pad to ``size`` if it is larger.

    With ``like``, its mean and deviation instead: those that a network to start from was trained with.
    """
    if augment.smallest_crop != 1:
        raise UserError("smallest_crop is for image folders; the images of this data set are shifted by crop_padding")
    check_labels(data.labels, data.classes, f"{name}'s training set", every=True)
    check_labels(data.test_labels, data.classes, f"{name}'s test set")
    order = stratified_order(data.labels) if data.given_validation is None else np.arange(len(data.labels))
    held_out, kept = order[len(order) - data.validation :], order[: len(order) - data.validation]
    validation = data.given_validation or (data.images[held_out], data.labels[held_out])
    check_labels(validation[1], data.classes, f"{name}'s validation set")
    check_labels(data.labels[kept], data.classes, f"{name}'s training split", every=True)
    height, width, channels = data.images.shape[1:]
    native = min(height, width)
    size = native if size is None else size
    if not native <= size <= 1024:
        raise UserError(f"size must be from {native} (the images' own) to 1024 for {name}, not {size}")
    statistics = channel_statistics(data.images, kept) if like is None else (like.mean, like.std)
    if like is not None and like.channels != channels:
        raise UserError(f"the network to start from takes {like.channels} channel(s), images of {name} have {channels}")
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
# Data sets of encoded images; their layouts give class names and the listings of the splits.
ENCODED: dict[str, Callable[[Path, Workers, int], tuple[list[str], list[Listing]]]] = {
    "folder": lambda root, workers, split_seed: folder_layout(root),
    "webdataset": lambda root, workers, split_seed: shard_layout(root, workers),
    "mit67": lambda root, workers, split_seed: mit67_layout(root),
    "caltech101": lambda root, workers, split_seed: caltech101_layout(root, split_seed),
}
AUGMENTS = {name: Augment(**usual) for name, usual in BY_DATA.items()}
DATASETS = tuple(AUGMENTS)


def load_dataset(
    name: str,
    folder: str | Path | None = None,
    *,
    size: int | None = None,
    limit: int | None = None,
    download: bool = False,
    augment: Augment | None = None,
    like: Preprocessing | None = None,
    split_seed: int = 0,
    workers: int = 0,
    max_corrupt: int = MAX_CORRUPT,
) -> Dataset:
    """Read a data set; anything wrong with it is a `UserError`.

    ``folder``: where its files are (digits need none; npz is one file). ``size``: pixels of the square the network
    sees, by default the images' own. ``limit``: train on the first so many images only. ``augment``: by default the
    data set's own.
    ``like``: preprocess as for a network to start from. ``split_seed``: which of Caltech101's divisions. ``workers``:
    processes that decode files (0: none but this one), until ``workers.close()`` of the data set or the program's end.
    ``max_corrupt``: how many images may be unreadable.
    """
    if name not in DATASETS:
        raise UserError(f"data set '{name}' is unknown{nearest(name, DATASETS)}")
    if download and name not in DOWNLOADS:
        raise UserError(f"--download is for {', '.join(DOWNLOADS)}, not for {name}")
    folder = None if folder is None else Path(folder)
    if folder is not None and not folder.is_dir() and not download and name != "npz":
        raise UserError(f"data folder {folder} does not exist; give an existing one with --data-dir")
    augment = augment or AUGMENTS[name]
    if name not in ENCODED:
        return memory_dataset(name, READERS[name](folder, download), size, limit, augment, like)
    if folder is None:
        raise UserError(f"data set '{name}' needs the folder of its images: give --data-dir")
    preprocessing = encoded_preprocessing(size, like)
    processes, skipped = Workers(workers), Skipped(max_corrupt, folder)
    try:
        classes, listings = ENCODED[name](folder, processes, split_seed)
        for listing, part in zip(listings, ("training", "validation", "test"), strict=True):
            check_labels(listing.labels, classes, f"{folder}: the {part} split", every=part == "training")
        listings[0] = listings[0].select(limited(listings[0].labels, limit))
    except BaseException:  # Ctrl-C, too
        processes.close()
        raise
    splits = [
        EncodedSplit(part, torch.from_numpy(part.labels), preprocessing, augment, processes, skipped)
        for part in listings
    ]
    notes = [*_left_out(listings), *_lacking(listings, classes)]
    return Dataset(name, *splits, classes, preprocessing, skipped, processes, notes)


def _left_out(listings: list[Listing]) -> list[str]:
    """What of class folders was not read, told once of each place."""
    found = {listing.root: listing.ignored for listing in listings if listing.ignored[0]}
    return [
        f"{printable(root)}: {count:,} entries of class folders are left out, as {printable(example)}: images are "
        f"files directly in them whose names end in {', '.join(SUFFIXES)}"
        for root, (count, example) in found.items()
    ]


def _lacking(listings: list[Listing], classes: list[str]) -> list[str]:
    """Classes of which a split has no images, so that it says nothing of them."""
    notes = []
    for listing, part in zip(listings[1:], ("validation", "test"), strict=True):
        if empty := lacking(listing.labels, classes):
            names = ", ".join(map(printable, empty[:3]))
            notes.append(f"the {part} split has no images of {names}{f' and {len(empty) - 3} more' * (len(empty) > 3)}")
    return notes


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


class Meter:
    """How fast batches are made: their images, and the seconds in which at least one batch was being made."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._lock, self._active, self._since = threading.Lock(), 0, 0.0

    @contextlib.contextmanager
    def making(self, images: int) -> Iterator[None]:
        """Around the making of a batch."""
        with self._lock:
            if not self._active:
                self._since = time.monotonic()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                self.images += images
                if not self._active:
                    self.seconds += time.monotonic() - self._since

    def rate(self) -> float:
        """Images per second that can be made."""
        with self._lock:
            running = time.monotonic() - self._since if self._active else 0.0
            return self.images / max(1e-9, self.seconds + running)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    meter: Meter | None = None,
    pinned: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a training epoch's (images float32 (B, C, size, size), labels int64 (B,)) from batch ``start`` on.

    Batch i is a pure function of (seed, epoch, i), so training resumes bit-exactly anywhere: shuffled, augmented, the
    last incomplete batch dropped (unless it is the only one), corrupt images replaced by others of their class.
    ``split.ahead`` batches are prepared ahead in threads, whose errors are raised here; ``meter`` measures them.

    Process ``rank`` of ``world`` gets its slice of every batch (an equal share, see `check_shares`). ``pinned``: in
    memory that a GPU copies from by itself, while the program goes on (what a split has on a device stays there).
    """
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, not {batch_size}")
    check_shares(len(split), batch_size, world)
    share = batch_size // world
    part = slice(rank * share, (rank + 1) * share)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))
    meter = meter or Meter()

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = order[number * batch_size : (number + 1) * batch_size]
        with meter.making(len(indices[part])):
            batch = split.augmented(indices, derive_seed(seed, epoch, number), part), split.labels[indices[part]]
            return tuple(map(_pinned, batch)) if pinned else batch

    return _ahead(make, range(start, steps_per_epoch(split, batch_size)), split.ahead)


def _pinned(x: Tensor) -> Tensor:
    """In page-locked memory, which torch's allocator does not hand out again before the last copy from it is over."""
    return x.pin_memory() if x.device.type == "cpu" else x


def evaluation_batches(
    split: Split, batch_size: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 (B, C, size, size), indices int64 (B,)) of a whole split in order, unvaried.

    Corrupt images are left out, so that a batch may be empty. Prepared ahead as training batches are. Process ``rank``
    of ``world`` gets every ``world``-th batch, so that together they see each image once.
    """

    def make(start: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(start, min(start + batch_size, len(split)))
        images = split.images(indices)
        if split.corrupt:
            good = torch.tensor([index not in split.corrupt for index in indices.tolist()])
            images, indices = images[good], indices[good]
        return images, indices

    return _ahead(make, range(rank * batch_size, len(split), world * batch_size), split.ahead)


def fixed_sample(split: Split, count: int) -> Tensor:
    """Indices of at most ``count`` images, always the same ones, whatever the run's seed."""
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]


def _ahead(make: Callable[[int], tuple[Tensor, Tensor]], numbers: range, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``make(number)`` in order, ``depth`` of them ahead of the caller, in threads; closing it ends them."""
    coming, waiting = iter(numbers), deque()
    with ThreadPoolExecutor(depth, thread_name_prefix="batches") as threads:
        try:
            while True:
                waiting += [threads.submit(make, number) for number in islice(coming, 1 + depth - len(waiting))]
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
