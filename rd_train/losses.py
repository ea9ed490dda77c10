"""Loss terms of distillation, each a pure function."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 under autocast, and in float64 where the network is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher || student) of softened logits (N, classes), mean over the batch (Hinton et al. 2015).

    The factor T² keeps the size of the gradient independent of the temperature. The teacher gets no gradient.
    """
    log_student = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def negative_margin(bn: nn.BatchNorm2d) -> Tensor:
    """Per-channel margin μ < 0 of a pre-activation whose last layer is ``bn`` (Heo et al. 2019, section 3.1).

    μ = E[x | x < 0] for x ~ N(β, γ²): β - s · φ(β/s) / Φ(-β/s) with s = |γ|. Where x < 0 has a probability of at most
    0.001 the quotient is not trusted, and μ = -3 s. Shape (1, C, 1, 1), no gradient.
    """
    mean, std = bn.bias.detach().double(), bn.weight.detach().double().abs().clamp_min(1e-12)
    z = mean / std
    below_zero = 0.5 * torch.erfc(z / math.sqrt(2.0))
    density = torch.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    margin = torch.where(below_zero > 0.001, mean - std * density / below_zero.clamp_min(0.001), -3.0 * std)
    return margin.to(bn.weight.dtype).view(1, -1, 1, 1)


def margin_relu_distance(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Partial L2 of pre-activations (N, C, H, W) against margin-ReLU targets (Heo et al. 2019), summed per image.

    Per element with source s, target t and margin μ < 0: where t > 0 or s > max(t, μ), the squared distance of s to
    max(t, μ); elsewhere 0, because a source below a negative target is the same after the ReLU. Returns the sum over
    C, H, W and the mean over the batch. The target gets no gradient.
    """
    source, target = at_least_float32(source), at_least_float32(target.detach())
    clipped = torch.maximum(target, margin)
    counts = (target > 0) | (source > clipped)
    return (torch.where(counts, source - clipped, 0.0) ** 2).sum() / source.shape[0]
