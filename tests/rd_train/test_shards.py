"""WebDataset shards: what is in them, how they are divided, and tars that are not what they seem."""

import io
import json
import tarfile
from itertools import combinations

import numpy as np
import pytest
import torch
from photographs import encoded, sample, write_photographs, write_shards, write_tar
from PIL import Image

from rd_deploy.common import UserError
from rd_train.data import batches, load_dataset
from rd_train.shards import index_shard, role_of


def load(root, **options):
    return load_dataset("webdataset", root, size=16, **options)


def test_a_shard_reads_like_the_files_in_it(tmp_path):
    """The same images as files, one folder per class, and as shards: the same batches of evaluation."""
    names = [f"{label}/{number}.jpg" for label in range(2) for number in range(12)]
    for part, seed in (("train", 0), ("val", 100), ("test", 200)):
        write_photographs(tmp_path / "folder" / part, names, seed)
        samples = {}
        for name in names:
            label, file = name.split("/")
            samples[f"{label}_{file}"] = (tmp_path / "folder" / part / name).read_bytes()
            samples[f"{label}_{file.replace('jpg', 'cls')}"] = label.encode()
        write_tar(tmp_path / "shards" / part / "000.tar", samples)
    files, shards = load_dataset("folder", tmp_path / "folder", size=16), load(tmp_path / "shards")
    assert shards.classes == files.classes == ["0", "1"]
    for one, other in ((files.train, shards.train), (files.val, shards.val), (files.test, shards.test)):
        everything = torch.arange(24)
        assert torch.equal(one.labels, other.labels)
        # In tars, sorted by number rather than by name.
        order = sorted(range(24), key=lambda i: names[i])
        assert torch.equal(one.images(everything), other.images(torch.tensor(order)))


def test_imagenets_shards(tmp_path):
    write_shards(tmp_path)
    dataset = load(tmp_path)
    assert dataset.classes == ["0", "1"]
    assert len(dataset.train) + len(dataset.val) == 60
    assert len(dataset.test) == 8
    assert dataset.test.labels.tolist() == [0, 1] * 4
    parts = [set(split.listing.files) for split in (dataset.train, dataset.val, dataset.test)]
    assert not any(one & other for one, other in combinations(parts, 2))
    file = dataset.train.listing.files[0]
    assert file.startswith("imagenet1k-train-0000.tar/n")
    # Labels belong to their images.
    for split in (dataset.train, dataset.val):
        seeds = [int(name.rpartition("_")[2].removesuffix(".jpg")) for name in split.listing.files]
        assert [seed % 2 for seed in seeds] == split.labels.tolist()


def test_batches_are_the_same_with_workers_and_wherever_they_start(tmp_path):
    write_shards(tmp_path)
    alone, shared = load(tmp_path), load(tmp_path, workers=2)
    options = {"seed": 3, "epoch": 1}
    expected = list(batches(alone.train, 12, **options))
    found = list(batches(shared.train, 12, start=1, **options))
    shared.workers.close()
    assert len(expected) == len(found) + 1 >= 3
    for (images, labels), (again, same) in zip(expected[1:], found, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)


def test_without_names_that_say_what_they_are_for_shards_are_divided(tmp_path):
    for shard in range(4):
        members = {}
        for number in range(shard * 30, shard * 30 + 30):
            members |= sample(f"{number:06}", number % 3, number)
        write_tar(tmp_path / f"{shard:06}.tar", members)
    dataset = load(tmp_path)
    sizes = [len(split) for split in (dataset.train, dataset.val, dataset.test)]
    assert sum(sizes) == 120
    assert sizes[0] > 80
    # In other shards the same images are in the same split.
    everything = {}
    for number in range(120):
        everything |= sample(f"{number:06}", number % 3, number)
    write_tar(tmp_path / "again" / "all.tar", everything)
    again = load(tmp_path / "again")
    keys = [{name.split("/")[-1] for name in part.test.listing.files} for part in (dataset, again)]
    assert keys[0] == keys[1]


