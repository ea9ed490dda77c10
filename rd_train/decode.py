"""Images from encoded bytes, decoded, cropped and resized: what worker processes do.

Free of torch, so that a worker starts at once and takes little memory.
"""

import contextlib
import io
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from rd_deploy.common import UserError
from rd_deploy.preprocessing import MAX_PIXELS, Preprocessing, crop_offset, resized_shape
from rd_train.augment import Augment, random_resized_box, shift_and_flip

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
# The content decides, not the suffix: photographs from the web are GIFs or PNGs under the name .jpg at times.
DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF")
MAX_BYTES = 1 << 28
# A JPEG is decoded at a half, a quarter or an eighth where the crop stays this many times larger than the image made of
# it: what libjpeg leaves out then lies beyond what the resizing keeps.
OVERSAMPLING = 2


class Corrupt(UserError):
    """An image that is not one, or not one that can be used; the message names it."""


class Place(NamedTuple):
    """Where an image's bytes are: ``length`` of them from ``offset`` on (a tar's member), or None: the whole file."""

    path: str
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Job:
    """Images to make: of ``places``, augmented by a generator each (``seeds``) or, with None, as in evaluation."""

    places: list[Place]
    names: list[str]
    seeds: list[tuple[int, int]] | None
    preprocessing: Preprocessing
    augment: Augment


def make(job: Job) -> tuple[np.ndarray, dict[int, str]]:
    """uint8 (N, size, size, 3), and by position what is wrong with those that are corrupt (black in the array).

    Files that cannot be read at all (gone, forbidden, a failing disk) are a `UserError`: that may pass, so that a run
    which went on with other images could not be repeated.
    """
    size = job.preprocessing.size
    pixels, corrupt = np.zeros((len(job.places), size, size, 3), np.uint8), {}
    for position, (place, name) in enumerate(zip(job.places, job.names, strict=True)):
        try:
            with opened(read_bytes(place, name), name) as image:
                # An image that evaluation refuses is corrupt in training, too: it is or is not, whoever asks first.
                resized_shape(image.height, image.width, job.preprocessing.resize)
                if job.seeds is None:
                    pixels[position] = centred(in_rgb(image), job.preprocessing)
                else:
                    generator = np.random.default_rng(job.seeds[position])
                    pixels[position] = varied(image, job.preprocessing, job.augment, generator)
        except Corrupt as error:
            corrupt[position] = str(error)
    return pixels, corrupt


def read_bytes(place: Place, name: str) -> bytes:
    """The encoded image."""
    try:
        status = Path(place.path).stat()  # before it is opened: a pipe would never end
        if not stat.S_ISREG(status.st_mode):
            raise Corrupt(f"image {name} is not a file; remove it")
        length = status.st_size - place.offset if place.length is None else place.length
        if length <= 0:
            raise Corrupt(f"image {name} is empty; replace or remove it")
        if length > MAX_BYTES:
            raise Corrupt(f"image {name} has {length:,} bytes, more than {MAX_BYTES:,}; replace or remove it")
        with Path(place.path).open("rb") as file:
            file.seek(place.offset)
            data = file.read(length)
    except OSError as error:
        raise UserError(f"image {name} cannot be read ({error.strerror or error}: {place.path})") from error
    if len(data) < length:
        raise UserError(f"{place.path} is shorter than when it was listed; leave the data as it is during a run")
    return data


@contextlib.contextmanager
def opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image whose format, size and depth were checked, not decoded yet; what fails inside, too, is `Corrupt`."""
    try:
        with Image.open(io.BytesIO(data), formats=DECODERS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Corrupt(f"image {name} has {image.width} x {image.height} pixels; make it smaller")
            if image.mode.startswith(("I", "F")):
                raise Corrupt(f"image {name} has more than 8 bits per channel; convert it to 8 bits")
            yield image
    except (Corrupt, MemoryError):
        raise
    except UserError as error:  # too elongated to be resized
        raise Corrupt(f"image {name}: {error}") from error
    except UnidentifiedImageError as error:
        raise Corrupt(f"image {name} is in none of the formats {', '.join(DECODERS)}; replace or remove it") from error
    except Exception as error:  # decoders of a damaged file raise anything
        raise Corrupt(f"image {name} cannot be decoded ({error}); replace or remove it") from error


def read_image(path: str | Path) -> Image.Image:
    """An RGB image of at most 67 million pixels; whatever is wrong with the file is a `UserError` naming it."""
    with opened(read_bytes(Place(str(path)), str(path)), str(path)) as image:
        return image.convert("RGB")


def in_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it is RGB, which ``convert`` would copy."""
    return image if image.mode == "RGB" else image.convert("RGB")


def centred(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """`Preprocessing.frame` of one RGB image by Pillow, which is faster: uint8 (size, size, 3)."""
    height, width = resized_shape(image.height, image.width, preprocessing.resize)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = crop_offset(width, preprocessing.size), crop_offset(height, preprocessing.size)
    return np.asarray(resized.crop((left, top, left + preprocessing.size, top + preprocessing.size)))


def varied(
    image: Image.Image, preprocessing: Preprocessing, augment: Augment, generator: np.random.Generator
) -> np.ndarray:
    """A training image of one that `opened` gave: a random-resized crop, mirrored or not; uint8 (size, size, 3)."""
    size = preprocessing.size
    if augment.smallest_crop < 1:
        box = random_resized_box(*image.size, augment.smallest_crop, generator)
        box = decode_reduced(image, box, size)
        pixels = np.asarray(in_rgb(image).resize((size, size), Image.Resampling.BILINEAR, box))
    else:
        pixels = centred(in_rgb(image), preprocessing)
    return shift_and_flip(pixels[None], augment, generator)[0]


def decode_reduced(image: Image.Image, box: tuple[int, int, int, int], size: int) -> tuple[float, ...]:
    """Let a large JPEG be decoded smaller where a crop ``box`` of it becomes ``size`` pixels; the box in that image."""
    left, top, right, bottom = box
    width, height = image.size
    shrink = min(right - left, bottom - top) / (OVERSAMPLING * size)
    if shrink < 2 or image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink))) is None:
        return box
    scale = round(width / image.width)  # 1, 2, 4 or 8; an odd row of pixels rounds the size up
    return left / scale, top / scale, right / scale, bottom / scale
