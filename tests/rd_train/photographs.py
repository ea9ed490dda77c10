"""Photograph-like images, and data sets of them in the layouts that users have."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth RGB image of (width, height), another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    photograph(seed, size).save(buffer, kind)
    return buffer.getvalue()


def write_photographs(folder: Path, names: list[str], seed: int = 0) -> None:
    """JPEG or PNG files, by their suffix."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed + number, "PNG" if name.endswith("png") else "JPEG"))


def write_imagenet(root: Path, train: int = 30, val: int = 6) -> None:
    """ImageNet-1k's folders with two of its classes; its suffix is upper-case."""
    for label, wnid in enumerate(("n01440764", "n01443537")):
        write_photographs(root / "train" / wnid, [f"{wnid}_{number}.JPEG" for number in range(train)], 1000 * label)
        names = [f"ILSVRC2012_val_{8 * number + label:08}.JPEG" for number in range(val)]
        write_photographs(root / "val" / wnid, names, 5000 + 1000 * label)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, label: int, seed: int, *, cls: bool = True, as_json: bool = False) -> dict[str, bytes]:
    """The members of one WebDataset sample."""
    members = {f"{key}.jpg": encoded(seed)}
    if as_json:
        members[f"{key}.json"] = json.dumps({"label": label, "filename": f"{key}.JPEG"}).encode()
    if cls:
        members[f"{key}.cls"] = str(label).encode()
    return members


def write_shards(root: Path, train: int = 3, per_shard: int = 20, val: int = 8) -> None:
    """ImageNet-1k's shards as timm's hub has them, with two classes."""
    for shard in range(train):
        members = {}
        for number in range(per_shard):
            seed = shard * per_shard + number
            members |= sample(f"n{seed % 2:08}_{seed}", seed % 2, seed, as_json=True)
        write_tar(root / f"imagenet1k-train-{shard:04}.tar", members)
    members = {}
    for number in range(val):
        members |= sample(f"ILSVRC2012_val_{number:08}", number % 2, 9000 + number, as_json=True)
    write_tar(root / "imagenet1k-validation-00.tar", members)


def write_mit67(root: Path, train: int = 20, test: int = 4) -> None:
    """MIT67's folders and official lists, with two of its classes."""
    for label, name in enumerate(("airport_inside", "tv_studio")):
        write_photographs(root / "Images" / name, [f"{name}_{i:04}.jpg" for i in range(train + test)], 1000 * label)
    for part, numbers in (("Train", range(train)), ("Test", range(train, train + test))):
        lines = [f"{name}/{name}_{i:04}.jpg" for name in ("airport_inside", "tv_studio") for i in numbers]
        (root / f"{part}Images.txt").write_text("\n".join(lines) + "\n")


def write_caltech101(root: Path, counts: tuple[int, ...] = (31, 90)) -> None:
    """Caltech101's folders with some of its classes."""
    inner = root / "101_ObjectCategories"
    for label, (name, count) in enumerate(zip(("accordion", "Motorbikes", "wrench"), counts, strict=False)):
        write_photographs(inner / name, [f"image_{i:04}.jpg" for i in range(1, count + 1)], 1000 * label)
    write_photographs(inner / "BACKGROUND_Google", ["image_0001.jpg", "tmp"], 7000)
