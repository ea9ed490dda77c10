"""Folding: the chain computes what the unfolded float64 network does, whatever its BN holds, and changes nothing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rd_deploy.chain import Conv, run_chain
from rd_deploy.common import UserError
from rd_deploy.fold import FOLD_BOUND, fold, fold_errors
from rd_train.networks import Arch, Network


def awkward_network(seed: int = 0, **arch) -> Network:
    """Random BN statistics and parameters, with zero variances, negative and zero scales."""
    torch.manual_seed(seed)
    network = Network(Arch(**({"depth": 20, "stem": "small", "width": 0.25, "classes": 7} | arch)))
    for bn in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.2, 3)
        bn.running_var[0], bn.weight.data[-1] = 0.0, 0.0
    return network


def chain_logits(chain, images: torch.Tensor) -> np.ndarray:
    for _, output in run_chain(chain, images.numpy()):
        logits = output
    return logits


@pytest.mark.parametrize("shortcuts", ["all", "projection", "none"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize(("depth", "width"), [(20, 0.25), (18, 1 / 16), (50, 1 / 16)])
def test_the_chain_computes_what_the_network_does(shortcuts, stem, depth, width):
    network = awkward_network(depth=depth, width=width, stem=stem, shortcuts=shortcuts)
    chain = fold(network, 33)
    assert max(chain.provenance["fold_errors"].values()) < 1e-12
    assert list(chain.provenance["fold_errors"]) == [step.name for step in chain.steps]
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(network).double().eval()(images).numpy()
    np.testing.assert_allclose(chain_logits(chain, images), expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("reparam", ["dirac", "skip", "identity", "branches"])
@pytest.mark.parametrize(("depth", "stem"), [(20, "small"), (18, "imagenet"), (50, "imagenet")])
def test_what_training_has_besides_folds_into_the_same_plain_chain(reparam, depth, stem):
    network = awkward_network(depth=depth, width=1 / 8, stem=stem, reparam=reparam)
    for name, parameter in network.named_parameters():
        if name.endswith(("alpha", "beta")):
            nn.init.normal_(parameter)
    chain = fold(network, 33)
    assert max(chain.provenance["fold_errors"].values()) < 1e-12
    plain = fold(awkward_network(depth=depth, width=1 / 8, stem=stem), 33)
    assert [(step.name, type(step)) for step in chain.steps] == [(step.name, type(step)) for step in plain.steps]
    assert [value.shape for step in chain.steps if isinstance(step, Conv) for value in (step.weight, step.bias)] == [
        value.shape for step in plain.steps if isinstance(step, Conv) for value in (step.weight, step.bias)
    ]
    assert chain.arch == plain.arch
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(network).double().eval()(images).numpy()
    np.testing.assert_allclose(chain_logits(chain, images), expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())


def test_damaged_statistics_of_a_branch_are_refused():
    network = awkward_network(reparam="branches")
    network.layer1[0].sides[1].identity.running_var[1] = -1
    with pytest.raises(UserError, match=r"layer1\.0\.conv2's branch has a negative variance"):
        fold(network, 16)


def test_the_chain_computes_what_torchvisions_resnet_does():
    from torchvision.models import resnet18

    torch.manual_seed(1)
    theirs, ours = resnet18(num_classes=5).double().eval(), Network(Arch(18, "all", classes=5)).double()
    for bn in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(bn.running_var, 0.5, 2)
        nn.init.normal_(bn.running_mean)
        nn.init.normal_(bn.bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        np.testing.assert_allclose(chain_logits(fold(ours, 64), images), theirs(images).numpy(), rtol=1e-9)


def test_a_network_in_training_is_folded_as_in_evaluation_and_stays_untouched():
    network = awkward_network(shortcuts="all").train()
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    chain = fold(network, 16)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert fold(network.eval(), 16).sha256() == chain.sha256()


def test_the_chain_shares_no_memory_with_the_network():
    network = awkward_network()
    chain = fold(network, 16)
    before = chain.sha256()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert chain.sha256() == before


def test_errors_name_the_step_that_is_wrong_and_only_that():
    network = awkward_network(shortcuts="all")
    chain = fold(network, 16)
    index = next(index for index, step in enumerate(chain.steps) if step.name == "layer2.0.downsample")
    wrong = replace(chain.steps[index], bias=chain.steps[index].bias * (1 + 1e-6))
    broken = replace(chain, steps=(*chain.steps[:index], wrong, *chain.steps[index + 1 :]))
    errors = fold_errors(network, broken)
    assert [name for name, error in errors.items() if error > FOLD_BOUND] == ["layer2.0.downsample"]


def test_a_chain_without_its_shortcut_is_caught():
    network = awkward_network(shortcuts="all")
    chain = fold(network, 16)
    steps = tuple(replace(step, add=None) if isinstance(step, Conv) else step for step in chain.steps)
    errors = fold_errors(network, replace(chain, steps=steps))
    assert errors["layer1.0.conv2"] > 1e-2


def test_fold_refuses_when_its_own_check_fails(monkeypatch):
    monkeypatch.setattr("rd_deploy.fold.fold_errors", lambda network, chain: {"conv1": 0.0, "fc": 1e-3})
    with pytest.raises(UserError, match=r"1\.0e-03 at fc"):
        fold(awkward_network(), 16)


def test_damaged_statistics_are_refused():
    network = awkward_network()
    network.layer1[0].bn2.running_var[1] = -1
    with pytest.raises(UserError, match=r"layer1\.0\.conv2 has a negative variance"):
        fold(network, 16)


def test_overflow_in_the_network_is_reported():
    network = awkward_network().double()
    for block in network.layer3:
        block.bn1.weight.data.fill_(1e200)
        block.bn2.weight.data.fill_(1e200)
    with pytest.raises(UserError, match="gives NaN or infinity at layer3"), np.errstate(all="ignore"):
        fold(network, 16)
