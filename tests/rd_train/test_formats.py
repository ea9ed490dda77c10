"""IDX and CIFAR files: right ones are read as torchvision reads them, hostile ones are refused in one line."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torchvision
from cifar_files import python2_batch, write_cifar

from rd_deploy.common import UserError
from rd_train.data import load_dataset
from rd_train.formats import _Stored, read_cifar_batch, read_cifar_pickle, read_idx

RNG = np.random.default_rng(0)


def idx_bytes(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx_set(folder, count=240, classes=4, test_labels=None):
    """A small IDX data set (12 x 10 pixels) under the usual names, partly gzipped."""
    for part, number in (("train", count), ("t10k", 40)):
        images = RNG.integers(0, 256, (number, 12, 10), dtype=np.uint8)
        labels = np.arange(number) % classes
        if part == "t10k" and test_labels is not None:
            labels = test_labels
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


GOOD = idx_bytes(np.arange(24).reshape(2, 3, 4))
BAD_IDX = {
    "empty": (b"", "is empty"),
    "text": (b"<html>not found</html>", "not an IDX file"),
    "header only": (GOOD[:7], "not an IDX file"),
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], "not an IDX file"),
    "labels": (idx_bytes(np.arange(24)), "not an IDX file"),
    "truncated": (GOOD[:-1], "holds only 23"),
    "too long": (GOOD + b"x", "holds more"),
    "no images": (idx_bytes(np.zeros((0, 3, 4))), "outside 1 to"),
    "absurd size": (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "outside 1 to"),
    "2 GiB promised": (struct.pack(">4B3I", 0, 0, 8, 3, 2, 2**15, 2**15), "holds only 0"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_is_refused(tmp_path, case, end):
    data, reason = BAD_IDX[case]
    path = tmp_path / f"x-ubyte{end}"
    path.write_bytes(gzip.compress(data) if end and data else data)
    with pytest.raises(UserError, match=reason):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", ["not gzip", "cut", "bit flip"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    packed = gzip.compress(idx_bytes(RNG.integers(0, 256, (20, 9, 9))))
    broken = {"not gzip": b"x" * 99, "cut": packed[:-20], "bit flip": packed[:500] + b"????" + packed[504:]}
    path = tmp_path / "images.gz"
    path.write_bytes(broken[damage])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(path, 3)


def test_idx_is_read_as_torchvision_reads_it(tmp_path):
    array = RNG.integers(0, 256, (5, 7, 9), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    theirs = torchvision.datasets.mnist.read_image_file(str(tmp_path / "a"))
    assert np.array_equal(read_idx(tmp_path / "a", 3), theirs.numpy())


def test_idx_folder(tmp_path):
    dataset = load_dataset("idx", write_idx_set(tmp_path))
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [220, 20, 40]
    assert dataset.classes == ["0", "1", "2", "3"]
    assert dataset.preprocessing.size == 10  # the images are 12 x 10: the centre square


def test_counts_must_agree(tmp_path):
    write_idx_set(tmp_path, test_labels=np.arange(39) % 4)
    with pytest.raises(UserError, match="40 t10k images but 39 labels"):
        load_dataset("idx", tmp_path)


def test_image_sizes_must_agree(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((40, 5, 5)))))
    with pytest.raises(UserError, match="differ in size"):
        load_dataset("idx", tmp_path)


def test_test_labels_must_be_known(tmp_path):
    write_idx_set(tmp_path, test_labels=np.arange(40) % 5)
    with pytest.raises(UserError, match="labels from 0 to 4, not 0 to 3"):
        load_dataset("idx", tmp_path)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="fewer than 2 classes"):
        load_dataset("idx", write_idx_set(tmp_path, classes=1))


def test_class_without_images_is_refused(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(240) % 4 * 2))
    with pytest.raises(UserError, match="no images of class '1'"):
        load_dataset("idx", tmp_path)


def test_constant_images_are_refused(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full((240, 12, 10), 7))))
    with pytest.raises(UserError, match="nothing to learn"):
        load_dataset("idx", tmp_path)


def test_missing_part_is_named(tmp_path):
    (write_idx_set(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no t10k-labels-idx1-ubyte"):
        load_dataset("idx", tmp_path)


# --- CIFAR


def test_cifar10_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    ours = load_dataset("cifar10", tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = torchvision.datasets.CIFAR10(tmp_path, train=False)
    assert np.array_equal(ours.test.pixels, theirs.data)
    assert ours.test.labels.tolist() == theirs.targets
    assert [len(split) for split in (ours.train, ours.val, ours.test)] == [180, 20, 40]
    assert ours.classes[3] == "name3"
    assert ours.preprocessing.channels == 3


def test_cifar100(tmp_path):
    inner = write_cifar(tmp_path, 100, per_file=250)
    dataset = load_dataset("cifar100", inner)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [225, 25, 250]
    assert len(dataset.classes) == 100


def test_arrays_pickled_by_todays_numpy_are_read(tmp_path):
    data = RNG.integers(0, 256, (3, 3072), dtype=np.uint8)
    (tmp_path / "b").write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2]}, protocol=4))
    images, labels = read_cifar_batch(tmp_path / "b", "labels")
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(3, 3072), data)
    assert labels.tolist() == [0, 1, 2]


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_does_not_run(tmp_path, protocol):
    target = tmp_path / "made-by-the-pickle"
    for function, arguments in ((open, (str(target), "w")), (eval, (f"open({str(target)!r}, 'w')",))):
        (tmp_path / "b").write_bytes(pickle.dumps({"data": Malicious(function, *arguments)}, protocol=protocol))
        with pytest.raises(UserError, match="it wants to run"):
            read_cifar_pickle(tmp_path / "b")
    assert not target.exists()


@pytest.mark.parametrize("memo", [b"r\x00\x00\x00\x10", b"p268435456\n", b"q\xff"])
def test_a_pickle_does_not_make_room_for_what_it_lacks(tmp_path, memo):
    (tmp_path / "b").write_bytes(b"\x80\x02}" + memo + b".")
    with pytest.raises(UserError, match=r"refused \(it remembers (268,435,456|255) things\)"):
        read_cifar_pickle(tmp_path / "b")


def test_pickle_cannot_change_the_reader(tmp_path):
    poison = b"\x80\x02cnumpy\nndarray\n(N}U\x09argumentsK\x01stb."  # BUILD on what stands in for the class ndarray
    (tmp_path / "b").write_bytes(poison)
    with pytest.raises(UserError, match="refused"):
        read_cifar_pickle(tmp_path / "b")
    assert not hasattr(_Stored, "arguments")


def test_array_of_objects_is_not_built(tmp_path):
    (tmp_path / "b").write_bytes(pickle.dumps({"data": np.array([{}] * 3072), "labels": [0]}))
    with pytest.raises(UserError, match="not a CIFAR batch"):
        read_cifar_batch(tmp_path / "b", "labels")


BATCH = python2_batch(b"\0" * 3072, [1])
BAD_BATCHES = {
    "truncated": BATCH[:-50],
    "text": b"<html>",
    "empty": b"",
    "a list": pickle.dumps([1]),
    "no data": pickle.dumps({"labels": [1]}),
    "too few bytes": python2_batch(b"\0" * 3071, [1]),
    "too many labels": python2_batch(b"\0" * 3072, [1, 1]),
    "no labels": python2_batch(b"", []),
    "label 200": python2_batch(b"\0" * 3072, [200]),
    "other labels": python2_batch(b"\0" * 3072, [1], b"coarse"),
    "floats": pickle.dumps({"data": np.zeros((1, 384)), "labels": [1]}, protocol=4),
    "labels of text": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}, protocol=4),
    "Fortran order": pickle.dumps({"data": np.zeros((3072, 2), np.uint8).T, "labels": [0, 1]}, protocol=4),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batch_is_refused(tmp_path, case):
    (tmp_path / "b").write_bytes(BAD_BATCHES[case])
    with pytest.raises(UserError, match=r"b (was refused|is not a CIFAR|is empty)"):
        read_cifar_batch(tmp_path / "b", "labels")


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match="--download"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("cifar100")


def test_wrong_number_of_class_names(tmp_path):
    (write_cifar(tmp_path) / "batches.meta").write_bytes(pickle.dumps({"label_names": ["one"]}))
    with pytest.raises(UserError, match="names 1 classes, not 10"):
        load_dataset("cifar10", tmp_path)
