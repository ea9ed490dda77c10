"""Small CIFAR-10 and CIFAR-100 in the files that their authors publish, of random pixels."""

import pickle
import struct

import numpy as np


def python2_batch(pixels, labels, key=b"labels"):
    """A batch as Python 2 and its NumPy wrote it (protocol 2, byte strings), as in the files of 2009."""
    shape = b"M" + struct.pack("<H", len(labels)) + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    short = b"U" + bytes([len(key)]) + key
    return b"\x80\x02}(" + short + numbers + b"U\x04data" + array + state + b"u."


def write_cifar(folder, classes=10, per_file=40):
    """A small data set in torchvision's layout."""
    ten = classes == 10
    inner = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    inner.mkdir(parents=True)
    generator = np.random.default_rng(0)
    parts = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for part in parts:
        pixels = generator.integers(0, 256, 3072 * per_file, dtype=np.uint8).tobytes()
        labels = [n % classes for n in range(per_file)]
        (inner / part).write_bytes(python2_batch(pixels, labels, b"labels" if ten else b"fine_labels"))
    key = b"label_names" if ten else b"fine_label_names"
    names = {key: [f"name{n}".encode() for n in range(classes)]}
    (inner / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(names))
    return inner