def test_classes_are_named_by_a_file(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("n01440764\nn01443537\n")
    assert load(tmp_path).classes == ["n01440764", "n01443537"]
    (tmp_path / "classes.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match=r"classes\.txt must name 2 or more classes"):
        load(tmp_path)


def test_samples_take_several_forms(tmp_path):
    png, webp = encoded(1, "PNG"), io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(webp, "WEBP")
    members = {
        "dir.with.dots/a.PNG": png, "dir.with.dots/a.cls": b" 7\n",
        "b.json": json.dumps({"label": 3, "more": [1, {}]}).encode(), "b.webp": webp.getvalue(), "b.seg.png": b"x",
        "c.jpg": encoded(2), "c.json": b"not json", "c.cls": b"0",
        "readme": b"", ".hidden": b"",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    shard = index_shard(str(tmp_path / "a.tar"))
    assert shard.names == ["dir.with.dots/a.PNG", "b.webp", "c.jpg"]
    assert shard.labels == [7, 3, 0]
    data = (tmp_path / "a.tar").read_bytes()
    assert [data[at : at + length] for at, length in shard.spans] == [png, webp.getvalue(), encoded(2)]


@pytest.mark.parametrize(
    ("shard", "role"),
    [
        ("imagenet1k-train-0000.tar", 0),
        ("imagenet1k-validation-00.tar", 1),
        ("test/000.tar", 2),
        ("train/val-like-000.tar", 1),
        ("trainset-0.tar", None),
        ("train-and-val.tar", None),
        ("00001.tar", None),
    ],
)
def test_names_say_what_a_shard_is_for(shard, role):
    assert role_of(shard) == role


def test_folders_with_these_words_are_searched(tmp_path):
    for seed, folder in enumerate(("training", "valid", "test")):
        write_tar(tmp_path / folder / "000.tar", {**sample("a", 0, 2 * seed), **sample("b", 1, 2 * seed + 1)})
    dataset = load(tmp_path)
    files = [split.listing.files for split in (dataset.train, dataset.val, dataset.test)]
    assert files == [[f"{folder}/000.tar/{key}.jpg" for key in "ab"] for folder in ("training", "valid", "test")]


def test_a_corrupt_member_is_skipped_like_a_file(tmp_path):
    members = {}
    for number in range(60):
        members |= sample(f"{number:06}", number % 2, number)
        if number == 10:
            members[f"{number:06}.jpg"] = b"ruined"
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", sample("x", 0, 1) | sample("y", 1, 2))
    dataset = load(tmp_path)
    for split in (dataset.train, dataset.val):
        split.images(torch.arange(len(split)))
    assert len(dataset.skipped) == 1
    [reason] = [*dataset.train.corrupt.values(), *dataset.val.corrupt.values()]
    assert "train-0.tar/000010.jpg is in none of the formats" in reason


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **changes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def third(path) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmembers()[2]


def hostile(path, case: str) -> None:
    """One of the tars that nobody should be given."""
    write_tar(path, sample("a", 0, 0) | sample("b", 1, 1))
    whole = path.read_bytes()
    if case == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "a.jpg", b"x")
    elif case == "no tar":
        path.write_bytes(b"nothing" * 1000)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "cut in a header":
        path.write_bytes(whole[:1800])
    elif case == "cut between members":
        path.write_bytes(whole[: third(path).offset])
    elif case == "damaged header":
        at = third(path).offset
        path.write_bytes(whole[:at] + b"\xff" * 512 + whole[at + 512 :])
    elif case == "negative size":
        member = third(path)
        header = member.tobuf(tarfile.GNU_FORMAT)
        field = b"\xff" * 4 + (-2048).to_bytes(8, "big", signed=True)
        header = bytearray(header[:124] + field + header[136:])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(whole[: member.offset] + bytes(header) + whole[member.offset + 512 :])
    else:
        with tarfile.open(path, "w") as tar:
            if case == "link":
                add(tar, "a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            elif case == "hard link":
                add(tar, "a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")
            elif case == "device":
                add(tar, "a.jpg", type=tarfile.CHRTYPE)
            elif case == "two images":
                add(tar, "a.jpg", b"x")
                add(tar, "a.png", b"x")
            elif case == "no image":
                add(tar, "a.cls", b"1")
            elif case == "no label":
                add(tar, "a.jpg", b"x")
            elif case == "json without label":
                add(tar, "a.jpg", b"x")
                add(tar, "a.json", b'{"label": "cat"}')
            elif case == "deep json":
                add(tar, "a.jpg", b"x")
                add(tar, "a.json", b"[" * 100_000)
            elif case == "large label":
                add(tar, "a.jpg", b"x")
                add(tar, "a.cls", b"1" * 1000)
            elif case == "text label":
                add(tar, "a.jpg", b"x")
                add(tar, "a.cls", b"cat")
            elif case == "sparse map":
                add(tar, "a.jpg", b"x", pax_headers={"GNU.sparse.map": "a,b"})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gzip", "not an uncompressed tar"),
        ("no tar", "not an uncompressed tar"),
        ("empty", "is empty"),
        ("cut in a header", "copy it again"),
        ("cut between members", "is cut short or damaged after"),
        ("damaged header", "is cut short or damaged after"),
        ("negative size", "copy it again"),
        ("link", "is a link or a device"),
        ("hard link", "is a link or a device"),
        ("device", "is a link or a device"),
        ("two images", "has two images"),
        ("no image", "has no image"),
        ("no label", "has neither .cls nor a .json"),
        ("json without label", "has neither .cls nor a .json"),
        ("deep json", "has neither .cls nor a .json"),
        ("large label", "is not a class number"),
        ("text label", "is not a class number"),
        ("sparse map", "is damaged"),
    ],
)
def test_hostile_tars_are_one_line(tmp_path, case, message):
    hostile(tmp_path / "train-0.tar", case)
    with pytest.raises(UserError, match=message) as error:
        index_shard(str(tmp_path / "train-0.tar"))
    assert "train-0.tar" in str(error.value)
    assert len(str(error.value)) < 400


def test_absurd_members_are_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate((1 << 40) + 2048)  # sparse: it takes no room
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes, more than"):
        index_shard(str(path))


def test_folders_without_shards(tmp_path):
    with pytest.raises(UserError, match="holds no shards"):
        load(tmp_path)
    (tmp_path / "train-0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="compressed tars"):
        load(tmp_path)
    write_tar(tmp_path / "train-0.tar", sample("a", 0, 0) | sample("b", 1, 1))
    with pytest.raises(UserError, match="only training images"):
        load(tmp_path)
    write_tar(tmp_path / "other-0.tar", sample("a", 0, 0))
    with pytest.raises(UserError, match=r"other-0\.tar says not"):
        load(tmp_path)
