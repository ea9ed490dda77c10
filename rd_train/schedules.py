"""Schedules as pure functions of progress, so that nothing of them has to be saved for a resume."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def learning_rate(
    step: int,
    total: int,
    *,
    peak: float,
    kind: str,
    warmup: int,
    milestones: Sequence[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> float:
    """Learning rate of optimiser step ``step`` (from 0) out of ``total``.

    Linear from peak / warmup to peak over ``warmup`` steps; then ``cosine`` to 0, or ``step``: times ``gamma`` at each
    milestone (fractions of ``total``).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "step":
        return peak * gamma ** sum(step >= milestone * total for milestone in milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def cosine_decay(progress: Tensor, start: float, end: float, window: float) -> Tensor:
    """From ``start`` to ``end`` along half a cosine over the first ``window`` of training, constant afterwards.

    ``progress`` in [0, 1] is a 0-d tensor, so that a compiled step is not compiled again as it changes.
    """
    position = (progress / window).clamp(max=1.0)
    return end + (start - end) * 0.5 * (1 + torch.cos(math.pi * position))
