"""Which tiles of a convolution are worth timing on a card: a model of one launch ranks all that fit.

The model has four terms: what every multiprocessor multiplies, what it asks of the L2 cache, what all together ask of
DRAM, and the chain of waits in one block after another. It steers what gets timed and claims no more.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rd_deploy.triton_kernels.cards import KIB, Card

KEPT = 8
KEPT_WITHIN = 2.0  # times the best one's modelled time
KEPT_PER_TILE = 2  # of one (block_m, block_n): a model that errs about one tile errs about all its variants

# (block_m, block_n, warps); tensor cores want at least 16 of each.
TILES = (
    *((128, 256, 8), (128, 128, 8), (128, 64, 4), (128, 32, 4), (128, 16, 4)),
    *((64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4)),
    *((32, 128, 4), (32, 64, 4), (32, 32, 4), (16, 128, 4), (16, 64, 4), (16, 32, 4), (16, 16, 4)),
)
STAGES = (2, 3, 4, 6)
MOST_SPLITS = 16

# Guesses from published micro-benchmarks, to be corrected by measurements: seconds, and shares of the peak.
LATENCY = 0.8e-6  # of a load that misses the L1 cache, under load
FILL = 1.2e-6  # of a block: its first loads, and its last stores
MEETING = 1.0e-6  # of splits: store and announce
MATRIX_SHARE = 0.75  # of the peak, by a large tile
MMA_SHARE = {90: 0.6, 100: 0.3}  # of that, by the older instruction
DRAM_SHARE = 0.85
EXPOSED = 0.1  # of what should hide behind the longest term
SM_L2_BYTES = 100e9  # per second: the most that one multiprocessor can have of the L2 cache's bandwidth
REGISTERS_SM = 65536


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
    times = {config: seconds(kernel, config, card) for config in candidates(kernel, card)}
    limit = KEPT_WITHIN * min(times.values())
    kept: list[ConvConfig] = []
    for config in sorted((config for config in times if times[config] <= limit), key=times.get):
        alike = [other for other in kept if (other.block_m, other.block_n) == (config.block_m, config.block_n)]
        twin = config.splits > 1 and any(other.splits == config.splits for other in alike)
        if len(alike) < KEPT_PER_TILE and not twin:
            kept.append(config)
    return tuple(kept[:KEPT])


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
    modern = asynchronous(card, config.block_m)
    sums = 128 if modern and config.splits == 1 and not kernel.add else 64
    if kernel.add and not modern and kernel.steps(config) == 1:
        sums = 32  # without a loop the assembler loads all of ``add`` beside the operands
    if config.splits > 2:
        sums = 16 if card.capability == 100 else 32  # it reads two parts at a time
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


def seconds(kernel, config: ConvConfig, card: Card) -> float:
    """Modelled time of one launch within a CUDA graph."""
    work = kernel.work(config)
    sms = card.multiprocessors
    share = ceil_div(work.blocks, sms)  # blocks of the multiprocessor that has most
    rounds = ceil_div(share, max(1, resident(kernel, config, card)))
    steps = ceil_div(kernel.steps(config), config.splits)
    multiply = work.issued_flops / work.blocks / (card.tflops * 1e12 / sms * matrix_share(config, card))
    fetch = work.l2_bytes / work.blocks / min(SM_L2_BYTES, card.l2_gb_s * 1e9 / min(sms, work.blocks))
    terms = (
        share * multiply,
        share * fetch,
        rounds * (FILL + max(multiply, fetch, steps * LATENCY / (config.stages - 1))),
        (work.map_bytes + work.weight_bytes) / (card.dram_gb_s * 1e9 * DRAM_SHARE),
    )
    seconds = card.launch_us * 1e-6 + max(terms) + EXPOSED * (sum(terms) - max(terms))
    if config.splits == 1:
        return seconds
    read_again = 4 * config.splits * config.block_m * config.block_n / SM_L2_BYTES
    return seconds + MEETING + max(read_again, ceil_div(config.splits, 2) * LATENCY)


def resident(kernel, config: ConvConfig, card: Card) -> int:
    """Blocks that a multiprocessor holds at a time."""
    work = kernel.work(config)
    buffers = config.stages if asynchronous(card, config.block_m) else config.stages - 1
    return min(
        card.shared_sm_bytes // (shared_bytes(kernel, config, buffers) + KIB),
        REGISTERS_SM // (work.registers * 32 * config.warps),
        card.max_warps // config.warps,
    )


def matrix_share(config: ConvConfig, card: Card) -> float:
    """Of a card's peak: small tiles bring too many operands per product through shared memory."""
    reuse = config.block_m * config.block_n / (config.block_m + config.block_n)
    older = 1.0 if asynchronous(card, config.block_m) else MMA_SHARE.get(card.capability, 1.0)
    return MATRIX_SHARE * older * min(1.0, reuse / 64)


def asynchronous(card: Card, block_m: int) -> bool:
    """Tensor cores that read both operands from shared memory: `wgmma`, `tcgen05`."""
    return card.capability in (90, 100) and block_m >= 64


def ceil_div(value: int, divisor: int) -> int:
    """Like `triton.cdiv`, which is made for kernels and slow here."""
    return -(-value // divisor)


def _power_of_2(value: int) -> int:
    """The least one that is not below a value."""
    return 1 << (value - 1).bit_length()
