"""Mixing and growing images: what comes out is what the definitions say, of coded images."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from rd_train.build import build_task, student_arch, teacher_arch
from rd_train.context import Context
from rd_train.data import batches, derive_seed, load_dataset
from rd_train.loop import STEP_SEED, Stepper
from rd_train.networks import Network
from rd_train.recipe import Recipe
from rd_train.vary import growing_size, mixed, resized


def coded(count: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is i everywhere and has class i, so that pixels tell where they come from."""
    values = torch.arange(count, dtype=torch.float64)
    return values.view(-1, 1, 1, 1).expand(count, 2, size, size).contiguous(), torch.arange(count)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_images_and_labels_by_the_same_share(seed):
    images, labels = coded()
    out, targets = mixed(images, labels, 6, mixup=1.0, cutmix=0.0, generator=np.random.default_rng(seed))
    torch.testing.assert_close(targets.sum(1), torch.ones(6).double())
    torch.testing.assert_close(out[:, 0, 0, 0], targets @ torch.arange(6).double())
    assert (out == out[:, :1, :1, :1]).all()
    assert torch.equal(images, coded()[0])  # the batch itself is not written to


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_box_and_labels_by_its_area(seed):
    images, labels = coded()
    out, targets = mixed(images, labels, 6, mixup=0.0, cutmix=1.0, generator=np.random.default_rng(seed))
    for number in range(6):
        values, counts = out[number, 0].unique(return_counts=True)
        shares = torch.zeros(6).double()
        shares[values.long()] = counts.double() / 64
        torch.testing.assert_close(targets[number], shares)
    foreign = (out != images)[:, 0].any(0)
    rows, columns = foreign.any(1), foreign.any(0)
    assert torch.equal(foreign, rows[:, None] & columns[None, :])  # a box
    assert torch.equal(images, coded()[0])


def test_both_take_turns_and_the_same_generator_gives_the_same():
    images, labels = coded()
    options = {"mixup": 1.0, "cutmix": 1.0}
    fractional = 0
    for seed in range(200):
        first, second = (mixed(images, labels, 6, generator=np.random.default_rng(seed), **options) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        fractional += bool((first[0] != first[0].round()).any())
    assert 70 < fractional < 130  # mixup: 100 expected, standard deviation 7


def test_share_and_box_are_the_same_for_any_number_of_images():
    """As of processes: each has a part of the batch, and all mix it alike."""
    images, labels = coded(24)
    for seed in range(10):
        made = []
        for count in (24, 12):
            options = {"mixup": 0.0, "cutmix": 1.0, "generator": np.random.default_rng(seed)}
            out, targets = mixed(images[:count], labels[:count], 24, **options)
            made.append(((out != images[:count])[:, 0].any(0), targets.max(1).values.min(), targets[targets > 0].min()))
        torch.testing.assert_close(*made)


def test_images_grow_from_start_to_full_size_within_the_window():
    sizes = [growing_size(step / 100, 32, 0.5, 0.5) for step in range(101)]
    assert (sizes[0], sizes[50], sizes[100]) == (16, 32, 32)
    assert sizes == sorted(sizes)
    assert all(size % 4 == 0 for size in sizes)
    assert {growing_size(step / 100, 29, 1.0, 0.5) for step in range(101)} == {29}


@pytest.mark.parametrize("size", [8, 20, 28, 40])
def test_resizing_is_pillows_bilinear_one(size):
    rows, columns = np.mgrid[:32, :32].astype(np.float32) / 31
    images = np.stack([rows**2 + np.sin(5 * columns), rows * columns, columns])[None]
    expected = [np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR)) for x in images[0]]
    np.testing.assert_allclose(resized(torch.from_numpy(images), size)[0], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["kd", "jointrd", "rd"])
def test_the_teacher_sees_the_same_mixed_images_as_the_student(tmp_path, method):
    distils = {"kd_weight": 0.5, "kd_start": 0.0, "kd_probability": 1.0}
    recipe = Recipe(method=method, mixup=1.0, **distils, width=0.25, batch_size=50, device="cpu", threads=1)
    dataset, arch = load_dataset("digits", limit=50), student_arch(recipe, 1, 10)
    task = build_task(recipe, Network(arch), Network(teacher_arch(recipe, arch)))
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), threading.Event())
    seen = {}
    for name in ("student", "teacher"):
        first = getattr(task, name).conv1
        first.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0].clone()}))
    images, labels = next(batches(dataset.train, 50, seed=0, epoch=0))
    before = images.clone()
    Stepper(task.train(), 10, context)(0, images, labels)
    assert torch.equal(seen["student"], seen["teacher"])
    # Each is a mixture of itself and of another one of the batch, by the same share.
    assert not torch.allclose(seen["student"], before)
    generator = np.random.default_rng(derive_seed(STEP_SEED, recipe.seed, 0))
    generator.random()  # the kind of the step
    expected, _ = mixed(before, labels, 10, mixup=1.0, cutmix=0.0, generator=generator)
    torch.testing.assert_close(seen["teacher"], expected)


def test_resizing_keeps_a_constant_image_and_the_right_size():
    images = torch.full((2, 3, 32, 32), 0.7)
    torch.testing.assert_close(resized(images, 16), torch.full((2, 3, 16, 16), 0.7))
    assert resized(images, 32) is images
