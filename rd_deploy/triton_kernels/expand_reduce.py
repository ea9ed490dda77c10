"""Two 1x1 convolutions as one kernel, so that the wide map between them never leaves the multiprocessor."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Conv
from rd_deploy.common import UserError
from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import KIB, Card
from rd_deploy.triton_kernels.cost import BlockCost, Prediction, is_asynchronous
from rd_deploy.triton_kernels.launch import ELEMENT, INTERPRETED, Launch, Work, begin, check_size, dot, relu

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
LINE: tl.constexpr = tl.constexpr(64)  # elements of a line of 128 bytes
LINES: tl.constexpr = tl.constexpr(128)


@triton.jit
def expand_and_reduce(
    t,  # (BM, C)
    y,  # (BM, BN) fp32, to add to
    w2,  # (C, HIDDEN)
    b2,  # (HIDDEN)
    w3_at,  # (BH, BN) pointers to the first rows of w3
    first,
    last,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y + relu(t @ w2 + b2) @ w3`` over hidden channels ``first`` to ``last``, ``BH`` at a time."""
    h = tl.arange(0, BH)
    w2_at = w2 + tl.arange(0, C)[:, None] * HIDDEN + h[None, :]
    for j in tl.range(first, last, BH, num_stages=STAGES):
        wide = dot(t, tl.load(w2_at + j), tl.zeros([t.shape[0], BH], tl.float32))
        wide = relu(wide + tl.load(b2 + j + h)[None, :]).to(t.dtype)
        y = dot(wide, tl.load(w3_at + j * OUT), y)
    return y


