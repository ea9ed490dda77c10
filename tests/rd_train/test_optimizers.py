"""Which parameters are decayed, and Muon's steps against the singular value decomposition."""

import copy
from dataclasses import replace

import pytest
import torch

from rd_train.build import build_task
from rd_train.distill import CrossEntropy
from rd_train.networks import Network, parse_arch
from rd_train.optimizers import build_optimizer
from rd_train.recipe import Recipe

ARCH = parse_arch("plain20", width=1 / 8, in_channels=1, classes=3)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_spares_bn_and_biases_unless_asked(decay_all, optimizer):
    network = Network(ARCH)
    recipe = Recipe(decay_bn_bias=decay_all, weight_decay=0.01, optimizer=optimizer)
    optimizer = build_optimizer(recipe, CrossEntropy(network))
    decayed = sum(p.numel() for group in optimizer.param_groups if group["weight_decay"] for p in group["params"])
    total = sum(p.numel() for p in network.parameters())
    matrices = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert decayed == (total if decay_all else matrices)


def stepped(recipe: Recipe, network: Network) -> None:
    torch.manual_seed(0)
    optimizer = build_optimizer(recipe, task := CrossEntropy(network.train()))
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
    optimizer.zero_grad()
    task(images, labels, torch.zeros(()))["loss"].backward()
    optimizer.step()


def test_muon_moves_kernels_by_the_orthogonal_factor_of_their_gradient_and_sgd_the_rest():
    torch.manual_seed(1)
    network = Network(ARCH)
    recipe = Recipe(optimizer="muon", lr=0.1, muon_lr=0.02, muon_decay=0.5, weight_decay=0.0)
    before, plain = copy.deepcopy(network), copy.deepcopy(network)
    stepped(recipe, network)
    stepped(Recipe(optimizer="sgd", lr=0.1, weight_decay=0.0), plain)
    for name, value in network.named_parameters():
        old = before.get_parameter(name).detach()
        if value.ndim != 4:
            torch.testing.assert_close(value, plain.get_parameter(name))
            continue
        moved = ((1 - 0.02 * 0.5) * old - value.detach()).flatten(1).double() / 0.02
        left, _, right = torch.linalg.svd((old - plain.get_parameter(name).detach()).flatten(1).double(), False)
        scale = max(1.0, moved.shape[0] / moved.shape[1]) ** 0.5  # taller than wide: torch's adjustment
        inside = torch.linalg.svdvals(left.T @ moved @ right.T / scale)
        # Newton and Schulz's iteration in bfloat16 makes them roughly one, and leaves the directions alone.
        assert torch.all((inside > 0.3) & (inside < 1.4)), name
        across = left.T @ moved @ right.T / scale - torch.diag((left.T @ moved @ right.T / scale).diagonal())
        assert across.abs().max() < 0.15, name


def test_muon_does_not_depend_on_the_memory_format():
    torch.manual_seed(1)
    one = Network(ARCH)
    other = copy.deepcopy(one).to(memory_format=torch.channels_last)
    assert not other.layer1[0].conv1.weight.is_contiguous()
    for network in (one, other):
        stepped(Recipe(optimizer="muon", muon_lr=1.0), network)
    for name, value in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).contiguous(), value, rtol=0.05, atol=0.03)


def test_a_teacher_and_connectors_learn_by_sgd():
    recipe = Recipe(method="jointrd", teacher_mode="joint", optimizer="muon", arch="plain20", width=1 / 8)
    task = build_task(recipe, Network(ARCH), Network(replace(ARCH, shortcuts="all")))
    by_sgd, by_muon = build_optimizer(recipe, task).parts
    kernels = [parameter for parameter in task.student.parameters() if parameter.ndim == 4]
    assert [kernel.data_ptr() for kernel in by_muon.kernels] == [kernel.data_ptr() for kernel in kernels]
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in by_sgd.param_groups) == len(trained) - len(kernels)
    assert any(p.ndim == 4 for group in by_sgd.param_groups for p in group["params"])


def test_a_kernel_that_was_moved_is_told():
    network = Network(ARCH)
    optimizer = build_optimizer(Recipe(optimizer="muon"), CrossEntropy(network))
    network.conv1.weight.data = network.conv1.weight.data.clone()
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()
