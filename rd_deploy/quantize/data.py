"""Three disjoint sets of images: ranges are measured on one, the calibrator is chosen on another, the gate has its own.

A calibrator that was chosen by its accuracy on some images looks better on these than on others.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rd_deploy.chain import Chain
from rd_deploy.common import UserError, require
from rd_deploy.export.images import image_files, load_images, random_images, spread, trained_on
from rd_deploy.preprocessing import Preprocessing

CALIBRATION_IMAGES = 512
# Accuracy on 5,000 images has a standard error of 0.4 points at 90%, but the calibrators are compared on the same ones.
CHOOSING_IMAGES = 5000
RANDOM_IMAGES = 64
ESCAPE = "pass --data-dir FOLDER, or --images FOLDER with at least 8 images of the kind"


@dataclass(frozen=True)
class Samples:
    """Images that are made when they are needed. ``load``: indices (N,) to float32 (N, C, H, W), preprocessed.

    ``labels``: int64 (count,), None where nobody knows. ``origin``: in words. ``corrupt``: indices of those that could
    not be read, as far as they were asked for; other images stand in for them.
    """

    load: Callable[[np.ndarray], np.ndarray]
    count: int
    labels: np.ndarray | None
    origin: str
    corrupt: Callable[[], Collection[int]] = tuple

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, at most ``size`` at a time."""
        for start in range(0, self.count, size):
            yield self.load(np.arange(start, min(start + size, self.count)))

    def select(self, indices: np.ndarray) -> "Samples":
        """The images at these indices."""
        labels = None if self.labels is None else self.labels[indices]

        def corrupt() -> Collection[int]:
            return np.flatnonzero(np.isin(indices, [*self.corrupt()])).tolist()

        return Samples(lambda chosen: self.load(indices[chosen]), len(indices), labels, self.origin, corrupt)

    def some(self, count: int) -> "Samples":
        """At most ``count`` of them, evenly spread."""
        return self if count >= self.count else self.select(spread(count, self.count))

    def describe(self) -> dict:
        """For the sidecar."""
        return {"images": self.count, "origin": self.origin}


@dataclass(frozen=True)
class QuantizationData:
    """``gate``: None for random images, on which accuracy means nothing."""

    calibration: Samples
    choosing: Samples
    gate: Samples | None


def quantization_data(
    chain: Chain,
    checkpoint=None,
    data_dir: str | None = None,
    images: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    seed: int = 0,
    load: Callable = trained_on,
) -> QuantizationData:
    """The images to quantise a network with.

    From ``images``, a folder, if it is given: a part each, labelled if the files lie in folders named as the network's
    classes. Else from the data that ``checkpoint`` was trained on (``data_dir``: where it is now): training, validation
    and test split, read by ``load``. Else, for random weights, seeded random images. Raises `UserError` when there are
    too few.
    """
    if calibration_images < 1:
        raise UserError(f"--calibration-images must be at least 1, not {calibration_images}")
    if images is not None:
        return _from_folder(Path(images), chain, calibration_images)
    if checkpoint is not None:
        dataset = load(checkpoint, data_dir, "no images to quantise with", ESCAPE, ESCAPE)
        return _from_training_data(dataset, calibration_images)
    return _from_nothing(chain.preprocessing, min(calibration_images, RANDOM_IMAGES), seed)


def _from_training_data(dataset, calibration_images: int) -> QuantizationData:
    return QuantizationData(
        _split(dataset.train, f"training images of {dataset.name}").some(calibration_images),
        _split(dataset.val, f"validation images of {dataset.name}").some(CHOOSING_IMAGES),
        _split(dataset.test, f"test images of {dataset.name}"),
    )


def _split(split, origin: str) -> Samples:
    torch = require("torch", "train")

    def load(indices: np.ndarray) -> np.ndarray:
        return split.images(torch.from_numpy(indices)).numpy()

    return Samples(load, len(split), split.labels.numpy(), origin, lambda: [*split.corrupt])


def _from_folder(folder: Path, chain: Chain, calibration_images: int) -> QuantizationData:
    """A quarter of the files at most to calibrate, then every other one to choose by and to judge by."""
    files = image_files(folder, 8, "quantising")
    everything = _files(files, _labels(folder, files, chain.classes), chain.preprocessing, f"images in {folder}")
    calibration = spread(min(calibration_images, len(files) // 4), len(files))
    rest = np.setdiff1d(np.arange(len(files)), calibration)
    return QuantizationData(*map(everything.select, (calibration, rest[::2], rest[1::2])))


def _files(files: list[Path], labels: np.ndarray | None, preprocessing: Preprocessing, origin: str) -> Samples:
    def load(indices: np.ndarray) -> np.ndarray:
        return load_images([files[index] for index in indices], preprocessing)

    return Samples(load, len(files), labels, origin)


def _labels(folder: Path, files: list[Path], classes: tuple[str, ...]) -> np.ndarray | None:
    """Class numbers, if every file lies in a folder of a class."""
    number = {name: index for index, name in enumerate(classes)}
    names = [path.relative_to(folder).parts[0] for path in files]
    return np.array([number[name] for name in names], np.int64) if set(names) <= set(number) else None


def _from_nothing(preprocessing: Preprocessing, count: int, seed: int) -> QuantizationData:
    values = random_images(2 * count, preprocessing.channels, preprocessing.size, seed)
    samples = Samples(
        values.__getitem__, 2 * count, None, "seeded random images (no real data: the weights are random)"
    )
    return QuantizationData(samples.select(np.arange(count)), samples.select(np.arange(count, 2 * count)), None)
