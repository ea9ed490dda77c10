"""Random networks behave like trained ones on images they have not seen."""

import numpy as np
import pytest
import torch

from rd_deploy.common import UserError
from rd_deploy.random_weights import random_images, random_network
from rd_train.networks import parse_arch


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("plain50", 96, {}),
        ("resnet50", 96, {}),
        ("plain110", 32, {}),
        ("resnet110", 32, {}),
        ("plain110", 32, {"shortcuts": "projection", "width": 0.25}),
        ("plain18", 32, {"width": 1 / 16, "in_channels": 1, "classes": 10}),
    ],
)
def test_activations_neither_vanish_nor_explode(name, size, changes):
    network = random_network(parse_arch(name, **changes), size)
    assert not network.training
    images = torch.from_numpy(random_images(6, network.arch.in_channels, size, seed=7))
    with torch.no_grad():
        stages, logits = network.features(images), network(images)
    assert all(0.3 < stage.std() < 10 for stage in stages)
    assert 0.3 < logits.std() < 10
    assert 0.3 < logits.std(dim=0).mean() < 10  # images are told apart


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone():
    arch = parse_arch("plain20", width=0.5)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = random_network(arch, 16, seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected)
    second, other = (random_network(arch, 16, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_evaluation_uses_exactly_the_statistics_of_the_calibration():
    network = random_network(parse_arch("resnet20", width=0.5), 32)
    from rd_deploy import random_weights

    seen = {}
    network.layer3[1].bn2.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    with torch.no_grad():
        network(torch.from_numpy(random_images(random_weights.CALIBRATION_IMAGES, 3, 32, seed=0)))
    var, mean = torch.var_mean(seen["output"], dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.full_like(mean, random_weights.BN_BIAS), atol=1e-4, rtol=0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-2, rtol=0)


def test_images_differ_after_pooling_and_repeat_by_seed():
    images = random_images(8, 3, 32, seed=1)
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == np.float32
    assert 0.5 < images.std() < 2
    assert images.mean(axis=(2, 3)).std(axis=0).min() > 0.1
    np.testing.assert_array_equal(images, random_images(8, 3, 32, seed=1))
    assert not np.array_equal(images, random_images(8, 3, 32, seed=2))
    assert random_images(1, 1, 1).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [0, -3, 5000])
def test_absurd_sizes_are_refused(size):
    with pytest.raises(UserError, match="image size"):
        random_network(parse_arch("plain20"), size)
