"""Preprocessing: the NumPy code against Pillow and torchvision, and the record's validation."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing, resize_shorter_side

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("height", "width", "shorter"), [(40, 61, 24), (61, 40, 24), (20, 33, 50), (300, 31, 16)])
def test_resize_agrees_with_pillow(height, width, shorter):
    images = RNG.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    ours = resize_shorter_side(images, shorter)
    for image, resized in zip(images, ours, strict=True):
        size = resized.shape[1::-1]
        pillow = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(pillow - resized).max() <= 1


@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (256, 255), (33, 90)])
def test_apply_agrees_with_torchvision(shape):
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(31),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(Image.fromarray(image))
    ours = Preprocessing(31, 36, 3, MEAN, STD).apply(image)
    assert ours.dtype == np.float32
    assert ours.shape == (1, 3, 31, 31)
    assert np.abs(ours[0] - theirs.numpy()).max() <= 1.01 / 255 / min(STD)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_padding_then_cropping_agrees_with_torchvision(native, size, extra):
    pad = max(0, (size - native + 1) // 2) + extra
    image = RNG.integers(0, 256, (native, native, 1), dtype=np.uint8)
    theirs = transforms.functional.center_crop(
        transforms.functional.pad(torch.from_numpy(image).permute(2, 0, 1), pad), [size, size]
    )
    framed = Preprocessing(size, native, 1, (0.0,), (1.0,), pad).frame(image[None])
    assert np.array_equal(framed[0, ..., 0], theirs[0].numpy())


def test_normalisation_is_the_formula():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    ours = Preprocessing(16, 16, 1, (0.3,), (0.2,)).apply(pixels)
    assert np.abs(ours.ravel() - (np.arange(256) / 255 - 0.3) / 0.2).max() < 1e-6


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.zeros((1, 0, 4, 3), np.uint8),
    ],
)
def test_wrong_images_are_refused(images):
    with pytest.raises(UserError, match="uint8 of shape"):
        Preprocessing(4, 4, 3, MEAN, STD).apply(images)


def test_too_elongated_image_is_refused():
    with pytest.raises(UserError, match="elongated"):
        Preprocessing(224, 256, 1, (0.0,), (1.0,)).apply(np.zeros((1, 1_000_000, 1), np.uint8))


def test_a_thin_line_needs_memory_for_its_pixels_only():
    """A dense matrix of weights would have 740,000 x 20,000 entries, 59 GB."""
    line = np.linspace(0, 255, 20_000).astype(np.uint8).reshape(1, 1, -1, 1)
    tracemalloc.start()
    resized = resize_shorter_side(line, 37)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert resized.shape == (1, 37, 740_000, 1)
    assert np.abs(resized[0, 5, ::37, 0].astype(int) - line[0, 0, :, 0]).max() <= 1
    assert peak < 20 * resized.size


def test_record_survives_json():
    record = Preprocessing(32, 28, 1, (0.3,), (0.2,), pad=2)
    assert Preprocessing.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 29},
        {"size": "28"},
        {"pad": -1},
        {"pad": True},
        {"channels": 3},
        {"mean": [float("nan")]},
        {"mean": [10**400]},
        {"std": [10**400]},
        {"mean": 0.3},
        {"mean": ["0.3"]},
        {"std": [0.0]},
        {"std": [float("inf")]},
        {"extra": 1},
    ],
)
def test_wrong_record_is_refused(change):
    with pytest.raises(UserError):
        Preprocessing.from_dict({**Preprocessing(28, 28, 1, (0.3,), (0.2,)).to_dict(), **change})
