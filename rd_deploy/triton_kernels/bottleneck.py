"""The step of a plain bottleneck network as one kernel: 3x3, expand, reduce, each with its bias and ReLU."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Conv
from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import KIB, Card
from rd_deploy.triton_kernels.cost import BlockCost, Prediction, is_asynchronous
from rd_deploy.triton_kernels.expand_reduce import (
    check_widths,
    expand_and_reduce,
    hidden_steps,
    into_l2,
    pointwise_weights,
    repeats,
)
from rd_deploy.triton_kernels.launch import ELEMENT, Launch, Work, begin, check_size, dot, relu

# (block_m, warps): 16 pixels a warp; 32 halve what weights cost in shared memory, 8 save registers and repeat products.
TILES = ((256, 8), (128, 8), (128, 4), (64, 4), (32, 2), (16, 1), (64, 8), (32, 4))
STAGES = ((4, 3), (3, 3), (3, 2), (2, 2), (4, 4))  # of the 3x3, of expand and reduce


@triton.jit(do_not_specialize=["M"])
def bottleneck(
    x,  # (N, H, W, C)
    w1,  # (9, C, C): tap 3·kh + kw, input channel, output channel
    b1,  # (C)
    w2,  # (C, HIDDEN)
    b2,  # (HIDDEN)
    w3,  # (HIDDEN, OUT)
    b3,  # (OUT)
    out,  # (M, OUT), M pixels in all
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,  # output pixels per block, of all images
    BK: tl.constexpr,  # input channels at a time; divides C
    BH: tl.constexpr,  # hidden channels at a time; divides HIDDEN
    L1: tl.constexpr,  # fetch x through the L1 cache, so that eight of nine taps come from there
    EARLY: tl.constexpr,  # fetch the first hidden channels' weights before all else
    CONV_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    k = tl.arange(0, BK)
    c = tl.arange(0, C)
    h = tl.arange(0, BH)
    n = tl.arange(0, OUT)
    w3_at = w3 + h[:, None] * OUT + n[None, :]
    if EARLY:
        early2 = tl.load(w2 + c[:, None] * HIDDEN + h[None, :])
        early3 = tl.load(w3_at)
    if PDL:  # weights are constants: their way from DRAM overlaps the kernel before
        into_l2(w1, 9 * C * C)
        into_l2(w2, C * HIDDEN)
        into_l2(w3, HIDDEN * OUT)
    begin(PDL)

    # 3x3: a product of depth 9·C.
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    live = pixel < M
    row = pixel // OW % OH * STRIDE - 1
    left = pixel % OW * STRIDE - 1
    corner = (pixel // (OH * OW) * H + row) * W + left
    x_at = x + corner[:, None] * C + k[None, :]
    if L1:
        # Adds 0, which the compiler cannot know: to it x is aligned to 8 bytes only. Copies of 16 bytes into shared
        # memory pass by the L1 cache (cp.async.cg), those of 8 go through it (cp.async.ca).
        x_at += (M >> 31) * 4
    w1_at = w1 + k[:, None] * C + c[None, :]
    t = tl.zeros([BM, C], tl.float32)
    for step in tl.range(0, 9 * (C // BK), num_stages=CONV_STAGES):
        if L1:  # what one tap fetched is still near when the next one asks
            tap = step % 9
            channel = step // 9 * BK
        else:  # the order with fewer registers
            tap = step // (C // BK)
            channel = step % (C // BK) * BK
        kh = tap // 3
        kw = tap % 3
        inside = live & (row + kh >= 0) & (row + kh < H) & (left + kw >= 0) & (left + kw < W)
        a = tl.load(x_at + ((kh * W + kw) * C + channel), mask=inside[:, None], other=0.0)
        t = dot(a, tl.load(w1_at + (tap * C + channel) * C), t)
    t = relu(t + tl.load(b1 + c)[None, :]).to(x.dtype.element_ty)

    y = tl.zeros([BM, OUT], tl.float32)
    if EARLY:
        wide = dot(t, early2, tl.zeros([BM, BH], tl.float32))
        wide = relu(wide + tl.load(b2 + h)[None, :]).to(x.dtype.element_ty)
        y = dot(wide, early3, y)
    y = expand_and_reduce(t, y, w2, b2, w3_at, BH if EARLY else 0, HIDDEN, C, HIDDEN, OUT, BH, STAGES)
    y = relu(y + tl.load(b3 + n)[None, :])
    tl.store(out + pixel[:, None] * OUT + n[None, :], y.to(out.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True)
class BottleneckConfig:
    """Tiles of ``block_m`` pixels; ``block_k`` input and ``block_h`` hidden channels at a time, ``conv_stages`` and
    ``stages`` of them in flight. ``l1``, ``early``: 1 to fetch x through the L1 cache, the first weights first."""

    block_m: int
    block_k: int
    block_h: int
    conv_stages: int
    stages: int
    warps: int
    l1: int = 1
    early: int = 0


@dataclass(frozen=True)
class BottleneckKernel:
    """``relu(relu(relu(conv3x3(x) + b1) @ w2 + b2) @ w3 + b3)``: (N, H, W, C) to (N, OH, OW, outputs), padding 1.

    With C outputs and 4·C hidden channels, per pixel and in fp16: 34·C² FLOP and 4·C bytes of DRAM (24·C layer by
    layer), so 8.5·C FLOP/B: 544 for C = 64, 2176 for C = 256, against 266 that an H100 needs to be busy. DRAM is not
    the limit then, the L2 cache is: a block of BM pixels asks it for 34·C² bytes of weights, and for 18·C bytes of x
    per pixel, nine taps; 145 FLOP/B are needed:

    | C | FLOP/B at L2: BM = 128 | BM = 256 | the same with taps from the L1 cache |
    |---|---|---|---|
    | 64 | 62 | 82 | 105, 191 |
    | 128 | 84 | 124 | 118, 224 |
    | 256 | 101 | 167 | 124, 240 |

    Hence ``l1``. Tiles of 256 pixels fit into registers for 64 channels only. Next is shared memory: for C = 64 the
    3x3 reads as much of it per product as there is bandwidth, and reaches 57% of the peak, for C = 128 80%.
    ``early`` has weights for the second loop at hand when the first has drained, where a multiprocessor has room
    for one block only. Blocks of 128 pixels (and waves on 132 multiprocessors, one each) for batch 1, 32 and 128:
    56x56 25, 784 (5.9), 3136 (23.8); 28x28 7, 196 (1.5), 784 (5.9); 14x14 2, 49 (0.4), 196 (1.5). So waves limit
    C = 256, and few pixels any C: there the layers one by one, each split over channels, are faster.
    """

    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    outputs: int
    stride: int

    @cached_property  # as the pixels: asked for as often as there are configurations
    def out_size(self) -> tuple[int, int]:
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    @cached_property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return self.batch * self.out_size[0] * self.out_size[1]

    def check(self) -> None:
        check_widths(self.channels, self.hidden, self.outputs, 256)
        check_size(max(self.batch * self.height * self.width * self.channels, self.pixels * self.outputs))

    def configs(self, card: Card) -> tuple[BottleneckConfig, ...]:
        times = {config: self.predict(config, card).us for config in self.candidates(card)}
        return cost.best(
            times,
            alike=lambda config: (config.block_m, config.warps, config.l1),
            same=lambda config: (config.block_m, config.warps, config.block_h, config.l1, config.early),
        )

    def candidates(self, card: Card) -> Iterator[BottleneckConfig]:
        """All configurations that fit a card."""
        depths = (64, 32) if self.channels >= 128 else (min(64, self.channels),)
        for (block_m, warps), block_k, block_h, stages, l1, early in itertools.product(
            TILES, depths, hidden_steps(self.hidden), STAGES, (1, 0), (1, 0)
        ):
            config = BottleneckConfig(block_m, block_k, block_h, *stages, warps, l1, early)
            if self.is_sensible(config, card) and self.fits(config, card):
                yield config

    def is_sensible(self, config: BottleneckConfig, card: Card) -> bool:
        """No tile far larger than the map, repeated products only where registers need the warps, and the older
        instruction on newer cards only for thin networks."""
        widest = max(self.channels, self.outputs)
        is_async = is_asynchronous(card, config.block_m)
        needs_warps = self.outputs >= 512 if is_async else widest >= 256
        return (
            config.block_m <= max(64, triton.next_power_of_2(self.pixels))
            and (repeats(config.block_m, config.warps) == 1 or needs_warps)
            and (is_async or card.capability not in (90, 100) or widest <= 32)
        )

    def fits(self, config: BottleneckConfig, card: Card) -> bool:
        """Within shared memory, and without spills: limits found by compiling for all cards."""
        sums, rows = self.sums(config), config.block_m / (32 * config.warps)
        if not is_asynchronous(card, config.block_m):  # here the early weights would stay in registers
            most = 110 if config.warps < 4 else 144 if rows > 0.5 else 172 if rows == 0.5 else 204
            short = config.l1 and config.block_h < 64 and rows == 0.5 and config.warps > 4 and self.channels >= 128
            alone = config.warps == 1 and max(self.channels, self.outputs) > 64
            allowed = sums <= most and not (config.early or short or alone)
        elif config.warps == 4 and rows == 0.5:  # each thread loads more of the weights
            allowed = sums <= (130 if config.early else 217) and (self.channels < 128 or config.block_h <= 32)
        else:
            most = 217 if rows <= 0.5 else 150 if config.early and config.warps == 4 else 200
            allowed = sums <= most and not (config.early and self.outputs >= 512)
        return allowed and self.work(config).shared_bytes <= card.shared_bytes

    def sums(self, config: BottleneckConfig) -> float:
        """Registers of a thread that hold sums and the narrow and the wide map as operands."""
        rows = config.block_m / (32 * config.warps)
        wide_rows = rows * repeats(config.block_m, config.warps)
        return rows * self.outputs + wide_rows * (1.5 * config.block_h + self.channels / 2)

    def predict(self, config: BottleneckConfig, card: Card) -> Prediction:
        is_async = is_asynchronous(card, config.block_m)
        readers = config.block_m // 64 if is_async else config.warps  # of weights in shared memory
        c = self.channels
        conv_steps, steps = 9 * c // config.block_k, self.hidden // config.block_h
        traffic = 9 * c * 2 * (config.block_m * (3 if config.l1 else 2) + (1 + readers) * c)
        traffic += self.hidden * 2 * (1 + readers) * (c + self.outputs)
        expand = c * self.hidden * repeats(config.block_m, config.warps) * (1 + cost.NARROW / config.block_h)
        products = config.block_m * (9 * c * c + expand + self.hidden * self.outputs)
        waits = conv_steps * cost.LATENCY / (config.conv_stages - 1) / (2 if config.l1 else 1)
        waits += steps * max(cost.CHAIN, cost.LATENCY / (config.stages - 1))
        fill = cost.FILL + (0 if config.early else cost.LATENCY)
        block = BlockCost(2 * products, traffic, waits, fill, is_async)
        return cost.predict(self.work(config), block, card)

    def launch(self, config: BottleneckConfig, pdl: bool = False) -> Launch:
        height, width = self.out_size
        return Launch(
            bottleneck,
            (triton.cdiv(self.pixels, config.block_m),),
            {
                **{"x": ELEMENT, "w1": ELEMENT, "b1": "fp32", "w2": ELEMENT, "b2": "fp32"},
                **{"w3": ELEMENT, "b3": "fp32", "out": ELEMENT},
            },
            {"M": self.pixels},
            {
                **{"H": self.height, "W": self.width, "OH": height, "OW": width, "STRIDE": self.stride},
                **{"C": self.channels, "HIDDEN": self.hidden, "OUT": self.outputs},
                **{"BM": config.block_m, "BK": config.block_k, "BH": config.block_h},
                **{"L1": bool(config.l1), "EARLY": bool(config.early)},
                **{"CONV_STAGES": config.conv_stages, "STAGES": config.stages, "PDL": pdl},
            },
            config.warps,
        )

    def work(self, config: BottleneckConfig) -> Work:
        c = self.channels
        blocks = triton.cdiv(self.pixels, config.block_m)
        conv, expand, reduce = 9 * c * c, c * self.hidden, self.hidden * self.outputs
        weight_bytes = 2 * (conv + expand + reduce) + 4 * (c + self.hidden + self.outputs)
        written = 2 * self.pixels * self.outputs
        chunk = 2 * config.block_h * (c + self.outputs)
        conv_loads = config.conv_stages * 2 * config.block_k * (config.block_m + c)
        # The narrow map too goes through shared memory where the tensor cores do not take it from registers.
        loads = config.stages * (chunk + 4 * config.block_h) + 2 * config.block_m * c
        out_tile = 2 * config.block_m * self.outputs
        return Work(
            flops=2 * self.pixels * (conv + expand + reduce),
            issued_flops=2 * blocks * config.block_m * (conv + repeats(config.block_m, config.warps) * expand + reduce),
            map_bytes=2 * self.batch * self.height * self.width * c + written,
            weight_bytes=weight_bytes,
            l2_bytes=2 * c * self.fetched(config) + blocks * weight_bytes + written,
            blocks=blocks,
            warps=config.warps,
            shared_bytes=max(conv_loads, loads, out_tile) + config.early * chunk + KIB,
            registers=min(255, 32 + int(self.sums(config))),
        )

    def fetched(self, config: BottleneckConfig) -> int:
        """Pixels of x that all blocks together ask of the L2 cache; padding is not fetched.

        Without the L1 cache each of nine taps; with it each pixel once in a block, as if nothing were evicted.
        """
        touched = _touched(self.height, self.width, self.stride, config.block_m if config.l1 else 1)
        return self.batch * touched

    def scratch(self, config: BottleneckConfig) -> dict[str, tuple[str, int]]:
        return {}

    def weights(self, conv: Conv, expand: Conv, reduce: Conv) -> dict[str, np.ndarray]:
        w1 = conv.weight.transpose(2, 3, 1, 0).reshape(9, self.channels, self.channels)
        w1, b1 = (np.ascontiguousarray(values, np.float32) for values in (w1, conv.bias))
        return {"w1": w1, "b1": b1} | pointwise_weights(expand, reduce)

    def reference(self, x, w1, b1, w2, b2, w3, b3):
        """The same in torch: x (N, H, W, C), the rest as `weights` packs them."""
        import torch

        kernel = w1.reshape(3, 3, self.channels, self.channels).permute(3, 2, 0, 1)
        t = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, b1, self.stride, padding=1)
        return ((t.permute(0, 2, 3, 1).relu() @ w2 + b2).relu() @ w3 + b3).relu()


@lru_cache
def _touched(height: int, width: int, stride: int, block_m: int) -> int:
    """Pixels that the windows of an image read; those of a block's ``block_m`` windows count once."""
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    block = (np.arange(out_height * out_width) // block_m).reshape(out_height, out_width, 1, 1)
    tap = np.arange(3) - 1
    row = (np.arange(out_height) * stride)[:, None, None, None] + tap[:, None]
    column = (np.arange(out_width) * stride)[:, None, None] + tap
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return len(np.unique(((block * height + row) * width + column)[inside]))
