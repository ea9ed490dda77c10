"""Networks with random weights that behave like trained ones: for benchmarks and tests without a checkpoint.

Freshly initialised deep plain networks vanish or explode, and engines run faster or slower on zeros, denormals and
infinities. Here each BN gets the statistics of its own input, so that every channel has unit variance. With Kaiming
weights and a BN bias of zero a plain network would still multiply every difference, rounding errors included: by up to
√(π/(π-1)) = 1.21 per layer (Yang et al. 2019, "A mean field theory of batch normalization"), by 600 in plain-50 and
5e5 in plain-110 as measured. With a Dirac share in the weights and a bias of one, which lets most values pass the
ReLU, it is 5 and 2.
"""

import math

import torch
from torch import Tensor, nn

from rd_deploy.common import UserError
from rd_deploy.export.images import random_images
from rd_train.networks import Arch, Network

# Pixels per channel that the statistics of the last stage rest on, and the least number of images.
CALIBRATION_PIXELS = 128
CALIBRATION_IMAGES = 4
BN_BIAS = 1.0
DIRAC_NOISE = 0.25  # of plain blocks, see `rd_train.networks.initialise`


def random_network(arch: Arch, size: int, seed: int = 0) -> Network:
    """A network in evaluation mode, the same for the same ``arch``, ``size`` and ``seed``.

    Kaiming-normal convolutions, with a Dirac share in plain blocks. BN statistics and the classifier are calibrated in
    one pass over random images: there, channels have unit variance, and logits vary over images with unit variance
    around zero.
    """
    if not 1 <= size <= 4096:
        raise UserError(f"image size {size} must be from 1 to 4096")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(arch, "dirac", DIRAC_NOISE).eval()
    _calibrate(network, size, seed)
    return network


@torch.no_grad()
def _calibrate(network: Network, size: int, seed: int) -> None:
    reduction = 2 ** (network.stages - 1) * (4 if network.arch.stem == "imagenet" else 1)
    pixels = math.ceil(size / reduction) ** 2
    count = max(CALIBRATION_IMAGES, math.ceil(CALIBRATION_PIXELS / pixels))
    images = torch.from_numpy(random_images(count, network.arch.in_channels, size, seed))
    hooks = [
        module.register_forward_pre_hook(_use_statistics)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        logits = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    centred = logits - logits.mean(dim=0)
    spread = centred.square().mean().sqrt()
    if spread > 0:  # otherwise the classifier keeps its initialisation
        network.fc.weight.div_(spread)
        network.fc.bias.copy_((network.fc.bias - logits.mean(dim=0)) / spread)


def _use_statistics(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Give a BN the (biased) statistics of its input, (N, C, H, W), and its bias just before it uses them."""
    var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    module.running_mean.copy_(mean)
    module.running_var.copy_(var)
    nn.init.constant_(module.bias, BN_BIAS)
