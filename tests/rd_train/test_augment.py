"""Augmentation: what comes out is a shifted, mirrored or cropped piece of what went in, as often as it should be."""

import numpy as np
import pytest

from rd_deploy.common import UserError
from rd_train.augment import Augment, random_resized_box, shift_and_flip


def coded_images(count, height=6, width=5):
    """Every pixel has a value of its own, none is black."""
    image = np.arange(1, height * width + 1, dtype=np.uint8).reshape(height, width, 1)
    return np.repeat(image[None], count, axis=0)


def shift_of(result, image, pad):
    """All (down, right) shifts within ``pad`` that turn ``image`` into ``result``, by trying each."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    return [
        (down, right)
        for down in range(2 * pad + 1)
        for right in range(2 * pad + 1)
        if np.array_equal(padded[down : down + height, right : right + width], result)
    ]


def test_each_shift_occurs_and_none_is_larger():
    images = coded_images(2000)
    results = shift_and_flip(images, Augment(crop_padding=2), np.random.default_rng(0))
    shifts = [shift_of(result, images[0], 2) for result in results]
    assert all(len(found) == 1 for found in shifts)
    counts = np.unique([down * 5 + right for [(down, right)] in shifts], return_counts=True)[1]
    assert len(counts) == 25
    assert counts.min() > 40  # 80 expected, standard deviation 8.8
    assert counts.max() < 120


def test_half_are_mirrored():
    images = coded_images(4000)
    results = shift_and_flip(images, Augment(flip=True), np.random.default_rng(0))
    same = (results == images).all(axis=(1, 2, 3))
    assert np.array_equal(results[~same], images[~same][:, :, ::-1])
    assert abs(same.sum() - 2000) < 160  # five standard deviations


def test_nothing_asked_nothing_changed():
    images = coded_images(3)
    assert np.array_equal(shift_and_flip(images, Augment(), np.random.default_rng(0)), images)


def test_resized_crops_stay_inside_and_have_the_asked_area_and_aspect():
    generator = np.random.default_rng(0)
    boxes = np.array([random_resized_box(300, 200, 0.08, generator) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 300
    assert boxes[:, 3].max() <= 200
    area, ratio = width * height / 60_000, width / height
    assert 0.075 < area.min() < 0.12
    assert 0.85 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.37
    assert abs((ratio > 1).mean() - 0.5) < 0.1


@pytest.mark.parametrize(("width", "height"), [(1000, 3), (3, 1000), (1, 1)])
def test_elongated_images_get_a_centre_crop_inside(width, height):
    left, top, right, bottom = random_resized_box(width, height, 0.9, np.random.default_rng(0))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs((left + right) - width) <= 1
    assert abs((top + bottom) - height) <= 1


@pytest.mark.parametrize(
    "values", [{"crop_padding": -1}, {"crop_padding": 257}, {"smallest_crop": 0}, {"smallest_crop": 1.1}]
)
def test_wrong_values_are_refused(values):
    with pytest.raises(UserError):
        Augment(**values)
