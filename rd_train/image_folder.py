"""Image files in one folder per class: any folder, and the layouts of ImageNet, MIT67 and Caltech101."""

import hashlib
import os
from pathlib import Path

import numpy as np

from rd_deploy.common import UserError, check_file
from rd_train.decode import SUFFIXES
from rd_train.listing import Listing

ARRANGE = (
    "one folder per class is needed, e.g. val/n01440764/ILSVRC2012_val_00000293.JPEG. For ImageNet's validation "
    "images, torchvision arranges them: torchvision.datasets.ImageNet(FOLDER, split='val'), with "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in FOLDER"
)


def list_classes(root: Path) -> list[str]:
    """The names of the class folders in ``root``, sorted; hidden ones do not count."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def list_images(root: Path, classes: list[str], without: tuple[str, ...] = ()) -> Listing:
    """The image files (by suffix, in any case) directly in the class folders of ``root``, sorted.

    A class folder that is neither of ``classes`` nor of those to leave out is a `UserError`.
    """
    unknown = set(list_classes(root)) - {*classes, *without}
    if unknown:
        raise UserError(f"{root} has class folder '{min(unknown)}', unknown in training; rename or remove it")
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        inside = sorted(entry.name for entry in os.scandir(root / name)) if (root / name).is_dir() else []
        inside = [f"{name}/{entry}" for entry in inside if not entry.startswith(".")]
        found = [entry for entry in inside if entry.lower().endswith(SUFFIXES)]
        files += found
        labels += [label] * len(found)
        others += [entry for entry in inside if not entry.lower().endswith(SUFFIXES)]
    return Listing(root, files, np.array(labels, np.int64), ignored=(len(others), others[0] if others else ""))


def folder_layout(root: Path) -> tuple[list[str], list[Listing]]:
    """Class names and train, validation and test images of an image folder, of ImageNet too.

    Layouts: ``{train,val,test}/CLASS/*``; ``{train,val}/CLASS/*`` (or test for val), where a tenth of the training
    images is for validation; or ``CLASS/*``, divided 80/10/10. Files are divided by a hash of CLASS/FILE.
    """
    if not (root / "train").is_dir():
        _check_arranged(root)
        classes = list_classes(root)
        return classes, list_images(root, classes).divide((0.8, 0.9))
    present = [name for name in ("val", "test") if (root / name).is_dir()]
    for name in ("train", *present):
        _check_arranged(root / name)
    classes = list_classes(root / "train")
    train = list_images(root / "train", classes)
    if not present:
        raise UserError(f"{root} has a folder 'train' but neither 'val' nor 'test' beside it; add one")
    others = [list_images(root / name, classes) for name in present]
    return classes, [*(train.divide((0.9,)) if len(others) == 1 else (train,)), *others]


def _check_arranged(folder: Path) -> None:
    """ImageNet as it is downloaded: images without class folders, or a tar for each class."""
    files = [entry.name.lower() for entry in os.scandir(folder) if entry.is_file()]
    if classes := list_classes(folder):
        _check_depth(folder, classes)
        return
    if not files:
        raise UserError(f"{folder} holds neither images nor folders: {ARRANGE}")
    if any(name.endswith(".tar") for name in files):
        raise UserError(
            f"{folder} holds tar files: extract each into a folder of its name (for f in *.tar; do mkdir ${{f%.tar}}; "
            "tar -xf $f -C ${f%.tar}; done), or, if they are WebDataset shards, use --data webdataset"
        )
    if any(name.endswith(SUFFIXES) for name in files):
        unlabelled = "; if they have no labels, move them elsewhere" if folder.name == "test" else ""
        raise UserError(f"{folder} holds images without class folders: {ARRANGE}{unlabelled}")


def _check_depth(folder: Path, classes: list[str]) -> None:
    """Images one level too deep: a folder above, or splits that are called otherwise than ours (``Train``)."""
    entries = (entry for name in classes for entry in os.scandir(folder / name) if not entry.name.startswith("."))
    folders = False
    for entry in entries:
        if not entry.is_dir():
            return  # as nearly always, at once: there may be a million of them
        folders = True
    if folders:
        raise UserError(
            f"the folders of {folder} ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}) hold folders, no "
            "images; name the folder below with --data-dir, or call splits train, val and test"
        )


# --- transfer: MIT67 and Caltech101

OTHER_CLASSES = ("BACKGROUND_Google",)
TRAIN_PER_CLASS, MOST_TEST_PER_CLASS = 30, 50  # Caltech101's protocol (Fei-Fei et al. 2004; its authors' page)


def mit67_layout(root: Path) -> tuple[list[str], list[Listing]]:
    """MIT67 (indoor scenes): ``Images/CLASS/*.jpg`` and the official TrainImages.txt and TestImages.txt beside it.

    A tenth of the training images (by a hash of CLASS/FILE) validates.
    """
    names = {part: _read_list(root / f"{part}Images.txt") for part in ("Train", "Test")}
    if not (root / "Images").is_dir():
        raise UserError(f"{root} has no folder 'Images'; extract indoorCVPR_09.tar there")
    both = set(names["Train"]) & set(names["Test"])
    if both:
        raise UserError(f"{root}: {min(both)} is in TrainImages.txt and in TestImages.txt; download both again")
    classes = sorted({name.split("/")[0] for name in names["Train"]})
    number = {name: label for label, name in enumerate(classes)}
    listings = []
    for part, files in names.items():
        for name in files:
            if name.split("/")[0] not in number:
                raise UserError(f"{root / part}Images.txt names class '{name.split('/')[0]}', unknown in training")
            if not (root / "Images" / name).is_file():
                raise UserError(f"{root / 'Images' / name} is missing, but {part}Images.txt names it; extract it again")
        labels = np.array([number[name.split("/")[0]] for name in files], np.int64)
        listings.append(Listing(root / "Images", files, labels))
    return classes, [*listings[0].divide((0.9,)), listings[1]]


def _read_list(path: Path) -> list[str]:
    """The CLASS/FILE lines of an official list, sorted."""
    if not path.is_file():
        raise UserError(f"{path} is missing; download TrainImages.txt and TestImages.txt of MIT67 to {path.parent}")
    text = check_file(path, "list", max_bytes=1 << 22).read_text(encoding="utf-8", errors="surrogateescape")
    names = sorted({line.strip() for line in text.splitlines() if line.strip()})
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or {"", ".", ".."} & set(parts) or "\0" in name:
            raise UserError(f"{path}: '{name[:100]}' is not CLASS/FILE; download it again")
    return names


def caltech101_layout(root: Path, split_seed: int) -> tuple[list[str], list[Listing]]:
    """Caltech101: ``101_ObjectCategories/CLASS/*.jpg``, there or ``root`` itself; BACKGROUND_Google is left out.

    Its protocol: of each class, 30 random images train and at most 50 of the others test. Which, ``split_seed`` says
    (by a hash of it and CLASS/FILE). Three of the 30 validate.
    """
    inner = root / "101_ObjectCategories"
    root = inner if inner.is_dir() else root
    if (root / "train").is_dir():
        raise UserError(f"{root} is divided already; use --data folder")
    classes = [name for name in list_classes(root) if name not in OTHER_CLASSES]
    everything = list_images(root, classes, without=OTHER_CLASSES)
    share = [hashlib.sha256(os.fsencode(f"{split_seed}/{file}")).digest() for file in everything.files]
    parts: tuple[list[int], ...] = ([], [], [])
    for label, name in enumerate(classes):
        members = sorted(np.flatnonzero(everything.labels == label).tolist(), key=share.__getitem__)
        if len(members) <= TRAIN_PER_CLASS:
            raise UserError(f"{root / name} has {len(members)} images, not more than {TRAIN_PER_CLASS}: incomplete")
        held_out = TRAIN_PER_CLASS // 10
        bounds = (0, TRAIN_PER_CLASS - held_out, TRAIN_PER_CLASS, TRAIN_PER_CLASS + MOST_TEST_PER_CLASS)
        for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
            part += members[start:stop]
    return classes, [everything.select(np.sort(np.array(part, np.int64))) for part in parts]
