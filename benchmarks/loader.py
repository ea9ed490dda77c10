"""How fast training images are decoded and varied, against torchvision's transforms v2 in torch's DataLoader.

python benchmarks/loader.py --results FILE.json [--images 512] [--workers N] [--seconds 60]

JPEG files of 500x375 pixels, as many as ImageNet's mean has, are made of noise whose spectrum falls as that of
photographs. Each side reads the same files, mirrors and cuts random-resized crops of 224 pixels, normalises, and gives
batches of 64 as float32. A call is an epoch: nothing is prepared before it, and nothing left over.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from rd_deploy.bench.environment import capture
from rd_deploy.bench.statistics import paired_ratio, summarise
from rd_deploy.bench.timer import doubts, time_pair
from rd_deploy.common import UserError, run_command, write_json
from rd_train.data import Dataset, batches, load_dataset
from rd_train.encoded import IMAGENET_MEAN, IMAGENET_STD
from rd_train.workers import default_workers

WIDTH, HEIGHT, QUALITY, BATCH = 500, 375, 90, 64
WARM_UP = 15  # seconds at most, in which two windows of five epochs fit
# By whom a file is decoded, for torchvision's side: Pillow is what ImageFolder uses unless told otherwise.
DECODERS = ("Pillow", "torchvision.io")


def photograph(generator: np.random.Generator) -> Image.Image:
    """Coloured noise whose amplitude falls as 1 / frequency, as that of natural images does (Field 1987)."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    frequency = np.maximum(np.hypot(rows, columns), 1 / WIDTH)
    spectrum = np.fft.rfft2(generator.standard_normal((3, HEIGHT, WIDTH))) / frequency
    noise = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
    noise = noise[:1] + 0.3 * noise  # channels resemble each other
    pixels = 128 + 50 * noise / noise.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_folders(root: Path, images: int) -> int:
    """An image folder with so many training images in two classes; returns the mean of their bytes."""
    generator = np.random.default_rng(0)
    sizes = []
    for part, count in (("train", images), ("val", 2), ("test", 2)):
        for number in range(count):
            path = root / part / f"class{number % 2}" / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(generator).save(path, quality=QUALITY)
            sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


def ours(dataset: Dataset) -> Callable[[], int]:
    """An epoch of rd-train's batches; returns how many images it had."""
    epochs = itertools.count()  # other crops in each, as on the other side
    return lambda: sum(len(images) for images, _ in batches(dataset.train, BATCH, seed=0, epoch=next(epochs)))


def theirs(root: Path, workers: int, decoder: str) -> Callable[[], int]:
    """An epoch of torchvision's."""
    transform = v2.Compose(
        [
            *([v2.PILToTensor()] if decoder == "Pillow" else []),
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    options = {} if decoder == "Pillow" else {"loader": _decoded}
    folder = torchvision.datasets.ImageFolder(root / "train", transform, **options)
    # As in torchvision's own training script, where each worker has one thread.
    loader = DataLoader(
        folder, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )
    return lambda: sum(len(images) for images, _ in loader)


def _decoded(path: str) -> torch.Tensor:
    with warnings.catch_warnings():  # that it will go to a package of its own, which cannot be had everywhere
        warnings.simplefilter("ignore", DeprecationWarning)
        return torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)


def measure(root: Path, dataset: Dataset, workers: int, decoder: str, seconds: float) -> dict:
    """Images a second of both, and how many times as fast ours is, with the 95% interval."""
    first, second = ours(dataset), theirs(root, workers, decoder)
    images = first()
    if images != second():
        raise UserError("the two give different numbers of images")
    samples = time_pair(first, second, seconds=seconds, max_warm_up=WARM_UP)
    ratio = paired_ratio(samples.a, samples.b)
    summaries = {"ours": summarise(samples.a, samples.calls[0]), "theirs": summarise(samples.b, samples.calls[1])}
    return {
        "decoder": decoder,
        "images_per_second": 1e3 * images / summaries["ours"].median,
        "their_images_per_second": 1e3 * images / summaries["theirs"].median,
        **{"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "quads": len(samples.a) // 2},
        **{"samples_ms": samples.a, "their_samples_ms": samples.b},
        "warnings": doubts(samples, summaries, ratio),
    }


def command() -> int:
    """Measure against each decoder and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--images", type=int, default=512, help="in an epoch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of sampling per pair (default: %(default)s)")
    options = parser.parse_args()
    if options.images < BATCH or options.workers < 1 or not 0 <= options.seconds <= 3600:
        parser.error(f"--images must be at least {BATCH}, --workers 1 or more, --seconds from 0 to 3600")
    torch.set_num_threads(1)
    environment = capture(1)  # before the machine is busy with this
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_folders(root, options.images)
        dataset = load_dataset("folder", root, workers=options.workers)
        try:
            rows = [measure(root, dataset, options.workers, decoder, options.seconds) for decoder in DECODERS]
        finally:
            dataset.workers.close()
    for row in rows:
        print(row)
    about = {"images": options.images, "mean_bytes": size, "workers": options.workers, "batch": BATCH}
    about |= {"width": WIDTH, "height": HEIGHT, "quality": QUALITY, "pillow": PIL.__version__}
    write_json(options.results, {**about, "results": rows, "environment": environment})
    print(f"wrote {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("loader", command))
