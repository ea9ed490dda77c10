"""What happens to an image before a network sees it: one record that travels in every artefact, and its NumPy code."""

import math
from dataclasses import asdict, dataclass, fields

import numpy as np

from rd_deploy.common import UserError

MAX_PIXELS = 1 << 26  # 67 million: larger than any camera image we know of, small enough to hold in memory
FINITE = "preprocessing needs finite means and positive stds"


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network sees it; travels in every artefact.

    In this order: the shorter side becomes ``resize`` pixels (bilinear, antialiased), ``pad`` black pixels are added
    on each side, the centre ``size`` x ``size`` is cut out, and values in [0, 1] become (x - mean) / std per channel.
    """

    size: int
    resize: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
            object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        except OverflowError as error:  # a whole number beyond float64, which JSON may hold
            raise UserError(FINITE) from error
        if not (len(self.mean) == len(self.std) == self.channels):
            raise UserError(f"preprocessing needs {self.channels} means and stds, one per channel")
        if not (1 <= self.size <= 4096 and 1 <= self.resize <= 8192 and 0 <= self.pad <= 4096):
            raise UserError("preprocessing needs size from 1 to 4096, resize from 1 to 8192 and pad from 0 to 4096")
        if self.size > self.resize + 2 * self.pad:
            raise UserError("preprocessing needs size <= resize + 2 pad")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std, default=0) > 0):
            raise UserError(FINITE)

    def to_dict(self) -> dict:
        """Plain containers for a checkpoint or JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocessing":
        """The inverse of `to_dict`; a missing, extra or wrongly typed entry is a `UserError`."""
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"preprocessing must have exactly {sorted(names)}")
        whole = all(type(values[name]) is int for name in ("size", "resize", "channels", "pad"))
        lists = all(
            isinstance(values[name], list | tuple) and all(type(value) in (int, float) for value in values[name])
            for name in ("mean", "std")
        )
        if not (whole and lists):
            raise UserError("preprocessing needs whole numbers for sizes and lists of numbers for mean and std")
        return cls(**values)

    def frame(self, images: np.ndarray) -> np.ndarray:
        """Resize, pad and crop uint8 images (N, H, W, C) to (N, size, size, C)."""
        images = resize_shorter_side(images, self.resize)
        if self.pad:
            images = np.pad(images, ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        top, left = (crop_offset(length, self.size) for length in images.shape[1:3])
        return images[:, top : top + self.size, left : left + self.size]

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pixels (N, H, W, C) as contiguous float32 (N, C, H, W): (pixel / 255 - mean) / std."""
        scale = (1 / (255 * np.array(self.std))).astype(np.float32)[:, None, None]
        shift = (np.array(self.mean) / np.array(self.std)).astype(np.float32)[:, None, None]
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) * scale
        values -= shift  # in place: a loader's main process does this for every image
        return values

    def apply(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (N, H, W, C), or one (H, W, C), of any size as float32 (N, C, size, size)."""
        images = np.asarray(images)
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != self.channels or 0 in images.shape[1:]:
            raise UserError(
                f"images must be uint8 of shape (N, height, width, {self.channels}), not {images.dtype} {images.shape}"
            )
        return self.normalise(self.frame(images))


def crop_offset(length: int, size: int) -> int:
    """First pixel of a centre crop, rounded as torchvision's ``center_crop`` rounds it."""
    return round((length - size) / 2)


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) after the shorter side becomes ``shorter`` pixels; torchvision's rounding of the longer side."""
    longer = int(shorter * max(height, width) / min(height, width))
    if shorter * longer > MAX_PIXELS:
        raise UserError(f"an image of {width} x {height} pixels is too elongated to be resized to {shorter}; crop it")
    return (shorter, longer) if height <= width else (longer, shorter)


def resize_shorter_side(images: np.ndarray, shorter: int) -> np.ndarray:
    """Resize uint8 images (N, H, W, C) as Pillow's ``BILINEAR`` does (antialiased, horizontal pass first, within 1)."""
    height, width = images.shape[1:3]
    if min(height, width) == shorter:
        return images
    new_height, new_width = resized_shape(height, width, shorter)
    return _resize_axis(_resize_axis(images, 2, new_width), 1, new_height)


def _resize_axis(images: np.ndarray, axis: int, new: int) -> np.ndarray:
    """Resize one axis of uint8 images (N, H, W, C): a sum over the few pixels that each new pixel is made of."""
    index, weights = _triangle_weights(images.shape[axis], new)
    shape = [1, 1, 1, 1]
    shape[axis] = new
    total = np.zeros((*images.shape[:axis], new, *images.shape[axis + 1 :]), np.float32)
    for position, weight in zip(index, weights, strict=True):
        total += images.take(position, axis=axis) * weight.reshape(shape)
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def _triangle_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The triangle filter: indices and weights, both (taps, new), of the old pixels that make each new one.

    It is as wide as the step when shrinking, which is the antialiasing. Pixels beyond the border have weight 0.
    """
    step = old / new
    radius = max(step, 1)
    centre = (np.arange(new) + 0.5) * step
    index = np.floor(centre - radius).astype(np.int64) + np.arange(math.ceil(2 * radius) + 1)[:, None]
    weights = np.maximum(0, 1 - np.abs(index + 0.5 - centre) / radius)
    weights[(index < 0) | (index >= old)] = 0
    return index.clip(0, old - 1), (weights / weights.sum(axis=0)).astype(np.float32)
