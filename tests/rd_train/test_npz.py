"""Image sets in MedMNIST's layout: right ones are read as NumPy reads them, hostile ones are refused in one line."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from rd_deploy.common import UserError
from rd_train.data import load_dataset
from rd_train.npz import read_npz

RNG = np.random.default_rng(0)
COUNTS = {"train": 40, "val": 12, "test": 20}


def arrays(shape=(9, 9, 3), classes=4):
    """What a small file holds; labels (N, 1) as MedMNIST has them."""
    found = {}
    for part, count in COUNTS.items():
        found[f"{part}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        found[f"{part}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return found


def save(path, **changes):
    np.savez_compressed(path, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return path


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def archive(path, **members):
    """A file with some members replaced by raw bytes."""
    contents = {name: npy(array) for name, array in arrays().items()} | members
    with zipfile.ZipFile(path, "w") as file:
        for name, data in contents.items():
            file.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("shape", [(9, 9), (9, 8, 1), (9, 9, 3)])
@pytest.mark.parametrize("save_as", [np.savez, np.savez_compressed])
def test_it_is_read_as_numpy_reads_it(tmp_path, shape, save_as):
    written = arrays(shape)
    written["val_images"] = np.asfortranarray(written["val_images"])
    written["val_labels"] = written["val_labels"][:, 0].astype(np.int64)
    save_as(tmp_path / "x.npz", **written, metadata=np.array("not read"))
    found = read_npz(tmp_path / "x.npz")
    for part in COUNTS:
        images, labels = found[part]
        assert np.array_equal(images, written[f"{part}_images"].reshape(images.shape))
        assert (images.shape[1:], images.dtype) == ((*shape, 1)[:3], np.uint8)
        assert (labels.tolist(), labels.dtype) == (written[f"{part}_labels"].ravel().tolist(), np.int64)
    assert found["classes"] == ["0", "1", "2", "3"]


def test_its_own_validation_split_is_used_as_given(tmp_path):
    written = arrays()
    path = save(tmp_path / "x.npz", **written, classes=np.array(["a", "b", "c", "d"]))
    dataset = load_dataset("npz", path)
    for split, part in ((dataset.train, "train"), (dataset.val, "val"), (dataset.test, "test")):
        assert np.array_equal(split.pixels, written[f"{part}_images"])
        assert split.labels.tolist() == written[f"{part}_labels"].ravel().tolist()
    assert dataset.classes == ["a", "b", "c", "d"]
    pixels = written["train_images"] / 255
    assert dataset.preprocessing.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)))
    assert dataset.preprocessing.std == pytest.approx(pixels.std(axis=(0, 1, 2)))


def test_a_limit_is_stratified_and_leaves_validation_alone(tmp_path):
    dataset = load_dataset("npz", save(tmp_path / "x.npz"), limit=8, size=12)
    assert torch.bincount(dataset.train.labels).tolist() == [2] * 4
    assert (len(dataset.val), dataset.preprocessing.size) == (12, 12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_images": None}, "has no val_images: it needs train_images"),
        ({"train_images": np.zeros((40, 9, 9), np.float32)}, "holds float32, not whole numbers"),
        ({"train_images": np.zeros((40, 9, 9), np.uint16)}, "must be uint8 of shape"),
        ({"train_images": np.zeros((40, 9, 9, 9), np.uint8)}, "not uint8 .40, 9, 9, 9."),
        ({"train_images": np.zeros((40, 9), np.uint8)}, "must be uint8 of shape"),
        ({"train_images": np.zeros((0, 9, 9, 3), np.uint8)}, "promises 0 bytes"),
        ({"test_images": np.zeros((20, 8, 9, 3), np.uint8)}, "differ in shape .train .9, 9, 3., .*test .8, 9, 3."),
        ({"test_labels": np.zeros((19, 1), np.uint8)}, "20 test images but 19 labels"),
        ({"test_labels": np.zeros((20, 14), np.uint8)}, "several labels per image are not supported"),
        ({"test_labels": np.array(["0"] * 20)}, "must be one whole number per image"),
        ({"test_labels": np.full(20, -1)}, "must lie in 0 to 99,999, not -1"),
        ({"train_labels": np.full(40, 2**40)}, "must lie in 0 to 99,999"),
        ({"test_labels": np.full(20, 4)}, "test set has labels from 4 to 4, not 0 to 3"),
        ({"val_labels": np.full(12, 4)}, "validation set has labels from 4 to 4, not 0 to 3"),
        ({"train_labels": np.arange(40) % 4 * 2}, "no images of class '1'"),
        ({"train_labels": np.zeros(40, np.uint8), "val_labels": np.zeros(12, np.uint8)}, "fewer than 2 classes"),
        ({"classes": np.array(["a", "a", "b", "c"])}, "must be different names"),
        ({"classes": np.array(["a", "", "b", "c"])}, "of printable characters"),
        ({"classes": np.array(["a", "\x1b[2J", "b", "c"])}, "of printable characters"),
        ({"classes": np.array([0x7FFFFFFF] * 4, np.uint32).view("<U1")}, "no NumPy archive of plain arrays"),
        ({"classes": np.arange(4)}, "must be texts"),
        ({"classes": np.array([["a", "b"]])}, "must be texts"),
        ({"classes": np.array(["a", "b", "c"])}, "labels from 0 to 3, not 0 to 2"),
        ({"train_images": np.full((40, 9, 9, 3), 7, np.uint8)}, "nothing to learn"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_dataset("npz", save(tmp_path / "x.npz", **changes))


class Hostile:
    """An object that would tell on being unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Hostile, "ran", True)


