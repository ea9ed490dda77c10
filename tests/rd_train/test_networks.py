"""The network class against torchvision, and what its switch and its initialisation promise."""

import pytest
import torch
import torchvision
from torch import nn

from rd_deploy.common import UserError
from rd_train.networks import (
    ARCH_NAMES,
    Arch,
    Block,
    Network,
    SubsampledConv2d,
    deployed_state,
    fade_shortcuts,
    parameter_count,
    parse_arch,
    set_fading,
    start_as_identity,
)


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


@pytest.mark.parametrize("reparam", ["none", "dirac", "skip", "identity", "branches"])
@pytest.mark.parametrize("name", ["plain20", "plain18", "plain50"])
def test_an_identity_start_passes_its_input_on_through_bn_and_relu(name, reparam):
    torch.manual_seed(0)
    arch = parse_arch(name, width=1 / 8, classes=3, reparam=reparam)
    network, images = Network(arch, "identity", init_noise=0.0).double(), torch.randn(4, 3, 64, 64).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # not only for a fresh stem
            nn.init.uniform_(module.bias, -0.5, 0.5)
    start_as_identity(network, images, 0.0)
    network.train()
    x = network.stem(images)
    for _, block in network.blocks():
        stride = max(conv.stride[0] for conv, _ in block.convs)
        expected = x.relu()[:, : block.passed, ::stride, ::stride]
        x = block(x)
        torch.testing.assert_close(x[:, : block.passed], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reparam", ["skip", "identity", "branches"])
@pytest.mark.parametrize("name", ["plain20", "plain50"])
def test_each_path_beside_an_identity_comes_with_the_noise_of_its_input(name, reparam):
    """Of a channel that is passed on: each other path has ``noise`` times its deviation, strides and widenings too."""
    torch.manual_seed(0)
    network = Network(parse_arch(name, width=1 / 8, reparam=reparam), "identity").double()
    images = torch.randn(8, 3, 64, 64).double()
    start_as_identity(network, images, 0.25)
    x = network.train().stem(images)
    for _, block in network.blocks():
        inside = x
        for number, (conv, bn) in enumerate(block.convs):
            inside, side, passed = inside.relu(), block.sides[number], block.passed
            stride = conv.stride[0]
            deviation = inside[:, :passed, ::stride, ::stride].std(dim=(0, 2, 3), correction=0)
            paths = [bn(conv(inside))] + ([side.pointwise(inside)] if side.pointwise is not None else [])
            assert len(paths) == 1 + (reparam == "branches" and conv.kernel_size[0] > 1)
            for path in paths:
                found = path[:, :passed].std(dim=(0, 2, 3), correction=0)
                torch.testing.assert_close(found, 0.25 * deviation, rtol=0.05, atol=0.01)
            inside = block.layer(number, inside)
        x = block(x)


def test_an_identity_start_leaves_statistics_and_modes_of_a_fresh_network():
    network = Network(parse_arch("plain20", width=0.25), "identity").eval()
    network.layer1.train()
    start_as_identity(network, torch.randn(4, 3, 8, 8), 0.1)
    assert not network.training
    assert network.layer1[0].bn1.training
    assert all(bool((bn.running_var == 1).all()) for bn in network.modules() if isinstance(bn, nn.BatchNorm2d))


def test_a_dirac_reparameterisation_starts_as_the_dirac_initialisation():
    images, logits = torch.randn(2, 3, 16, 16), {}
    for init in ("dirac", "kaiming"):
        for reparam in ("none", "dirac"):
            torch.manual_seed(3)
            network = Network(parse_arch("plain20", width=0.25, reparam=reparam), init, init_noise=0.3)
            logits[reparam] = network(images)
        torch.testing.assert_close(logits["dirac"], logits["none"], rtol=1e-4, atol=1e-4)


def test_blocks_with_a_shortcut_have_nothing_to_fold():
    for reparam in ("dirac", "skip", "identity", "branches"):
        state = Network(parse_arch("resnet20", width=0.25, reparam=reparam)).state_dict()
        assert set(state) == set(Network(parse_arch("resnet20", width=0.25)).state_dict())


def test_old_files_know_no_reparameterisation():
    assert "reparam" not in parse_arch("plain20").to_dict()
    arch = parse_arch("plain20", reparam="branches")
    assert Arch.from_dict(arch.to_dict()) == arch
    assert arch.deployed == parse_arch("plain20")
    with pytest.raises(UserError, match="reparam 'some' is unknown"):
        parse_arch("plain20", reparam="some")


@pytest.mark.parametrize(("name", "shortcuts"), [("plain20", "none"), ("plain50", "none"), ("plain20", "projection")])
def test_fading_goes_from_the_resnet_to_an_exactly_plain_network(name, shortcuts):
    torch.manual_seed(0)
    arch = parse_arch(name, width=1 / 8, shortcuts=shortcuts, classes=3)
    resnet = Network(parse_arch(name.replace("plain", "resnet"), width=1 / 8, classes=3)).double()
    student, images = Network(resnet.arch).double(), torch.randn(4, 3, 32, 32).double()
    student.load_state_dict(resnet.state_dict())
    fade_shortcuts(student, arch)
    set_fading(student, 0.0)
    assert torch.equal(student.train()(images), resnet.train()(images))
    plain = Network(arch).double()
    plain.load_state_dict(deployed_state(student), strict=True)
    assert torch.equal(student.eval()(images), plain.eval()(images))  # evaluated as what it will be
    set_fading(student, 1.0)
    assert torch.equal(student.train()(images), plain.train()(images))
    assert not torch.allclose(plain(images), resnet(images))


def test_shortcuts_fade_one_after_the_other():
    student = Network(parse_arch("resnet20", width=0.25))
    fade_shortcuts(student, parse_arch("plain20", width=0.25))
    set_fading(student, 0.5)
    weights = [float(block.fading) for _, block in student.blocks()]
    assert weights == [0, 0, 0, 0, 0.5, 1, 1, 1, 1]
    set_fading(student, 3.0)
    assert not any(float(block.fading) for _, block in student.blocks())


@pytest.mark.parametrize("channels", [1, 4, 7, 8, 12, 15, 16])
def test_the_gradient_of_a_narrow_projection_in_nhwc(channels):
    """With fewer channels than a register has lanes, oneDNN's own is wrong and writes past its memory."""
    torch.manual_seed(0)
    block = Block(parse_arch("resnet20"), channels, 16, 2)
    conv = block.downsample[0].to(memory_format=torch.channels_last)
    branch = Block(parse_arch("plain20", reparam="branches"), channels, 16, 2).sides[0].pointwise[0]
    assert isinstance(conv, SubsampledConv2d) == isinstance(branch, SubsampledConv2d) == (channels < 16)
    x = torch.randn(50, channels, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    step = torch.randn_like(y)
    y.backward(step)
    picked, weight, step = x.detach()[:, :, ::2, ::2].double(), conv.weight.detach()[:, :, 0, 0].double(), step.double()
    assert torch.allclose(y.double(), torch.einsum("ncij,oc->noij", picked, weight), atol=1e-5)
    assert torch.allclose(conv.weight.grad[:, :, 0, 0].double(), torch.einsum("noij,ncij->oc", step, picked), atol=1e-4)
    assert torch.allclose(x.grad[:, :, ::2, ::2].double(), torch.einsum("noij,oc->ncij", step, weight), atol=1e-5)
    assert not x.grad[:, :, 1::2].any()
    assert not x.grad[:, :, :, 1::2].any()