@triton.jit
def into_l2(weights, SIZE: tl.constexpr):
    """Ask for ``SIZE`` elements to be brought into the L2 cache, all blocks together, and do not wait."""
    if not _INTERPRETED:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        blocks = tl.num_programs(0) * tl.num_programs(1)
        for first in range(block * LINES, (SIZE + LINE - 1) // LINE, blocks * LINES):
            at = tl.minimum((first + tl.arange(0, LINES)) * LINE, SIZE - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [(weights + at).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit(do_not_specialize=["M"])
def expand_reduce(
    x,  # (M, C), M pixels in all
    w2,  # (C, HIDDEN)
    b2,  # (HIDDEN)
    w3,  # (HIDDEN, OUT)
    b3,  # (OUT)
    out,  # (M, OUT)
    partial,  # (tiles, SPLIT, BM, BN) fp32; None: SPLIT is 1
    counters,  # (tiles), zero before and after; None: SPLIT is 1
    M,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,  # pixels per block
    BN: tl.constexpr,  # outputs per block; every block of a pixel's outputs expands it again
    BH: tl.constexpr,  # hidden channels at a time
    SPLIT: tl.constexpr,  # blocks that share the hidden channels of a tile
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:  # weights are constants: their way from DRAM overlaps the kernel before
        into_l2(w2, C * HIDDEN)
        into_l2(w3, HIDDEN * OUT)
    begin(PDL)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    pixel = tile // (OUT // BN) * BM + m
    column = tile % (OUT // BN) * BN + n
    live = (pixel < M)[:, None]
    t = tl.load(x + pixel[:, None] * C + tl.arange(0, C)[None, :], mask=live, other=0.0)
    w3_at = w3 + tl.arange(0, BH)[:, None] * OUT + column[None, :]
    first = split * (HIDDEN // SPLIT)
    y = tl.zeros([BM, BN], tl.float32)
    y = expand_and_reduce(t, y, w2, b2, w3_at, first, first + HIDDEN // SPLIT, C, HIDDEN, OUT, BH, STAGES)

    out_at = out + pixel[:, None] * OUT + column[None, :]
    if SPLIT == 1:
        y = relu(y + tl.load(b3 + column)[None, :])
        tl.store(out_at, y.to(out.dtype.element_ty), mask=live)
    else:
        own = partial + tile * (SPLIT * BM * BN) + m[:, None] * BN + n[None, :]
        tl.store(own + split * (BM * BN), y)
        tl.debug_barrier()  # all threads have stored before one announces it
        if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            y = tl.zeros([BM, BN], tl.float32)
            for other in range(SPLIT):  # always in this order, whichever block came last
                y += tl.load(own + other * (BM * BN), cache_modifier=".cg")  # not what the L1 cache remembers
            y = relu(y + tl.load(b3 + column)[None, :])
            tl.store(out_at, y.to(out.dtype.element_ty), mask=live)
            tl.store(counters + tile, 0)


def repeats(block_m: int, warps: int) -> int:
    """How often a block expands each pixel: warps beyond one for 16 pixels repeat each other's wide map."""
    return max(1, 16 * warps // block_m)


def hidden_steps(hidden: int) -> tuple[int, ...]:
    """Powers of two that divide the hidden channels, 64 at most, the largest first: one of them at a time."""
    return tuple(step for step in (64, 32, 16) if hidden % step == 0)


@dataclass(frozen=True)
class ExpandReduceConfig:
    """Tiles of ``block_m`` pixels by ``block_n`` outputs, ``block_h`` hidden channels at a time, ``stages`` of them in
    flight; a tile's hidden channels shared by ``split`` blocks."""

    block_m: int
    block_n: int
    block_h: int
    stages: int
    warps: int
    split: int = 1


@dataclass(frozen=True)
class ExpandReduceKernel:
    """``relu(relu(x @ w2 + b2) @ w3 + b3)``: 1x1 convolutions of (N, H, W, C) to ``hidden`` and to (N, H, W, outputs).

    With C outputs and 4·C hidden channels, per pixel and in fp16: 16·C² FLOP, 4·C bytes of DRAM (layer by layer
    20·C), so 4·C FLOP/B: 256 for C = 64, 2048 for C = 512, against 266 that an H100 needs to be busy. A block of BM
    pixels asks the L2 cache for all 16·C² bytes of weights: about BM FLOP/B, where 145 are needed, and 23 B of every
    cycle. Hence BM = 128 where there are pixels enough; in front of that limit stand the waves:

    | C, map | blocks of 128 pixels (waves on 132) for batch 1, 32, 128 | limit |
    |---|---|---|
    | 64, 56x56 | 25, 784 (5.9), 3136 (23.8) | L2, DRAM |
    | 128, 28x28 | 7, 196 (1.5), 784 (5.9) | L2, waves |
    | 256, 14x14 | 2, 49 (0.4), 196 (1.5) | waves |
    | 512, 7x7 | 1, 13 (0.1), 49 (0.4) | waves: 64 pixels and half the outputs, then 50, 196 |

    So small batches share hidden channels: ``split`` blocks each read 1/split of the weights, and the last one sums
    split · BM · BN fp32 partial sums alone, at about 10 µs per MB, which is why splits are few. Splitting outputs
    instead repeats the expand: 1.5 times the products for halves.
    """

    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    outputs: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def check(self) -> None:
        check_widths(self.channels, self.hidden, self.outputs, 512)
        check_size(self.pixels * max(self.channels, self.outputs))

    def configs(self, card: Card) -> tuple[ExpandReduceConfig, ...]:
        times = {config: self.predict(config, card).us for config in self.candidates(card)}
        return cost.best(
            times,
            alike=lambda config: (config.block_m, config.block_n, config.split),
            same=lambda config: (config.block_m, config.block_n, config.warps, config.block_h, config.split),
        )

    def candidates(self, card: Card) -> Iterator[ExpandReduceConfig]:
        """All configurations that fit a card."""
        tiles = ((128, 8), (64, 4), (64, 8), (32, 2), (32, 4), (16, 1), (16, 4))
        widths = [n for n in (512, 256, 128, 64, 32, 16) if n <= self.outputs and (n == self.outputs or n >= 64)]
        splits = (1, 2, 4, 8, 16)
        for (block_m, warps), block_n, block_h, stages, split in itertools.product(
            tiles, widths, hidden_steps(self.hidden), (2, 3, 4), splits
        ):
            config = ExpandReduceConfig(block_m, block_n, block_h, stages, warps, split)
            if self.is_sensible(config, card) and self.fits(config, card):
                yield config

    def is_sensible(self, config: ExpandReduceConfig, card: Card) -> bool:
        """No tile larger than the map, no stage without work, and more blocks only for a card that is left idle."""
        steps = self.hidden // config.block_h
        blocks = self.tiles(config) * config.split
        widest = 256 if is_asynchronous(card, config.block_m) else 128  # that registers hold beside the rest
        return (
            config.block_m <= max(64, triton.next_power_of_2(self.pixels))
            and steps % config.split == 0
            and config.stages <= max(2, steps // config.split)
            and (config.split == 1 or blocks <= 2 * card.multiprocessors)
            and (config.block_n >= min(self.outputs, widest) or blocks <= 4 * card.multiprocessors)
        )

    def fits(self, config: ExpandReduceConfig, card: Card) -> bool:
        """Within shared memory, and without spills."""
        is_async = is_asynchronous(card, config.block_m)
        part = 32 if card.capability == 100 else 64  # sm_100's assembler spills a few bytes to stay at 128 registers
        if config.split > 1 and config.block_m * config.block_n > part * 32 * config.warps:
            return False  # the last block holds a part beside its sum
        most = 200 if is_async or config.block_m < 16 * config.warps else 116 if card.capability == 120 else 140
        if card.capability == 90 and config.block_m == 64:
            most = 139  # one row of warps: more registers for addresses beside the sums
        return self.work(config).shared_bytes <= card.shared_bytes and self.sums(config, is_async) <= most

    def sums(self, config: ExpandReduceConfig, is_async: bool) -> float:
        """Registers of a thread that hold operands and sums; only `mma` keeps x in registers."""
        rows = config.block_m / (32 * config.warps)
        wide_rows = rows * repeats(config.block_m, config.warps)
        return rows * config.block_n + wide_rows * (1.5 * config.block_h + (0 if is_async else self.channels / 2))

    def predict(self, config: ExpandReduceConfig, card: Card) -> Prediction:
        is_async = is_asynchronous(card, config.block_m)
        steps = self.hidden // config.block_h // config.split
        readers = config.block_m // 64 if is_async else config.warps  # of a chunk of weights in shared memory
        chunk = 2 * config.block_h * (self.channels + config.block_n)
        traffic = 2 * 2 * config.block_m * self.channels + steps * (1 + readers) * chunk
        if is_async:  # x is read again for every chunk
            traffic += steps * 2 * config.block_m * self.channels
        expand = (
            self.channels * self.hidden * repeats(config.block_m, config.warps) * (1 + cost.NARROW / config.block_h)
        )
        products = config.block_m * (expand + self.hidden * config.block_n) / config.split
        waits = steps * max(cost.CHAIN, cost.LATENCY / (config.stages - 1))
        tile = 4 * config.block_m * config.block_n
        meeting = cost.MEETING + config.split * tile / cost.SM_L2_BYTES if config.split > 1 else 0
        block = BlockCost(2 * products, traffic, waits, cost.FILL, is_async, meeting)
        return cost.predict(self.work(config), block, card)

    def tiles(self, config: ExpandReduceConfig) -> int:
        return triton.cdiv(self.pixels, config.block_m) * (self.outputs // config.block_n)

    def launch(self, config: ExpandReduceConfig, pdl: bool = False) -> Launch:
        scratch = {name: kind for name, (kind, _) in self.scratch(config).items()}
        absent = {name: None for name in ("partial", "counters") if name not in scratch}
        maps = {"x": ELEMENT, "w2": ELEMENT, "b2": "fp32", "w3": ELEMENT, "b3": "fp32", "out": ELEMENT}
        return Launch(
            expand_reduce,
            (self.tiles(config), config.split),
            maps | scratch,
            {"M": self.pixels},
            {
                **{"C": self.channels, "HIDDEN": self.hidden, "OUT": self.outputs},
                **{"BM": config.block_m, "BN": config.block_n, "BH": config.block_h, "SPLIT": config.split},
                **{"STAGES": config.stages, "PDL": pdl},
                **absent,
            },
            config.warps,
        )

    def work(self, config: ExpandReduceConfig) -> Work:
        tiles, columns = self.tiles(config), self.outputs // config.block_n
        rows = triton.cdiv(self.pixels, config.block_m) * config.block_m
        expand, reduce = self.channels * self.hidden, self.hidden * self.outputs
        weight_bytes = 2 * (expand + reduce) + 4 * (self.hidden + self.outputs)
        read, written = 2 * self.pixels * self.channels, 2 * self.pixels * self.outputs
        tile_weights = 2 * expand + 4 * self.hidden + (2 * reduce + 4 * self.outputs) // columns
        partial = 2 * 4 * tiles * config.split * config.block_m * config.block_n if config.split > 1 else 0
        x_tile, tile = config.block_m * self.channels, config.block_m * config.block_n
        loads = config.stages * (2 * config.block_h * (self.channels + config.block_n) + 4 * config.block_h)
        wide = 2 * config.block_m * config.block_h
        return Work(
            flops=2 * self.pixels * (expand + reduce),
            issued_flops=2 * rows * (columns * repeats(config.block_m, config.warps) * expand + reduce),
            map_bytes=read + written,
            weight_bytes=weight_bytes,
            l2_bytes=columns * config.split * read + tiles * tile_weights + written + partial,
            blocks=tiles * config.split,
            warps=config.warps,
            shared_bytes=max(2 * x_tile + loads + wide, (4 if config.split > 1 else 2) * tile) + KIB,
            registers=min(255, 32 + int(self.sums(config, config.block_m >= 64))),
        )

    def scratch(self, config: ExpandReduceConfig) -> dict[str, tuple[str, int]]:
        if config.split == 1:
            return {}
        tiles = self.tiles(config)
        partial = tiles * config.split * config.block_m * config.block_n
        return {"partial": ("fp32", partial), "counters": ("i32", tiles)}

    def weights(self, expand: Conv, reduce: Conv) -> dict[str, np.ndarray]:
        return pointwise_weights(expand, reduce)

    def reference(self, x, w2, b2, w3, b3):
        """The same in torch: x (N, H, W, C), the rest as `weights` packs them."""
        return ((x @ w2 + b2).relu() @ w3 + b3).relu()


def pointwise_weights(expand: Conv, reduce: Conv) -> dict[str, np.ndarray]:
    """w2, b2, w3, b3, float32, a matrix's rows being input channels."""
    w2, w3 = (step.weight[:, :, 0, 0].T for step in (expand, reduce))
    packed = {"w2": w2, "b2": expand.bias, "w3": w3, "b3": reduce.bias}
    return {name: np.ascontiguousarray(values, np.float32) for name, values in packed.items()}


def check_widths(channels: int, hidden: int, outputs: int, most_channels: int) -> None:
    for what, value, most in (("channels", channels, most_channels), ("outputs", outputs, 512)):
        if not 16 <= value <= most or value & (value - 1):
            raise UserError(f"{value} {what}: a fused bottleneck takes powers of two from 16 to {most}")
    if hidden < 16 or hidden % 16:
        raise UserError(f"{hidden} hidden channels: a fused bottleneck takes multiples of 16")
