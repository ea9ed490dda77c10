"""Which tiles of a convolution are worth timing on a card: all that fit, ranked by the model of `cost`."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.cost import BlockCost, Prediction, ceil_div, is_asynchronous

# (block_m, block_n, warps); tensor cores want at least 16 of each.
TILES = (
    *((128, 256, 8), (128, 128, 8), (128, 64, 4), (128, 32, 4), (128, 16, 4)),
    *((64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4)),
    *((32, 128, 4), (32, 64, 4), (32, 32, 4), (16, 128, 4), (16, 64, 4), (16, 32, 4), (16, 16, 4)),
)
STAGES = (2, 3, 4, 6)
MOST_SPLITS = 16


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of ``block_m`` pixels by ``block_n`` output channels, ``block_k`` products deep per step; ``stages`` of
    them in flight; a tile's steps shared by ``splits`` blocks."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    splits: int = 1


def worth_timing(kernel, card: Card) -> tuple[ConvConfig, ...]:
    """The configurations of a `ConvKernel` with the least modelled time, the best first."""
    times = {config: predict(kernel, config, card).us for config in candidates(kernel, card)}
    return cost.best(
        times,
        alike=lambda config: (config.block_m, config.block_n),
        same=lambda config: (config.block_m, config.block_n, config.splits if config.splits > 1 else config),
    )


def candidates(kernel, card: Card) -> Iterator[ConvConfig]:
    """All configurations that fit a card and give each block work."""
    splits = range(1, MOST_SPLITS + 1)
    for (block_m, block_n, warps), block_k, split, stages in itertools.product(TILES, block_ks(kernel), splits, STAGES):
        config = ConvConfig(block_m, block_n, block_k, stages, warps, split)
        if sensible(kernel, config, card) and fits(kernel, config, card):
            yield config


def sensible(kernel, config: ConvConfig, card: Card) -> bool:
    """No tile larger than the output, no split or stage without work, and splits only for a card left idle."""
    per_split = ceil_div(kernel.steps(config), config.splits)
    return (
        config.block_n <= max(16, _power_of_2(kernel.outputs))
        and config.block_m <= max(16, _power_of_2(kernel.pixels))
        and config.splits == ceil_div(kernel.steps(config), per_split)
        and min(3, per_split) <= config.stages <= max(2, per_split)
        and (config.splits == 1 or math.prod(kernel.tiles(config)) * config.splits <= 2 * card.multiprocessors)
    )


def fits(kernel, config: ConvConfig, card: Card) -> bool:
    """Within a card's shared memory, and without spills: beside its sums a thread holds addresses, operands of the
    older instruction, and what is added or gathered."""
    threads = 32 * config.warps
    modern = is_asynchronous(card, config.block_m)
    sums = 128 if modern and config.splits == 1 and not kernel.add else 64
    if kernel.add and not modern and kernel.steps(config) == 1:
        sums = 32  # without a loop the assembler loads all of ``add`` beside the operands
    if config.splits > 2:
        # It reads two parts at a time; Blackwell's assembler spills a few bytes to save registers.
        sums = 16 if card.capability >= 100 else 32
    return (
        config.block_m * config.block_n <= sums * threads
        and not (kernel.gather and config.block_m * config.block_k > 16 * threads)
        and kernel.work(config).shared_bytes <= card.shared_bytes
    )


def block_ks(kernel) -> tuple[int, ...]:
    """Depths of a step; within one tap they must divide the input channels."""
    if kernel.gather:
        return 32, 64
    return tuple(size for size in (64, 32, 16) if kernel.inputs % size == 0)[:2]


def shared_bytes(kernel, config: ConvConfig, buffers: int) -> int:
    """Of one block: ``buffers`` of both operands' tiles, in whose place the result is turned into rows at the end.

    A gathered tile comes through registers, into one buffer, or two where the tensor cores work asynchronously.
    """
    x_tile, w_tile = 2 * config.block_m * config.block_k, 2 * config.block_k * config.block_n
    loads = buffers * w_tile + (min(2, buffers) if kernel.gather else buffers) * x_tile
    wide = kernel.fp32_out or config.splits > 1
    return max(loads, (4 if wide else 2) * config.block_m * config.block_n) + 16  # and a barrier


def registers(kernel, config: ConvConfig) -> int:
    """Of one thread: fitted to what compiling gave on five generations of GPUs, right to a fifth or so."""
    threads = 32 * config.warps
    sums = config.block_m * config.block_n // threads
    copies = (config.block_m + config.block_n) * config.block_k // (8 * threads)  # of 16 bytes per step
    gathered = config.block_m * config.block_k // threads if kernel.gather else 0
    return min(255, 30 + 5 * sums // 4 + copies + 3 * gathered)


def predict(kernel, config: ConvConfig, card: Card) -> Prediction:
    """Modelled time of one launch."""
    work = kernel.work(config)
    steps = ceil_div(kernel.steps(config), config.splits)
    alone = 0.0
    if config.splits > 1:
        read_again = 4 * config.splits * config.block_m * config.block_n / cost.SM_L2_BYTES
        alone = cost.MEETING + max(read_again, ceil_div(config.splits, 2) * cost.LATENCY)
    block = BlockCost(
        flops=work.issued_flops / work.blocks / reuse(config),
        waits=steps * cost.LATENCY / (config.stages - 1),
        asynchronous=is_asynchronous(card, config.block_m),
        alone=alone,
    )
    return cost.predict(work, block, card)


def reuse(config: ConvConfig) -> float:
    """Of the tensor cores' rate: small tiles bring too many operands per product through shared memory."""
    return min(1.0, config.block_m * config.block_n / (config.block_m + config.block_n) / 64)


def _power_of_2(value: int) -> int:
    """The least one that is not below a value."""
    return 1 << (value - 1).bit_length()
