"""What a run will cost, counted rather than estimated: the real step on the meta device under torch's FLOP counter."""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rd_train.distill import CrossEntropy
from rd_train.networks import Arch, Network


def macs_per_image(arch: Arch, size: int) -> int:
    """Multiply-accumulates of one forward pass of a ``size`` x ``size`` image (convolutions and classifier)."""
    with torch.device("meta"):
        network, image = Network(arch).eval(), torch.empty(1, arch.in_channels, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def step_macs(task: nn.Module, size: int) -> int:
    """Multiply-accumulates of forward and backward of one image through a task built on the meta device."""
    arch = task.student.arch
    with torch.device("meta"):
        # Two images: BN on batch statistics refuses a single value per channel.
        images, labels = torch.empty(2, arch.in_channels, size, size), torch.empty(2, dtype=torch.long)
        progress = torch.zeros(())
    with FlopCounterMode(display=False) as counter:
        task.train()(images, labels, progress)["loss"].backward()
    return counter.get_total_flops() // 4


def relative_cost(task: nn.Module, size: int) -> float:
    """Cost of a step of a task (on the meta device) in units of an ordinary step of the plain network of its depth."""
    with torch.device("meta"):
        plain = CrossEntropy(Network(replace(task.student.arch, shortcuts="none")))
    return step_macs(task, size) / step_macs(plain, size)
