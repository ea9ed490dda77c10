"""How long a launch should take on a card: the one model that ranks configurations and predicts whole networks.

A launch of B blocks on S multiprocessors, of which the fullest has ``share`` = ceil(B / S), takes its launch and the
longest of five terms, plus a tenth of what should hide behind it:

- arithmetic: share · what a block multiplies / what a multiprocessor's tensor cores reach;
- L2: share · what a block asks of the L2 cache / a multiprocessor's part of its bandwidth;
- shared memory: share · a block's traffic / 128 bytes a cycle;
- latency: rounds · (a block's fill and drain + the longest chain of waits in it), blocks side by side hiding nothing;
- DRAM: weights, and maps that the L2 cache cannot have kept, / the card's bandwidth.

The constants are guesses from published micro-benchmarks until a card says better (docs/gpu.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rd_deploy.triton_kernels.cards import KIB, Card
from rd_deploy.triton_kernels.launch import Work

MATRIX_SHARE = 0.75  # of the tensor cores' peak, in the main loop of a large tile
MMA_SHARE = {9: 0.6, 10: 0.3}  # of that, by `mma`, the instruction of older GPUs; by the capability's major number
DRAM_SHARE = 0.85
EXPOSED = 0.1  # of what should hide behind the longest term
RESIDENT_SHARE = 0.5  # of the L2 cache: maps below this are still there from the step before
SM_L2_BYTES = 100e9  # a second: the most that one multiprocessor has of the L2 cache's bandwidth
SM_SHARED_BYTES = 200e9  # of its shared memory: 128 bytes a cycle
REGISTERS_SM = 65536
LATENCY = 0.8e-6  # s: of a load that misses the L1 cache, under load
CHAIN = 0.25e-6  # s: of one step of [expand, reduce]: two products and a ReLU that wait for each other
NARROW = 16  # a product of n columns takes as long as one of n + 16 at the peak
FILL = 1.2e-6  # s: of a block: its first loads, and its last stores
MEETING = 1.5e-6  # s: of blocks that share a sum: store, announce, read again

KEPT = 8  # configurations of a kernel worth timing
KEPT_WITHIN = 2.0  # times the best one's modelled time
KEPT_ALIKE = 2  # of those whose tiles are the same: a model that errs about one of them errs about all


@dataclass(frozen=True)
class BlockCost:
    """What one block takes: ``flops`` at the tensor cores' full rate, bytes through shared memory, seconds of ``waits``
    in a chain that nothing else in the block hides but that overlap its loads, seconds of ``fill`` before and after.

    ``asynchronous``: by tensor cores that read operands from shared memory. ``alone``: seconds of one block after all
    others are done.
    """

    flops: float = 0.0
    shared_traffic: float = 0.0
    waits: float = 0.0
    fill: float = FILL
    asynchronous: bool = True
    alone: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """``us``: microseconds of a launch in the middle of a CUDA graph. ``limit``: the longest term, or "launch".

    ``per_sm``: blocks that a multiprocessor holds at once; ``waves``: blocks / all that the card holds.
    """

    us: float
    limit: str
    per_sm: int
    waves: float


def predict(work: Work, block: BlockCost, card: Card) -> Prediction:
    """Time of one launch by the model above."""
    sms = card.multiprocessors
    share = ceil_div(work.blocks, sms)
    held = per_sm(work, card)
    together = min(share, held)
    share_of_peak = MATRIX_SHARE if block.asynchronous else MATRIX_SHARE * MMA_SHARE.get(card.capability // 10, 1.0)
    matrix = card.tflops * 1e12 / sms * share_of_peak
    multiply = block.flops / (matrix * min(1.0, together * work.warps / 4))  # a multiprocessor has four tensor cores
    fetch = work.l2_bytes / work.blocks / min(SM_L2_BYTES, card.l2_gb_s * 1e9 / min(sms, work.blocks))
    shared = block.shared_traffic / SM_SHARED_BYTES
    within = {"arithmetic": multiply, "L2": fetch, "shared memory": shared, "latency": block.waits}
    slowest = max(within, key=within.get)
    terms = {
        "arithmetic": share * multiply,
        "L2": share * fetch,
        "shared memory": share * shared,
        "latency": ceil_div(share, together) * (block.fill + within[slowest]),
        "DRAM": dram_bytes(work, card) / (card.dram_gb_s * 1e9 * DRAM_SHARE),
    }
    limit = max(terms, key=terms.get)
    seconds = terms[limit] + EXPOSED * (sum(terms.values()) - terms[limit]) + block.alone
    us = card.launch_us + seconds * 1e6
    if limit == "latency" and within[slowest] > block.fill:  # what each block mostly does, one round after the other
        limit = slowest
    return Prediction(us, limit if us > 2 * card.launch_us else "launch", held, work.blocks / (held * sms))


def dram_bytes(work: Work, card: Card) -> int:
    """Bytes that the L2 cache cannot have kept: weights always (a network's nearly fill it), maps if they are large."""
    return work.weight_bytes + (work.map_bytes if work.map_bytes > card.l2_bytes * RESIDENT_SHARE else 0)


def per_sm(work: Work, card: Card) -> int:
    """Blocks on one multiprocessor at once, by shared memory, warps and registers; at least 1."""
    by_shared = card.shared_sm_bytes // (work.shared_bytes + KIB)  # CUDA keeps 1 KiB of every block for itself
    by_registers = REGISTERS_SM // (max(work.registers, 1) * 32 * work.warps)
    return max(1, min(by_shared, by_registers, card.max_warps // work.warps))


def is_asynchronous(card: Card, block_m: int) -> bool:
    """Whether a product of so many rows uses tensor cores that read operands from shared memory: `wgmma`, `tcgen05`."""
    return card.capability // 10 in (9, 10) and block_m >= 64


def best(times: dict[Any, float], alike: Callable[[Any], Any], same: Callable[[Any], Any] | None = None) -> tuple:
    """The configurations with the least modelled time, the best first: few that are ``alike``, no two the ``same``."""
    limit = KEPT_WITHIN * min(times.values(), default=0.0)
    kept: list = []
    for config in sorted((config for config in times if times[config] <= limit), key=times.get):
        twins = same is not None and any(same(config) == same(other) for other in kept)
        if not twins and sum(alike(config) == alike(other) for other in kept) < KEPT_ALIKE:
            kept.append(config)
    return tuple(kept[:KEPT])


def ceil_div(value: int, divisor: int) -> int:
    """Like `triton.cdiv`, which is made for kernels and slow here."""
    return -(-value // divisor)
