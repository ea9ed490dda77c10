"""Any folder of image files, one folder per class, decoded in threads when a batch needs them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rd_deploy.common import UserError, check_file
from rd_deploy.preprocessing import MAX_PIXELS, Preprocessing, crop_offset, resized_shape
from rd_train.augment import Augment, random_resized_box, shift_and_flip
from rd_train.splits import check_labels, hashed_share, limited

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
# Of ImageNet's training images; the constants of torchvision's pretrained networks.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Listing:
    """Image files relative to ``root``, as CLASS/FILE, and their class numbers int64 (N,)."""

    root: Path
    files: list[str]
    labels: np.ndarray

    def select(self, chosen: np.ndarray) -> "Listing":
        """Those at the given indices."""
        return Listing(self.root, [self.files[index] for index in chosen], self.labels[chosen])


@dataclass(frozen=True)
class FolderSplit:
    """Images decoded, cropped and resized on demand."""

    listing: Listing
    labels: Tensor
    preprocessing: Preprocessing
    augment: Augment

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return self._batch(lambda index: centred(self._read(index), self.preprocessing), indices)

    def augmented(self, indices: Tensor, seed: int, part: slice = slice(None)) -> Tensor:
        return self._batch(lambda index: self._varied(index, np.random.default_rng([seed, index])), indices[part])

    def _varied(self, index: int, generator: np.random.Generator) -> np.ndarray:
        image, size = self._read(index), self.preprocessing.size
        if self.augment.smallest_crop < 1:
            box = random_resized_box(*image.size, self.augment.smallest_crop, generator)
            pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))
        else:
            pixels = centred(image, self.preprocessing)
        return shift_and_flip(pixels[None], self.augment, generator)[0]

    def _batch(self, make: Callable[[int], np.ndarray], indices: Tensor) -> Tensor:
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:  # Pillow decodes without Python's lock
            pixels = np.stack(list(pool.map(make, indices.tolist())))
        return torch.from_numpy(self.preprocessing.normalise(pixels))

    def _read(self, index: int) -> Image.Image:
        return read_image(self.listing.root / self.listing.files[index])


def read_image(path: Path) -> Image.Image:
    """An RGB image of at most 67 million pixels; whatever is wrong with the file is a `UserError` naming it."""
    check_file(path, "image", max_bytes=1 << 28)
    try:
        with Image.open(path, formats=DECODERS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"image {path} has {image.width} x {image.height} pixels; make it smaller")
            if image.mode.startswith(("I", "F")):
                raise UserError(f"image {path} has more than 8 bits per channel; convert it to 8 bits")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # decoders of a damaged file raise anything
        raise UserError(f"image {path} cannot be decoded ({error}); replace or remove it") from error


def centred(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """`Preprocessing.frame` of one RGB image by Pillow, which is faster: uint8 (size, size, 3)."""
    height, width = resized_shape(image.height, image.width, preprocessing.resize)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = crop_offset(width, preprocessing.size), crop_offset(height, preprocessing.size)
    return np.asarray(resized.crop((left, top, left + preprocessing.size, top + preprocessing.size)))


def list_classes(root: Path) -> list[str]:
    """The names of the class folders in ``root``, sorted; hidden ones do not count."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def list_images(root: Path, classes: list[str]) -> Listing:
    """The image files (by suffix) directly in the class folders of ``root``, sorted."""
    unknown = set(list_classes(root)) - set(classes)
    if unknown:
        raise UserError(f"{root} has class folder '{min(unknown)}', unknown in training; rename or remove it")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = os.scandir(root / name) if (root / name).is_dir() else ()
        found = [entry.name for entry in inside if entry.name.lower().endswith(SUFFIXES) and entry.name[0] != "."]
        files += [f"{name}/{file}" for file in sorted(found)]
        labels += [label] * len(found)
    return Listing(root, files, np.array(labels, np.int64))


def split_listings(root: Path) -> tuple[list[str], Listing, Listing, Listing]:
    """Class names and train, validation and test images, from the layouts that `folder_splits` names."""
    if not (root / "train").is_dir():
        classes = list_classes(root)
        return classes, *_divide(list_images(root, classes), (0.8, 0.9))
    classes = list_classes(root / "train")
    train = list_images(root / "train", classes)
    present = [name for name in ("val", "test") if (root / name).is_dir()]
    if not present:
        raise UserError(f"{root} has a folder 'train' but neither 'val' nor 'test' beside it; add one")
    others = [list_images(root / name, classes) for name in present]
    return classes, *(_divide(train, (0.9,)) if len(others) == 1 else (train,)), *others


def _divide(listing: Listing, bounds: tuple[float, ...]) -> list[Listing]:
    part = np.searchsorted(bounds, [hashed_share(file) for file in listing.files], side="right")
    return [listing.select(np.flatnonzero(part == number)) for number in range(len(bounds) + 1)]


def folder_splits(
    root: Path, size: int, limit: int | None, augment: Augment
) -> tuple[list[str], Preprocessing, list[FolderSplit]]:
    """Class names, preprocessing, and the train, validation and test splits of an image folder.

    Layouts: ``{train,val,test}/CLASS/*``; ``{train,val}/CLASS/*`` (or test for val), where a tenth of the training
    images is for validation; or ``CLASS/*``, divided 80/10/10. Files are divided by a hash of CLASS/FILE.
    """
    preprocessing = Preprocessing(size, round(size * 256 / 224), 3, IMAGENET_MEAN, IMAGENET_STD)
    classes, *listings = split_listings(root)
    for listing, part in zip(listings, ("training", "validation", "test"), strict=True):
        check_labels(listing.labels, len(classes), f"{root}: the {part} split", every=part == "training")
    listings[0] = listings[0].select(limited(listings[0].labels, limit))
    splits = [FolderSplit(part, torch.from_numpy(part.labels), preprocessing, augment) for part in listings]
    return classes, preprocessing, splits
