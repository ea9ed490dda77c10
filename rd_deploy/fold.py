"""From the training network to the deploy chain: BN folded in float64, on a copy, checked layer by layer.

``y = γ (W x - μ) / √(σ² + ε) + β`` is one convolution with ``W' = W γ / √(σ² + ε)`` and bias ``β - μ γ / √(σ² + ε)``.
Branches that training had beside a convolution are convolutions too, of which W is 1 at the centre of the kernel (a
channel passed on) or a 1x1 kernel there: kernels and biases add up.
The training network has its ReLU at the START of each block; every reader of such a tensor applies it, so the chain
applies it once, in the step that makes the tensor.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, Step, run_step, weights
from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.networks import Block, DiracConv2d, Network, Sides, add_dirac

# Float64 rounds at 1e-16; sums over thousands of products stay far below this, any real mistake lies far above it.
FOLD_BOUND = 1e-9
# Folding does not depend on the image size, so large networks are checked on small images.
CHECK_SIZE = 64


def fold(
    network: Network,
    size: int,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    provenance: dict | None = None,
) -> Chain:
    """The chain of a network for ``size`` x ``size`` images, with float64 weights; ``network`` stays as it is.

    BN is folded as in evaluation mode, whatever mode the network is in. Every step is run in float64 against the
    unfolded network; the largest relative error of each step is kept in ``provenance["fold_errors"]``. Raises
    `UserError` when one exceeds `FOLD_BOUND` or the network is broken (negative variance, NaN).
    """
    network = _frozen_copy(network)
    arch = network.arch
    chain = Chain(
        steps=tuple(_steps(network)),
        input_shape=(arch.in_channels, size, size),
        preprocessing=preprocessing or default_preprocessing(size, arch.in_channels),
        classes=tuple(classes) if classes is not None else tuple(map(str, range(arch.classes))),
        arch=arch.deployed.to_dict(),
        name=arch.name,
    )
    chain.check()
    errors = fold_errors(network, chain)
    worst = max(errors, key=errors.get)
    if errors[worst] > FOLD_BOUND:
        raise UserError(
            f"folding changed the network: relative error {errors[worst]:.1e} at {worst}, allowed {FOLD_BOUND:.0e}"
        )
    return replace(chain, provenance={**(provenance or {}), "fold_errors": errors})


def default_preprocessing(size: int, channels: int = 3) -> Preprocessing:
    """Preprocessing for networks that come without a data set: ImageNet's constants, or mid-grey for other inputs."""
    if channels == 3:
        return Preprocessing(size, round(size * 256 / 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Preprocessing(size, round(size * 256 / 224), channels, (0.5,) * channels, (0.25,) * channels)


def _frozen_copy(network: Network) -> Network:
    """A float64 copy on the CPU in evaluation mode."""
    return copy.deepcopy(network).cpu().double().eval().requires_grad_(False)


def _steps(network: Network) -> list:
    """All steps in an order that can be executed; see the module's docstring for the ReLUs."""
    steps = [_conv("conv1", network.conv1, network.bn1, source=INPUT)]
    if isinstance(network.maxpool, nn.MaxPool2d):
        pool = network.maxpool
        steps.append(MaxPool("maxpool", pool.kernel_size, pool.stride, pool.padding, source="conv1"))
    for name, block in network.blocks():
        steps += _block_steps(name, block, steps[-1].name)
    steps.append(GlobalAveragePool("avgpool", source=steps[-1].name))
    steps.append(Linear("fc", _array(network.fc.weight), _array(network.fc.bias), source="avgpool"))
    return steps


def _block_steps(name: str, block: Block, source: str) -> list[Conv]:
    """The main path; a projection runs just before the last convolution, which adds it: the least is alive then."""
    shortcut = source if block.has_shortcut else None
    steps, x = [], source
    for number, (conv, bn) in enumerate(block.convs, start=1):
        last, sides = number == len(block.convs), block.sides[number - 1] if block.sides is not None else None
        if last and block.downsample is not None:
            shortcut = f"{name}.downsample"
            steps.append(_conv(shortcut, *block.downsample, source=source, relu=False))
        add = shortcut if last else None
        steps.append(_conv(f"{name}.conv{number}", conv, bn, source=x, add=add, sides=sides))
        x = steps[-1].name
    return steps


def _conv(
    name: str,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    source: str,
    relu: bool = True,
    add: str | None = None,
    sides: Sides | None = None,
) -> Conv:
    weight, bias = _fused(name, conv.kernel() if isinstance(conv, DiracConv2d) else conv.weight, bn)
    for kernel, shift in _side_kernels(name, weight, sides):
        channels, centre = len(shift), conv.kernel_size[0] // 2
        weight[:channels, : kernel.shape[1], centre, centre] += kernel[:, :, 0, 0]
        bias[:channels] += shift
    return Conv(name, _array(weight), _array(bias), conv.stride[0], conv.padding[0], relu, source, add)


def _fused(name: str, kernel: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with its BN in it."""
    if (bn.running_var < 0).any():
        raise UserError(f"the BN after {name} has a negative variance: the weights are damaged")
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return kernel * scale[:, None, None, None], bn.bias - bn.running_mean * scale


def _side_kernels(name: str, weight: Tensor, sides: Sides | None) -> list[tuple[Tensor, Tensor]]:
    """Kernels (C, C_in, 1, 1) and biases (C,) of the branches beside a convolution."""
    if sides is None:
        return []
    identity = weight.new_zeros(sides.passed, sides.passed, 1, 1)
    add_dirac(identity, sides.passed)
    if isinstance(sides.identity, nn.Identity):
        return [(identity, weight.new_zeros(sides.passed))]
    found = [_fused(f"{name}'s branch", identity, sides.identity)]
    if sides.pointwise is not None:
        conv, bn = sides.pointwise
        found.append(_fused(f"{name}'s branch", conv.weight, bn))
    return found


def _array(tensor: Tensor) -> np.ndarray:
    """A fresh contiguous float64 array that shares no memory with the network."""
    return np.array(tensor.detach().numpy(), dtype=np.float64, order="C")


@torch.no_grad()
def fold_errors(network: Network, chain: Chain, seed: int = 0) -> dict[str, float]:
    """Largest error of each step against the unfolded float64 network, relative to its channel's largest term.

    Two normally distributed images. Each step is given what the network gives its counterpart, so that a chaotic
    network (which multiplies rounding errors from layer to layer) is not mistaken for a wrong fold; steps that are
    right one by one are right together. NaN counts as infinite. Raises `UserError` when the network itself gives it.
    """
    channels, size = chain.input_shape[0], min(chain.input_shape[1], CHECK_SIZE)
    images = np.random.default_rng(seed).standard_normal((2, channels, size, size))
    expected = {INPUT: images, **_expected_outputs(_frozen_copy(network), torch.from_numpy(images))}
    return {step.name: _step_error(step, expected) for step in chain.steps}


def _step_error(step: Step, expected: dict[str, np.ndarray]) -> float:
    reference = expected[step.name]
    if not np.isfinite(reference).all():
        raise UserError(f"the network gives NaN or infinity at {step.name}: the weights are damaged")
    # Channel by channel, since one loud channel would hide the others. The folded bias holds the term that cancels
    # when a BN's mean is far larger than its deviation.
    largest = _channel_maximum(reference)
    for values in (values for part, values in weights(step) if part == "bias"):
        largest = np.maximum(largest, np.abs(values))
    error = _channel_maximum(run_step(step, expected) - reference)
    worst = float((error / np.where(largest > 0, largest, 1.0)).max())
    return worst if np.isfinite(worst) else np.inf


def _channel_maximum(values: np.ndarray) -> np.ndarray:
    """Largest magnitude per channel of (N, C, ...), as (C,)."""
    return np.abs(values).max(axis=(0, *range(2, values.ndim)))


def _expected_outputs(network: Network, images: Tensor) -> dict[str, np.ndarray]:
    """What each step must give, read by hooks from one forward pass of the unfolded network."""
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str, relu: bool):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs[name] = (output.relu() if relu else output).numpy()

        return hook

    network.bn1.register_forward_hook(keep("conv1", relu=True))
    network.maxpool.register_forward_hook(keep("maxpool", relu=True))
    for name, block in network.blocks():
        whole = [bn for _, bn in block.convs] if block.sides is None else block.sides
        for number, module in enumerate(whole[:-1], start=1):
            module.register_forward_hook(keep(f"{name}.conv{number}", relu=True))
        if block.downsample is not None:
            block.downsample.register_forward_hook(keep(f"{name}.downsample", relu=False))
        block.register_forward_hook(keep(f"{name}.conv{len(block.convs)}", relu=True))
    network.fc.register_forward_hook(lambda module, inputs, output: outputs.update(avgpool=inputs[0].numpy()))
    network.fc.register_forward_hook(keep("fc", relu=False))
    network(images)
    return outputs
