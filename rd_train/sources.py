"""Where each data set that fits in memory is found, how it is downloaded, and what its classes are called."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rd_deploy.common import UserError, require
from rd_train.formats import find_idx, read_cifar_batch, read_cifar_names, read_idx_pair
from rd_train.npz import read_npz
from rd_train.splits import stratified_order

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
DOWNLOADS = ("fashion-mnist", "cifar10", "cifar100")


@dataclass(frozen=True)
class Pixels:
    """A data set as it was read: images uint8 (N, H, W, C) and labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    validation: int  # how many of ``images`` are to be held out
    classes: list[str]
    given_validation: tuple[np.ndarray, np.ndarray] | None = None  # the set's own, images and labels; holds out none


def read_digits() -> Pixels:
    """scikit-learn's 1,797 scans of 8 x 8 pixels: 1,257 to train, 180 to validate, 360 to test, stratified."""
    digits = require("sklearn.datasets", "train").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # they have 17 grey levels, 0 to 16
    labels = digits.target.astype(np.int64)
    order = stratified_order(labels)
    test, rest = order[:360], order[360:]
    return Pixels(images[rest], labels[rest], images[test], labels[test], 180, [str(digit) for digit in range(10)])


def read_idx_folder(folder: Path, classes: list[str] | None = None) -> Pixels:
    """Train and t10k IDX files; a twelfth of the training images is held out (5,000 of 60,000)."""
    images, labels = read_idx_pair(folder, "train")
    test_images, test_labels = read_idx_pair(folder, "t10k")
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{folder}: training and test images differ in size; give the files of one data set")
    classes = classes or [str(label) for label in range(int(labels.max()) + 1)]
    return Pixels(images, labels, test_images, test_labels, max(1, len(labels) // 12), classes)


def read_given_idx(folder: Path | None) -> Pixels:
    """The IDX files of a data set of the user's own."""
    return read_idx_folder(_given(folder, "idx"))


def read_npz_set(path: Path | None) -> Pixels:
    """A NumPy archive in MedMNIST's layout, with its own validation images."""
    if path is None:
        raise UserError("data set 'npz' needs a file: give it with --data-dir FILE.npz")
    found = read_npz(path)
    return Pixels(*found["train"], *found["test"], 0, found["classes"], found["val"])


def read_fashion(folder: Path | None, download: bool) -> Pixels:
    """Fashion-MNIST from ``folder``, or torchvision's layout in it, or the Debian package; downloaded if asked for."""
    places = [folder, folder / "FashionMNIST" / "raw"] if folder else [DEBIAN_FASHION]
    found = next((place for place in places if find_idx(place, "train", "images")), None)
    if found is None and not download:
        raise UserError(
            f"Fashion-MNIST is not in {' or '.join(map(str, places))}: apt-get install dataset-fashion-mnist, "
            "or give its folder with --data-dir, or get it there with --download"
        )
    if found is None:
        root = _given(folder, "fashion-mnist")
        _download(lambda: require("torchvision.datasets", "train").FashionMNIST(str(root), download=True))
    return read_idx_folder(found or places[-1], FASHION_CLASSES)


def read_cifar(folder: Path | None, download: bool, classes: int) -> Pixels:
    """CIFAR-10 or CIFAR-100 in torchvision's layout; a tenth of the training images is held out."""
    name = f"cifar{classes}"
    root = _given(folder, name)
    ten = classes == 10
    inner = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    parts = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    found = next((place for place in (root, inner) if (place / parts[0]).exists()), None)
    if found is None and not download:
        raise UserError(f"{name} ({parts[0]}) is not in {root} or {inner}: get it there with --download")
    if found is None:
        _download(lambda: _fetch_cifar(root, "CIFAR10" if ten else "CIFAR100"))
        found = inner
    label_key, names_file, names_key = (
        ("labels", "batches.meta", "label_names") if ten else ("fine_labels", "meta", "fine_label_names")
    )
    names = read_cifar_names(found / names_file, names_key)
    if len(names) != classes:
        raise UserError(f"{found / names_file} names {len(names)} classes, not {classes}; download it again")
    batches = [read_cifar_batch(found / part, label_key) for part in parts]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    test = read_cifar_batch(found / ("test_batch" if ten else "test"), label_key)
    return Pixels(images, labels, *test, max(1, len(labels) // 10), names)


def _fetch_cifar(root: Path, kind: str) -> None:
    """torchvision's archive and checksum, but not its reader, which would unpickle what is in the folder."""
    source = getattr(require("torchvision.datasets", "train"), kind)
    fetch = require("torchvision.datasets.utils", "train").download_and_extract_archive
    fetch(source.url, str(root), filename=source.filename, md5=source.tgz_md5)


def _given(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise UserError(f"data set '{name}' needs a folder: give --data-dir")
    return folder


def _download(fetch: Callable[[], object]) -> None:
    try:
        fetch()
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError, a wrong checksum a RuntimeError
        raise UserError(f"the download failed ({error}); try again or give the files with --data-dir") from error
