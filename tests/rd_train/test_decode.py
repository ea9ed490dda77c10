"""Decoding: files that are not what they seem, and the size that large photographs are decoded at."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from photographs import encoded, photograph
from PIL import Image

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment, random_resized_box
from rd_train.decode import Corrupt, Job, Place, make, opened, read_bytes, read_image, varied

RECORD = Preprocessing(32, 37, 3, (0.5,) * 3, (0.25,) * 3)
CROPS = Augment(smallest_crop=0.3)


def huge_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("case", ["empty", "text", "truncated", "larger bomb", "svg", "tiff"])
def test_bad_image_is_named(tmp_path, case):
    good = encoded(0, "PNG")
    data = {
        "empty": b"",
        "text": b"not an image",
        "truncated": good[: len(good) // 2],
        "larger bomb": huge_png(100_000, 100_000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "tiff": b"II*\0" + b"\0" * 64,
    }[case]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"image .*bad\.png"):
        read_image(path)


def test_image_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(huge_png(9000, 9000))
    with pytest.raises(UserError, match="9000 x 9000 pixels; make it smaller"):
        read_image(tmp_path / "bomb.png")


def test_sixteen_bit_image_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="8 bits"):
        read_image(tmp_path / "deep.png")


def test_grey_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    assert (np.asarray(read_image(tmp_path / "grey.png")) == 7).all()
    assert read_image(tmp_path / "grey.png").mode == "RGB"


def test_what_is_no_file_is_corrupt_and_what_is_gone_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(Corrupt, match="is not a file"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_image(tmp_path / "gone.jpg")
    assert not isinstance(error.value, Corrupt)


def test_part_of_a_file(tmp_path):
    path = tmp_path / "both"
    path.write_bytes(b"xy" + encoded(1) + b"z")
    place = Place(str(path), 2, len(encoded(1)))
    assert read_bytes(place, "an image") == encoded(1)
    with pytest.raises(UserError, match="shorter than when it was listed"):
        read_bytes(place._replace(length=place.length + 2), "an image")


def test_content_decides_not_the_suffix(tmp_path):
    frames = [photograph(seed) for seed in (0, 1)]
    frames[0].save(tmp_path / "gif.jpg", "GIF", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(tmp_path / "cmyk.jpg", "JPEG")
    for name in ("gif.jpg", "cmyk.jpg"):
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (40, 30))
        assert np.abs(np.asarray(image, int) - np.asarray(frames[0], int)).mean() < 15


def test_corrupt_images_are_told_by_position(tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(number))
    places = [Place(str(tmp_path / name)) for name in names]
    whole, none = make(Job(places, names, None, RECORD, CROPS))
    (tmp_path / "b.jpg").write_bytes(encoded(1)[:300])
    pixels, corrupt = make(Job(places, names, None, RECORD, CROPS))
    assert not none
    assert list(corrupt) == [1]
    assert "b.jpg cannot be decoded" in corrupt[1]
    assert np.array_equal(pixels[[0, 2]], whole[[0, 2]])


def test_training_images_are_random_crops_resized():
    original = photograph(3)
    box = random_resized_box(*original.size, 0.3, np.random.default_rng((5, 6)))
    expected = np.asarray(original.crop(box).resize((32, 32), Image.Resampling.BILINEAR))
    with opened(encoded(3, "PNG"), "x") as image:
        made = varied(image, RECORD, CROPS, np.random.default_rng((5, 6)))
    # At its border, what lies beyond the crop has its share.
    assert np.array_equal(made[1:-1, 1:-1], expected[1:-1, 1:-1])


@pytest.mark.parametrize("size", [(640, 480), (1000, 333), (481, 642)])
def test_large_photographs_are_decoded_smaller_and_look_the_same(size):
    data, reduced, full = encoded(7, size=size), 0, io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(full, "BMP")
    for seed in range(10):
        with opened(data, "x") as image:
            fast = varied(image, RECORD, CROPS, np.random.default_rng(seed))
            reduced += image.size != size
        with opened(full.getvalue(), "x") as image:
            slow = varied(image, RECORD, CROPS, np.random.default_rng(seed))
        difference = np.abs(fast.astype(int) - slow)
        assert difference.mean() < 0.5
        assert difference.max() <= 4
    assert reduced >= 8


def test_evaluation_decodes_in_full(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(7, size=(640, 480)))
    [made], _ = make(Job([Place(str(tmp_path / "a.jpg"))], ["a"], None, RECORD, CROPS))
    expected = RECORD.frame(np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))[None])[0]
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_workers_import_no_torch():
    modules = "rd_train.decode, rd_train.shards, rd_train.workers"
    done = subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0


def test_errors_survive_the_way_from_a_worker():
    assert str(pickle.loads(pickle.dumps(Corrupt("image x is bad")))) == "image x is bad"
