"""What a run makes of its recipe before it trains."""

from dataclasses import replace

import pytest
import torch

from rd_deploy.common import UserError
from rd_train.augment import Augment
from rd_train.checkpoint import load_checkpoint
from rd_train.data import fixed_sample, load_dataset
from rd_train.recipe import Recipe
from rd_train.run import augmentation, run

# Steps too small to change a weight.
STILL = Recipe(
    method="ce", arch="plain20", width=0.25, epochs=1, batch_size=50, lr=1e-12, warmup_epochs=0.5, train_limit=200,
    precision="fp32", device="cpu", threads=1, init_noise=0.0,
)  # fmt: skip


@pytest.mark.parametrize("init", ["identity", "dirac"])
def test_only_an_identity_start_passes_images_on(tmp_path, init):
    run(replace(STILL, init=init), tmp_path)
    network = load_checkpoint(tmp_path / "model.pt").network().train()
    split = load_dataset("digits", limit=200).train
    with torch.no_grad():
        x = network.stem(split.images(fixed_sample(split, 50)))
        for block in network.stage_blocks(0):
            x = block(x.relu())
        first = network.stem(split.images(fixed_sample(split, 50)))
    same = torch.allclose(x.relu(), first.relu(), atol=1e-3)
    assert same == (init == "identity")


def test_augmentation_is_the_data_sets_unless_the_recipe_says_otherwise():
    assert augmentation(Recipe(data="fashion-mnist")) == Augment(crop_padding=2, flip=True)
    assert augmentation(Recipe(data="fashion-mnist", flip=False, crop_padding=0)) == Augment()
    folder = augmentation(Recipe(data="folder", smallest_crop=0.5))
    assert folder == Augment(flip=True, smallest_crop=0.5)


def test_images_are_varied_as_the_recipe_says(tmp_path, monkeypatch):
    seen = []

    def stop(recipe, dataset, arch, teacher):
        seen.append(dataset.train.augment)
        raise UserError("seen")

    monkeypatch.setattr("rd_train.run.print_plan", stop)
    with pytest.raises(UserError, match="seen"):
        run(replace(STILL, flip=True, crop_padding=3), tmp_path)
    assert seen == [Augment(crop_padding=3, flip=True)]
    with pytest.raises(UserError, match="smallest_crop is for image folders"):
        run(replace(STILL, smallest_crop=0.5), tmp_path)
