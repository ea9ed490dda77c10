"""The network class against torchvision, and what its switch and its initialisation promise."""

import pytest
import torch
import torchvision
from torch import nn

from rd_deploy.common import UserError
from rd_train.networks import ARCH_NAMES, Arch, Block, Network, parameter_count, parse_arch


def randomise_bn(network: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.2, 0.6),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_give_torchvision_logits(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    randomise_bn(theirs)
    ours = Network(parse_arch(name)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, actual = theirs(images), ours(images)
    assert expected.std() > 0.01
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ARCH_NAMES)
def test_every_architecture_runs_and_stages_compose(name):
    arch = parse_arch(name, width=1 / 16, classes=7)
    network = Network(arch).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = network(images)
        x = network.stem(images)
        for index in range(network.stages):
            x = network.stage(index, x)
        assert torch.equal(network.head(x), logits)
    assert logits.shape == (2, 7)


def test_published_parameter_counts():
    # He et al. 2016, table 6 (0.27 M and 0.85 M; theirs without projections) and torchvision's documented counts.
    assert parameter_count(Network(parse_arch("resnet50"))) == 25_557_032
    assert parameter_count(Network(parse_arch("resnet18"))) == 11_689_512
    assert parameter_count(Network(parse_arch("plain56", classes=10))) == pytest.approx(0.85e6, rel=0.01)


def test_shortcuts_decide_which_blocks_add_and_project():
    def shortcuts(name, **changes):
        blocks = [
            module
            for module in Network(parse_arch(name, width=1 / 16, **changes)).modules()
            if isinstance(module, Block)
        ]
        return sum(block.has_shortcut for block in blocks), sum(block.downsample is not None for block in blocks)

    assert shortcuts("resnet50") == (16, 4)
    assert shortcuts("plain50") == (0, 0)
    # 13 of 16 shortcuts go, as in the authors' release; that of stage 1 (64 to 256, no stride) is one of them.
    assert shortcuts("plain50", shortcuts="projection") == (3, 3)
    assert shortcuts("plain18", shortcuts="projection") == (3, 3)


def test_plain_network_has_no_other_parameters_than_its_resnet_without_projections():
    residual, plain = (Network(parse_arch(name, width=1 / 16)).state_dict() for name in ("resnet50", "plain50"))
    assert set(plain) == {name for name in residual if "downsample" not in name}


def test_dirac_without_noise_makes_blocks_identities_on_positive_input():
    for name in ("plain20", "plain50"):
        network = Network(parse_arch(name, width=0.5, stem="small"), init="dirac", init_noise=0.0).eval()
        block = network.stage_blocks(1)[1]  # same shape in and out
        width = block.conv2.out_channels
        x = torch.rand(2, block.conv1.in_channels, 6, 6)
        # BN in evaluation mode at its initial statistics divides by sqrt(1 + eps).
        torch.testing.assert_close(block(x)[:, :width], x[:, :width], rtol=1e-4, atol=1e-4)


def test_dirac_adds_identity_to_scaled_kaiming():
    arch = parse_arch("plain20", width=0.5)
    torch.manual_seed(1)
    plain = Network(arch, init="kaiming").layer1[1].conv1.weight
    torch.manual_seed(1)
    dirac = Network(arch, init="dirac", init_noise=0.25).layer1[1].conv1.weight
    identity = nn.init.dirac_(torch.empty_like(plain))
    torch.testing.assert_close(dirac, identity + 0.25 * plain)


def test_dirac_leaves_residual_blocks_alone():
    arch = parse_arch("resnet20", width=0.5)
    torch.manual_seed(1)
    one = Network(arch, init="kaiming").state_dict()
    torch.manual_seed(1)
    other = Network(arch, init="dirac").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_explode_in_a_deep_plain_network_and_dirac_tames_them():
    # BN keeps every activation at unit size, so the gradient grows backwards instead (Yang et al. 2019).
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    norms = {}
    for init, noise in (("kaiming", 0.0), ("dirac", 0.5), ("dirac", 0.1)):
        network = Network(parse_arch("plain110", classes=10), init=init, init_noise=noise).train()
        nn.functional.cross_entropy(network(images), labels).backward()
        norms[init, noise] = float(network.conv1.weight.grad.norm())
    assert norms["kaiming", 0.0] > 1e4
    assert norms["dirac", 0.5] < 1e-3 * norms["kaiming", 0.0]
    assert norms["dirac", 0.1] < norms["dirac", 0.5]


def test_names_and_bad_values():
    assert parse_arch("plain50").name == "plain50"
    assert parse_arch("plain50", shortcuts="projection").name == "plain50-projection"
    assert Arch.from_dict(parse_arch("resnet20").to_dict()) == parse_arch("resnet20")
    with pytest.raises(UserError, match="did you mean 'plain50'"):
        parse_arch("plian50")
    for changes in ({"width": 0}, {"shortcuts": "some"}, {"stem": "large"}, {"classes": 1}, {"in_channels": 0}):
        with pytest.raises(UserError):
            parse_arch("plain20", **changes)
    with pytest.raises(UserError, match="exactly"):
        Arch.from_dict({"depth": 20})
