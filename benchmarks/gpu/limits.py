"""What the card can do at most, measured: matrix products, copies in DRAM, reads from the L2 cache."""

import time
from collections.abc import Callable

import triton
import triton.language as tl

SIZE = 8192  # of the square product: large enough for the highest rate, small enough for every card
COPY_BYTES = 1 << 30
BLOCK = 1024  # elements that one program reads at a time: two loads of 16 bytes in each of 128 threads
PROGRAMS = 12  # per multiprocessor, as many as every card since sm_80 runs at once: 48 KiB are on their way
ROUNDS = 2  # how often a program reads the whole buffer


@triton.jit
def read_again(
    x,  # BLOCKS * BLOCK elements
    out,  # one per program: without it the compiler would leave the reads out
    BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program reads the whole buffer, each beginning elsewhere, past the first-level cache."""
    first = tl.program_id(0) * 37
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(BLOCKS * ROUNDS):
        at = (first + step) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x + at, cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total))


def measured(suite, precision: str) -> dict:
    """``tflops``, ``dram_gb_s`` (read and written), ``l2_gb_s`` (read), and how they were measured."""
    import torch

    size, copied = (64, 1 << 16) if suite.dry else (SIZE, COPY_BYTES)
    return {
        "tflops": _product(suite, size, {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]),
        "dram_gb_s": _copy(suite, copied),
        "l2_gb_s": _l2(suite),
        "how": f"{size}^3 product of random numbers; copy of {copied >> 20} MiB; reads of a third of the L2 cache",
    }


def _product(suite, size: int, kind) -> float:
    """TFLOP/s; of random numbers, since cards draw less power and clock higher on zeros."""
    import torch

    a, b = (torch.randn(size, size, device=suite.device, dtype=kind) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / seconds(suite, lambda: torch.mm(a, b, out=product), 5) * 1e-12


def _copy(suite, copied: int) -> float:
    """GB/s, read and written."""
    import torch

    source = torch.randn(copied // 4, device=suite.device)
    target = torch.empty_like(source)
    return 2 * copied / seconds(suite, lambda: target.copy_(source), 5) * 1e-9


def _l2(suite) -> float:
    """GB/s of so many programs that no latency is seen, each of which reads the same buffer."""
    import torch

    blocks, rounds = suite.card.l2_bytes // 3 // (4 * BLOCK), ROUNDS
    programs = PROGRAMS * suite.card.multiprocessors
    if suite.dry:
        blocks, rounds, programs = 2, 1, 2
    x = torch.randn(blocks * BLOCK, device=suite.device)
    out = torch.empty(programs, device=suite.device)
    taken = seconds(suite, lambda: read_again[(programs,)](x, out, blocks, rounds, BLOCK), 3)
    return programs * rounds * blocks * BLOCK * 4 / taken * 1e-9


def seconds(suite, call: Callable[[], object], repeats: int) -> float:
    """Of one call: on the GPU in a graph of ``repeats``, in a dry run by the CPU's clock."""
    if suite.dry:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    from rd_deploy.cuda.tune import measure

    return measure(lambda index: call(), repeats) * 1e-6