def header(text):
    data = text.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data


def promise(shape, descr="'|u1'"):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


GOOD = npy(np.zeros((40, 9, 9), np.uint8))
BAD_MEMBERS = {
    "pickle": (npy(np.array([Hostile()], dtype=object)), "holds object, not whole numbers"),
    "no header": (b"", "no NumPy archive"),
    "text": (b"<html>not found</html>", "no NumPy archive"),
    "cut header": (GOOD[:20], "no NumPy archive"),
    "cut data": (GOOD[:-1], "promises 3,240 bytes|should hold"),
    "more data": (GOOD + b"x", "should hold 3,240 bytes"),
    "huge shape": (promise("(4294967296, 4294967296)") + b"x" * 50, "promises"),
    "2 GiB promised": (promise("(2048, 1024, 1024)") + b"x" * 50, "promises"),
    "negative shape": (promise("(-1, -3240)") + b"x" * 3240, "must be uint8|no NumPy archive|promises"),
    "code": (header("__import__('os').abort()"), "no NumPy archive"),
    "deep": (header("(" * 9000), "no NumPy archive"),
    "record": (promise("(4,)", "[('a', '|u1')]") + b"x" * 4, "not whole numbers"),
    "version 9": (b"\x93NUMPY\x09\x00" + GOOD[8:], "no NumPy archive"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_hostile_member_is_refused(tmp_path, case):
    data, reason = BAD_MEMBERS[case]
    with pytest.raises(UserError, match=reason):
        read_npz(archive(tmp_path / "x.npz", train_images=data))
    assert not Hostile.ran


def test_a_size_is_checked_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("rd_train.npz.MAX_BYTES", 8000)
    with pytest.raises(UserError, match="train_images has 9,848 bytes, more than the 8,000 that are read"):
        read_npz(archive(tmp_path / "x.npz"))


def test_a_bomb_gives_no_more_than_it_declares(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays().items():
            file.writestr(
                f"{name}.npy", promise("(40, 9, 9, 3)") + bytes(1 << 24) if name == "val_images" else npy(array)
            )
    data = bytearray(path.read_bytes())
    real = struct.pack("<I", len(promise("(40, 9, 9, 3)")) + (1 << 24))
    path.write_bytes(data.replace(real, struct.pack("<I", 9848)))  # in the directory and the member's own header
    with pytest.raises(UserError, match=r"no NumPy archive|should hold"):
        read_npz(path)


@pytest.mark.parametrize("damage", ["not a zip", "cut", "bit flip", "twice"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    path = save(tmp_path / "x.npz")
    data = path.read_bytes()
    if damage == "twice":
        with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("val_labels.npy", npy(np.zeros(12, np.uint8)))
    else:
        broken = {"not a zip": b"x" * 99, "cut": data[:-30], "bit flip": data[:900] + b"????" + data[904:]}
        path.write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"no NumPy archive|val_labels twice"):
        read_npz(path)


def test_a_file_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"--data-dir FILE\.npz"):
        load_dataset("npz")
    with pytest.raises(UserError, match="is not a file"):
        load_dataset("npz", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("npz", tmp_path / "none.npz")
