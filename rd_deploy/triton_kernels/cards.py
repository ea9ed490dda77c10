"""The GPUs that a plan can be made for: what bounds a kernel on each.

Peak rates are the vendor's (dense fp16 with fp32 sums; DRAM), except where a measured figure is named. They steer the
choice of kernels and the predictions; what a card really does, `benchmarks/gpu_suite.py` measures.
"""

from dataclasses import dataclass

from rd_deploy.common import UserError, nearest


@dataclass(frozen=True)
class Card:
    """``capability``: 90 for sm_90. ``tflops``: dense fp16, fp32 sums. Bandwidths in GB/s. ``shared_bytes``: the most
    one block may have, ``shared_sm_bytes``: of a multiprocessor; ``launch_us``: from one small kernel's end to the
    next one's first work within a CUDA graph.
    """

    name: str
    capability: int
    multiprocessors: int
    tflops: float
    dram_gb_s: float
    l2_gb_s: float
    l2_bytes: int
    shared_bytes: int
    shared_sm_bytes: int
    max_warps: int
    launch_us: float = 2.0


KIB, MIB = 1 << 10, 1 << 20
# NVIDIA's architecture white papers and data sheets. The H100's TFLOP/s and DRAM are measured (8192^3 bf16 product on
# random data; device-to-device copy); L2 bandwidths are estimates from published micro-benchmarks.
CARDS = {
    card.name: card
    for card in (
        Card("a100", 80, 108, 312, 2039, 4000, 40 * MIB, 163 * KIB, 164 * KIB, 64),
        Card("l4", 89, 58, 121, 300, 1500, 48 * MIB, 99 * KIB, 100 * KIB, 48),
        Card("rtx4090", 89, 128, 165, 1008, 4000, 72 * MIB, 99 * KIB, 100 * KIB, 48),
        Card("h100", 90, 132, 798, 3000, 5500, 50 * MIB, 227 * KIB, 228 * KIB, 64),
        Card("h200", 90, 132, 798, 4300, 5500, 50 * MIB, 227 * KIB, 228 * KIB, 64),
        Card("b200", 100, 148, 2250, 8000, 10000, 126 * MIB, 227 * KIB, 228 * KIB, 64),
        Card("rtx5090", 120, 170, 209, 1792, 6000, 96 * MIB, 99 * KIB, 100 * KIB, 48),
    )
}


def get_card(name: str) -> Card:
    """The card of a name; an unknown one is a `UserError` with the nearest."""
    if name not in CARDS:
        raise UserError(f"unknown card '{name}'{nearest(name, CARDS)}")
    return CARDS[name]
