"""The images that an export is judged on: the data set's test images, a folder of the user's, or random ones."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rd_deploy.common import UserError, require
from rd_deploy.preprocessing import Preprocessing

RANDOM_WEIGHTS = "no real data, since the weights are random too"
ESCAPE = "pass --images FOLDER (any images of the kind), or --no-parity"


@dataclass(frozen=True)
class Images:
    """Preprocessed images, float32 (N, C, size, size), and in words where they come from."""

    values: np.ndarray
    origin: str


def spread(count: int, available: int) -> np.ndarray:
    """Up to ``count`` indices evenly spread over ``available``, since files and test sets are often sorted by class."""
    return np.linspace(0, available - 1, min(count, available)).round().astype(np.int64)


def random_images(count: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    """Normalised images (count, channels, size, size), float32: noise at several scales, so that images differ.

    White noise alone would make all images equal after the global pool.
    """
    rng = np.random.default_rng(seed)
    images = np.zeros((count, channels, size, size), np.float32)
    for cells in (1, 4, 16, size):
        cells = min(cells, size)
        coarse = rng.standard_normal((count, channels, cells, cells), dtype=np.float32)
        at = np.arange(size) * cells // size
        images += 0.5 * coarse[:, :, at[:, None], at]
    return images


def random_source(count: int, preprocessing: Preprocessing, seed: int, reason: str) -> Images:
    """For networks without a data set at hand; ``reason``: why, in words."""
    values = random_images(count, preprocessing.channels, preprocessing.size, seed)
    return Images(values, f"seeded random images (seed {seed}; {reason})")


def split_images(checkpoint, data_dir: str | None, count: int, load: Callable) -> Images:
    """Images of the test split that a checkpoint was made with; ``data_dir`` says where the data is now.

    ``load``: reads the data set, as `trained_on` does.
    """
    elsewhere = f"pass --data-dir, or {ESCAPE}"
    dataset = load(checkpoint, data_dir, "no test images for the parity check", ESCAPE, elsewhere)
    torch = require("torch", "train")
    chosen = dataset.test.images(torch.from_numpy(spread(count, len(dataset.test))))
    return Images(chosen.numpy(), f"test images of {dataset.name}")


@contextlib.contextmanager
def read_once() -> Iterator[Callable]:
    """`trained_on` for one checkpoint: reads its data set when first called, and ends the set's workers at the end."""
    found = []

    def load(*arguments):
        if not found:
            found.append(trained_on(*arguments))
        return found[0]

    try:
        yield load
    finally:
        for dataset in found:
            dataset.workers.close()


def trained_on(checkpoint, data_dir: str | None, missing: str, unnamed: str, elsewhere: str):
    """The data set that a checkpoint was trained on, checked to be that; ``data_dir``: where it is now.

    Raises `UserError`. ``missing``: how it begins when the data cannot be loaded. What to do: ``unnamed`` when the
    checkpoint names no data, ``elsewhere`` when they are not here.
    """
    from rd_train.data import load_dataset
    from rd_train.skipped import MAX_CORRUPT
    from rd_train.workers import default_workers

    recipe = checkpoint.recipe if isinstance(checkpoint.recipe, dict) else {}
    name, folder, size = recipe.get("data"), data_dir or recipe.get("data_dir"), recipe.get("size")
    if not isinstance(name, str) or not isinstance(folder, str | None) or not isinstance(size, int | None):
        raise UserError(f"the checkpoint does not say which data it was trained on; {unnamed}")
    # Older checkpoints lack these entries.
    like = checkpoint.preprocessing if recipe.get("start_weights") is not None else None
    split_seed, limit = recipe.get("split_seed", 0), recipe.get("max_corrupt", MAX_CORRUPT)
    if type(split_seed) is not int or type(limit) is not int:
        raise UserError(f"the checkpoint's recipe holds wrong values; {unnamed}")
    try:
        dataset = load_dataset(
            name,
            folder,
            size=size,
            like=like,
            split_seed=split_seed,
            workers=default_workers(),
            max_corrupt=limit,
        )
    except UserError as error:
        raise UserError(f"{missing} ({error}); {elsewhere}") from error
    if not _same_preprocessing(dataset.preprocessing, checkpoint.preprocessing):
        dataset.workers.close()
        raise UserError(f"{name} here is not the data that the checkpoint was trained on; {elsewhere}")
    if dataset.classes != checkpoint.classes:  # labels would be those of other classes
        dataset.workers.close()
        raise UserError(f"the classes of {name} here are not those that the checkpoint was trained on; {elsewhere}")
    return dataset


def _same_preprocessing(one: Preprocessing, other: Preprocessing) -> bool:
    """Equal up to the rounding of means and deviations, which depends on the machine."""
    plain = replace(one, mean=other.mean, std=other.std) if one.channels == other.channels else one
    return plain == other and np.allclose((one.mean, one.std), (other.mean, other.std), rtol=1e-6)


def folder_images(folder: str | Path, preprocessing: Preprocessing, count: int) -> Images:
    """Image files (by suffix) anywhere below a folder, preprocessed as in deployment."""
    folder = Path(folder)
    files = image_files(folder, 2, "parity")
    chosen = [files[index] for index in spread(count, len(files))]
    return Images(load_images(chosen, preprocessing), f"images in {folder}")


def image_files(folder: Path, least: int, purpose: str) -> list[Path]:
    """The image files (by suffix) anywhere below a folder, sorted; `UserError` when there are fewer than ``least``."""
    from rd_train.decode import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder; name one with image files")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) < least:
        raise UserError(f"--images {folder} holds {len(files)} image files; {purpose} needs at least {least}")
    return files


def load_images(files: list[Path], preprocessing: Preprocessing) -> np.ndarray:
    """Image files as a network sees them, float32 (N, C, size, size)."""
    pixels = (_decode(file, preprocessing.channels) for file in files)
    return np.concatenate([preprocessing.apply(image) for image in pixels])


def _decode(path: Path, channels: int) -> np.ndarray:
    """uint8 (H, W, channels) of an image file; one channel is luminance."""
    from rd_train.decode import read_image

    image = read_image(path)
    if channels not in (1, 3):
        raise UserError(f"--images gives grey or colour images, but the network takes {channels} channels")
    pixels = np.asarray(image.convert("L") if channels == 1 else image)
    return pixels[:, :, None] if channels == 1 else pixels
