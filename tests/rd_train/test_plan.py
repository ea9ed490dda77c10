"""How a run will compute, and how its images are varied."""

import contextlib
from dataclasses import replace

import pytest
import torch

from rd_deploy.common import UserError
from rd_train.augment import Augment
from rd_train.loop import fit
from rd_train.plan import augmentation, on_gpu
from rd_train.recipe import Recipe
from rd_train.run import run

# Steps too small to change a weight.
STILL = Recipe(
    method="ce", arch="plain20", width=0.25, epochs=1, batch_size=50, lr=1e-12, warmup_epochs=0.5, train_limit=200,
    precision="fp32", device="cpu", threads=1, init_noise=0.0,
)  # fmt: skip


def test_augmentation_is_the_data_sets_unless_the_recipe_says_otherwise():
    assert augmentation(Recipe(data="fashion-mnist")) == Augment(crop_padding=2, flip=True)
    assert augmentation(Recipe(data="fashion-mnist", flip=False, crop_padding=0)) == Augment()
    folder = augmentation(Recipe(data="folder", smallest_crop=0.5))
    assert folder == Augment(flip=True, smallest_crop=0.5)


def test_images_are_varied_as_the_recipe_says(tmp_path, monkeypatch):
    seen = []

    def stop(recipe, dataset, arch, teacher, start):
        seen.append(dataset.train.augment)
        raise UserError("seen")

    monkeypatch.setattr("rd_train.plan.print_plan", stop)
    with pytest.raises(UserError, match="seen"):
        run(replace(STILL, flip=True, crop_padding=3), tmp_path)
    assert seen == [Augment(crop_padding=3, flip=True)]
    with pytest.raises(UserError, match="smallest_crop is for image folders"):
        run(replace(STILL, smallest_crop=0.5), tmp_path)


@pytest.mark.parametrize(
    ("precision", "resize_start", "tf32", "searches"),
    [("fp32", 1.0, False, True), ("fp32", 0.5, False, False), ("bf16", 1.0, True, True)],
)
def test_fp32_on_a_gpu_is_not_tf32_and_cudnn_searches_where_shapes_stay(precision, resize_start, tf32, searches):
    """By torch's settings, which can be read without a GPU."""
    settings = ((torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"))
    settings += ((torch.backends.cudnn, "benchmark"),)

    def found() -> list[bool]:
        return [getattr(backend, name) for backend, name in settings]

    def put(values: list[bool]) -> None:
        for (backend, name), value in zip(settings, values, strict=True):
            setattr(backend, name, value)

    before = found()
    usual = [True, True, not searches]  # TF32 as the first is by default, and in some containers the other
    try:
        put(usual)
        recipe = replace(STILL, device="cuda", precision=precision, resize_start=resize_start)
        with on_gpu(recipe):
            assert found() == [tf32, tf32, searches]
        assert found() == usual
        with on_gpu(replace(recipe, device="cpu")):
            assert found() == usual
    finally:
        put(before)


def test_a_run_computes_as_its_precision_says(tmp_path, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def noted(recipe):
        asked.append(recipe)
        yield
        asked.append("left")

    def fitted(*arguments, **options):
        asked.append("trained")
        return fit(*arguments, **options)

    monkeypatch.setattr("rd_train.plan.on_gpu", noted)
    monkeypatch.setattr("rd_train.run.fit", fitted)
    run(STILL, tmp_path)
    assert asked == [STILL, "trained", "left"]
