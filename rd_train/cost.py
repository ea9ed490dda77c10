"""What a run will cost, counted rather than estimated: the real step on the meta device under torch's FLOP counter."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from rd_train import distributed
from rd_train.distill import MOMENTS, CrossEntropy
from rd_train.networks import Arch, Network
from rd_train.optimizers import NEWTON_SCHULZ, muon_kernels
from rd_train.recipe import Recipe


class _WithoutBN(TorchFunctionMode):
    """BN passes its input on: its multiply-accumulates are not counted, and it takes most of a step's time.

    On the meta device torch runs it as dozens of operations in Python. Which gradients there are stays the same.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_passed_on if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _passed_on(maps: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor, bias: Tensor, **_) -> Tensor:
    """In place of ``F.batch_norm``. Where BN is trained and nothing before it is, gradients begin there."""
    return maps if maps.requires_grad else maps * weight[:, None, None] + bias[:, None, None]


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter, _WithoutBN():
        yield counter


def macs_per_image(arch: Arch, size: int) -> int:
    """Multiply-accumulates of one forward pass of a ``size`` x ``size`` image (convolutions and classifier)."""
    with torch.device("meta"):
        network, image = Network(arch).eval(), torch.empty(1, arch.in_channels, size, size)
    with _counted() as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def step_macs(task: nn.Module, size: int, **outcome) -> int:
    """Multiply-accumulates of forward and backward of one image through a task built on the meta device.

    ``outcome``: the kind of step, as keywords of the task's ``forward``.
    """
    arch = task.student.arch
    with torch.device("meta"):
        images, labels = torch.empty(1, arch.in_channels, size, size), torch.empty(1, dtype=torch.long)
        progress = torch.zeros(())
    with _counted() as counter:
        task.train()(images, labels, progress, **outcome)["loss"].backward()
    return counter.get_total_flops() // 2


def mean_step_macs(task: nn.Module, size: int, size_at: Callable[[float], int] | None = None) -> float:
    """`step_macs` as expected over a whole training: over its kinds of step, and its image sizes (``size_at``)."""
    shares: Counter = Counter()
    for moment in range(MOMENTS):
        progress = (moment + 0.5) / MOMENTS
        for probability, outcome in task.outcomes(progress):
            shares[size_at(progress) if size_at else size, tuple(outcome.items())] += probability
    total = sum(share * step_macs(task, pixels, **dict(outcome)) for (pixels, outcome), share in shares.items())
    return total / MOMENTS


def update_macs(recipe: Recipe, task: nn.Module) -> float:
    """Multiply-accumulates of Muon in a step, per image of its batch; those of SGD are not counted.

    All processes of a run make all of them.

    Each of Newton and Schulz's five iterations has three products of matrices, m x n and m x m with m the shorter side
    of a kernel's matrix: 2 m² n + m³.
    """
    shapes = [sorted((len(kernel), kernel[0].numel())) for kernel in muon_kernels(recipe, task)]
    return sum(NEWTON_SCHULZ * (2 * m * m * n + m**3) for m, n in shapes) * distributed.world() / recipe.batch_size


def relative_cost(
    task: nn.Module, size: int, size_at: Callable[[float], int] | None = None, update: float = 0.0
) -> float:
    """`mean_step_macs` of a task (on the meta device) in units of a cross-entropy step of the plain network.

    ``update``: `update_macs`, besides.
    """
    with torch.device("meta"):
        plain = CrossEntropy(Network(replace(task.student.arch.deployed, shortcuts="none")))
    return (mean_step_macs(task, size, size_at) + update) / step_macs(plain, size)
