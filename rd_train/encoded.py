"""Splits of images that lie encoded in files or in the members of tars, decoded when a batch needs them."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment
from rd_train.decode import Job, make
from rd_train.listing import Listing
from rd_train.skipped import Skipped
from rd_train.workers import Workers

# Of ImageNet's training images; the constants of torchvision's pretrained networks.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, RESIZE = 224, 256
CHUNK = 16  # images that a worker makes at a time: enough to hide the sending, few enough to share a batch


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Images decoded, cropped and resized on demand, by ``workers``.

    ``corrupt``: what is wrong with images, by index, as far as they were asked for. In their place stands the next
    image of the same class (in the order of the listing, from its end to its beginning), so that what comes out is
    still a function of the files and the arguments alone.
    """

    ahead: ClassVar[int] = 2  # while a batch is put together, the workers are at the next

    listing: Listing
    labels: Tensor
    preprocessing: Preprocessing
    augment: Augment
    workers: Workers
    skipped: Skipped
    corrupt: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return self._batch(indices.tolist(), None)

    def augmented(self, indices: Tensor, seed: int, part: slice = slice(None)) -> Tensor:
        return self._batch(indices[part].tolist(), seed)

    def _batch(self, indices: list[int], seed: int | None) -> Tensor:
        taken = [self._readable(index, seed) for index in indices]
        missing, size = list(range(len(indices))), self.preprocessing.size
        pixels = np.empty((len(indices), size, size, 3), np.uint8)
        while missing:
            seeds = None if seed is None else [(seed, indices[position]) for position in missing]
            made, corrupt = self._make([taken[position] for position in missing], seeds)
            if len(missing) == len(indices):
                pixels = made  # all of it: nothing to copy
            else:
                pixels[missing] = made
            for number, reason in corrupt.items():
                index = taken[missing[number]]
                self.corrupt[index] = reason
                self.skipped.add(self._name(index), reason)
            missing = [missing[number] for number in corrupt]
            for position in missing:
                taken[position] = self._readable(taken[position], seed)
        return torch.from_numpy(self.preprocessing.normalise(pixels))

    def _make(self, indices: list[int], seeds: list[tuple[int, int]] | None) -> tuple[np.ndarray, dict[int, str]]:
        """`rd_train.decode.make`, shared among the workers."""
        chunk = min(CHUNK, max(1, math.ceil(len(indices) / max(1, self.workers.count))))
        starts = range(0, len(indices), chunk)
        jobs = [
            Job(
                [self.listing.place(index) for index in indices[start : start + chunk]],
                [self._name(index) for index in indices[start : start + chunk]],
                None if seeds is None else seeds[start : start + chunk],
                self.preprocessing,
                self.augment,
            )
            for start in starts
        ]
        results = self.workers.map(make, jobs)
        corrupt = {
            start + at: reason
            for start, (_, found) in zip(starts, results, strict=True)
            for at, reason in found.items()
        }
        return np.concatenate([made for made, _ in results]), corrupt

    def _name(self, index: int) -> str:
        return str(self.listing.root / self.listing.files[index])

    def _readable(self, index: int, seed: int | None) -> int:
        """The image itself, or the next of its class that is not known to be corrupt.

        Evaluation, which leaves corrupt images out, is content with any other where the class has none.
        """
        if index not in self.corrupt:
            return index
        labels = self.listing.labels
        same = np.flatnonzero(labels == labels[index])
        others = [
            *np.roll(same, -int(np.searchsorted(same, index))).tolist(),
            *(range(len(self)) if seed is None else []),
        ]
        for other in others:
            if other not in self.corrupt:
                return other
        raise UserError(f"every image of the class of {self._name(index)} is corrupt; replace them")


def encoded_preprocessing(size: int | None, like: Preprocessing | None) -> Preprocessing:
    """That of photographs: ImageNet's, or that of a network to start from (``like``) at its or another ``size``."""
    if like is None:
        size = SIZE if size is None else size
        return Preprocessing(size, round(size * RESIZE / SIZE), 3, IMAGENET_MEAN, IMAGENET_STD)
    if like.channels != 3:
        raise UserError(f"the network to start from takes images of {like.channels} channel(s), not RGB")
    if like.pad == 0 and size in (None, like.size):
        return like
    size = like.size if size is None else size
    return replace(like, size=size, resize=round(size * RESIZE / SIZE), pad=0)
