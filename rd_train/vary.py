"""What varies a batch as a whole: mixup, CutMix, and images that grow as training goes on.

Each is a pure function of the batch and of a generator or the progress, so that nothing of it has to be saved.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def mixed(
    images: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W), each mixed with another of the batch, and labels (N,) as probabilities (N, classes).

    ``mixup`` and ``cutmix`` are the parameter a of λ ~ Beta(a, a), 0 for none; with both, each batch has one, by a
    fair coin. Mixup: λ x + (1 - λ) x' (Zhang et al. 2018). CutMix: a box with a share 1 - λ of the area comes from
    x', and λ is then what is left after the box is clipped at the border (Yun et al. 2019).
    """
    cut = cutmix > 0 and (mixup == 0 or generator.random() < 0.5)
    share = generator.beta(*[cutmix if cut else mixup] * 2)
    rows, columns = _box(*images.shape[2:], share, generator) if cut else (None, None)
    # Last: how much it draws depends on the number of images, of which each of several processes has a part.
    partner = torch.from_numpy(generator.permutation(len(images))).to(images.device, non_blocking=True)
    if cut:
        images = images.clone()
        images[:, :, rows, columns] = images[partner, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / math.prod(images.shape[2:])
    else:
        images = share * images + (1 - share) * images[partner]
    targets = F.one_hot(labels, classes).to(images.dtype)
    return images, share * targets + (1 - share) * targets[partner]


def _box(height: int, width: int, share: float, generator: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box of area (1 - share) · height · width around a uniform centre, clipped."""
    sides = [length * math.sqrt(1 - share) for length in (height, width)]
    centres = [generator.integers(length) for length in (height, width)]
    return tuple(
        slice(max(0, round(centre - side / 2)), max(0, min(length, round(centre + side / 2))))
        for centre, side, length in zip(centres, sides, (height, width), strict=True)
    )


def growing_size(progress: float, size: int, start: float, window: float) -> int:
    """Pixels of training images: from ``start`` · ``size`` linearly to ``size`` over ``window``, in multiples of 4."""
    share = start + (1 - start) * min(1.0, progress / window)
    return size if share >= 1 else min(size, max(4, 4 * round(share * size / 4)))


def resized(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) at ``size`` x ``size`` pixels (bilinear, antialiased); as they are if they have that size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
