"""Training augmentation: shifted and flipped crops of small images, random-resized crops of photographs."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from rd_deploy.common import UserError


@dataclass(frozen=True)
class Augment:
    """How training images are varied.

    ``crop_padding``: pad by so many black pixels and cut the original size at a random place (sets held in memory).
    ``flip``: mirror half of the images left to right.
    ``smallest_crop``: random-resized crops of at least this share of the area (image folders); 1: none.
    """

    crop_padding: int = 0
    flip: bool = False
    smallest_crop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.crop_padding <= 256:
            raise UserError(f"crop_padding must be from 0 to 256 pixels, not {self.crop_padding}")
        if not 0 < self.smallest_crop <= 1:
            raise UserError(f"smallest_crop must be above 0 and at most 1, not {self.smallest_crop}")


def shift_and_flip(
    images: np.ndarray,
    augment: Augment,
    generator: np.random.Generator,
    *,
    batch: int | None = None,
    part: slice = slice(None),
) -> np.ndarray:
    """Uint8 images (N, H, W, C), randomly shifted (up to ``crop_padding`` pixels each way) and mirrored.

    They may be the images themselves, or a view of them: not to be written to.

    Where the images are ``part`` of a ``batch`` of so many, they are varied as they are among all of it.
    """
    height, width = images.shape[1:3]
    count = len(images) if batch is None else batch
    pad = augment.crop_padding
    if pad:
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        top, left = generator.integers(0, 2 * pad + 1, size=(2, count))[:, part]
        windows = sliding_window_view(padded, (height, width), axis=(1, 2))  # N, tops, lefts, C, H, W: no copy
        images = windows[np.arange(len(images)), top, left].transpose(0, 2, 3, 1)
    if augment.flip:
        mirrored = generator.random(count)[part] < 0.5
        if mirrored.all():
            return images[:, :, ::-1]
        if mirrored.any():
            images = images.copy()
            images[mirrored] = images[mirrored, :, ::-1]
    return images


def random_resized_box(
    width: int, height: int, smallest: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop with area share in [smallest, 1] and aspect ratio in [3/4, 4/3].

    Szegedy et al. 2015, section 6, with torchvision's ten attempts and its fallback, the largest centre crop whose
    aspect ratio is allowed.
    """
    for _ in range(10):
        area = width * height * generator.uniform(smallest, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(generator.integers(0, room + 1)) for room in (width - w, height - h))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
