"""The end of a bottleneck network as one kernel: the last 1x1 convolution and the mean over all pixels. The wide map
between them never exists, and nothing is rounded between the products and the mean, which layer by layer is.

A block multiplies tiles of ``images x pixels`` rows, the same pixels of each image, one group of pixels after another,
and adds up the ReLU's outputs element by element in registers; rows of one image meet once, at the end. So 49 pixels
need not fill tiles of 64: groups of 4 waste 6%, of 8 14%, of 64, which one image alone must take, 31%. A flat tile that
straddles images would waste as little, but had to sort its rows by image, by selections for each or by another product,
in which what is not a number in one image would reach all others. Every sum has one order: results repeat exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Conv, GlobalAveragePool
from rd_deploy.common import UserError
from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import KIB, Card
from rd_deploy.triton_kernels.conv import WEIGHT_COLUMNS, WEIGHT_ROWS
from rd_deploy.triton_kernels.launch import ELEMENT, MAX_ELEMENTS, Launch, Work, begin, dot, relu

# (block_m, block_n, warps): a thread holds 64 sums of products and 64 of pixels at most.
TILES = (
    *((128, 128, 8), (128, 64, 4), (128, 32, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4)),
    *((32, 64, 4), (32, 32, 4), (16, 64, 4), (16, 32, 4), (16, 16, 4)),
)
STAGES = (2, 3, 4, 6)


@triton.jit(do_not_specialize=["N"])
def expand_pool(
    x,  # (N, P, C)
    w,  # (ROWS, COLUMNS): row input channel, column output channel, zeros beyond
    b,  # (COLUMNS)
    out,  # (N, OUT)
    N,
    P: tl.constexpr,  # pixels of an image
    C: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    IMAGES: tl.constexpr,  # per tile
    PIXELS: tl.constexpr,  # of each image, per tile
    BN: tl.constexpr,  # output channels per block
    BK: tl.constexpr,  # input channels per step
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    BM: tl.constexpr = IMAGES * PIXELS
    tiles_n: tl.constexpr = (OUT + BN - 1) // BN
    first = tl.program_id(0) // tiles_n * IMAGES
    column = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    bias = tl.load(b + column, mask=column < COLUMNS, other=0.0)[None, :]
    begin(PDL)
    row = tl.arange(0, BM)
    k = tl.arange(0, BK)
    image = first + row // PIXELS
    x_at = x + (image * P + row % PIXELS)[:, None] * C + k[None, :]
    w_at = w + k[:, None] * COLUMNS + column[None, :]

    depth: tl.constexpr = (C + BK - 1) // BK
    groups: tl.constexpr = (P + PIXELS - 1) // PIXELS
    total = tl.zeros([BM, BN], tl.float32)
    acc = tl.zeros([BM, BN], tl.float32) + bias
    # One loop over groups and channels, so that the next group's first tiles are loaded while this one's last multiply.
    for step in tl.range(0, groups * depth, num_stages=STAGES):
        pixel = step // depth * PIXELS
        channel = step % depth * BK
        live = (image < N) & (pixel + row % PIXELS < P)
        mask = live[:, None]
        if C % BK > 0:
            mask = mask & (channel + k < C)[None, :]
        a = tl.load(x_at + (pixel * C + channel), mask=mask, other=0.0)
        if COLUMNS % BN == 0:
            weight = tl.load(w_at + channel * COLUMNS)
        else:
            weight = tl.load(w_at + channel * COLUMNS, mask=(column < COLUMNS)[None, :], other=0.0)
        acc = dot(a, weight, acc)
        if step % depth == depth - 1:
            total += tl.where(live[:, None], relu(acc), 0.0)
            acc = tl.zeros([BM, BN], tl.float32) + bias

    mean = tl.sum(tl.reshape(total, [IMAGES, PIXELS, BN]), axis=1) / P
    image = first + tl.arange(0, IMAGES)
    live = (image < N)[:, None] & (column < OUT)[None, :]
    tl.store(out + image[:, None] * OUT + column[None, :], mean.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class ExpandPoolConfig:
    """Tiles of the same ``pixels`` of ``images`` by ``block_n`` outputs, ``block_k`` products deep per step."""

    images: int
    pixels: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    @property
    def block_m(self) -> int:
        return self.images * self.pixels


@dataclass(frozen=True)
class ExpandPoolKernel:
    """(N, H, W, C) to (N, 1, 1, outputs).

    For 7x7x512 to 2048, on 132 multiprocessors: 103 MFLOP and 50 KB of maps per image instead of 450 KB. Batch 1: 64 or
    128 blocks of 32 or 16 outputs, one wave, bound by the wait for eight steps. Batch 32: 128 blocks, 1.31 times the
    products since groups of 32 pixels keep tiles large. Batch 256: 128 blocks of 32 images, 1.06 times the products,
    and bound by the L2 cache: weights are read once per group of pixels, 425 MB in all, about 80 us against 45 us of
    arithmetic. Larger tiles would need too many registers: sums of pixels stay beside sums of products.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.height * self.width

    @property
    def columns(self) -> int:
        """Of the packed weights."""
        return triton.cdiv(self.outputs, WEIGHT_COLUMNS) * WEIGHT_COLUMNS

    def tiles(self, config: ExpandPoolConfig) -> tuple[int, int]:
        """Tiles of images, tiles of output channels."""
        return triton.cdiv(self.batch, config.images), triton.cdiv(self.outputs, config.block_n)

    def steps(self, config: ExpandPoolConfig) -> int:
        """Of a block's loop."""
        return triton.cdiv(self.pixels, config.pixels) * triton.cdiv(self.inputs, config.block_k)

    def check(self) -> None:
        weights = triton.cdiv(self.inputs, WEIGHT_ROWS) * WEIGHT_ROWS * self.columns
        if max(self.batch * self.pixels * self.inputs, self.batch * self.outputs, weights) >= MAX_ELEMENTS:
            raise UserError("a map or weight has 2^31 elements or more: use a smaller batch")

    def configs(self, card: Card) -> tuple[ExpandPoolConfig, ...]:
        """The least modelled time first."""
        times = {config: self.predict(config, card).us for config in self.candidates(card)}
        return cost.best(times, alike=lambda config: (config.block_m, config.block_n))

    def candidates(self, card: Card) -> Iterator[ExpandPoolConfig]:
        """All tiles that a card can hold, none larger than what it computes."""
        images, pixels, outputs = (
            triton.next_power_of_2(size) for size in (self.batch, self.pixels, max(16, self.outputs))
        )
        for block_m, block_n, warps in TILES:
            if block_n > outputs or block_m > max(16, images * pixels):
                continue
            block_k = min(64, max(16, triton.next_power_of_2(self.inputs)))
            for log in range(block_m.bit_length()):
                group = block_m >> log
                if group > max(pixels, 16) or 1 << log > images:
                    continue
                for stages in STAGES:
                    config = ExpandPoolConfig(1 << log, group, block_n, block_k, stages, warps)
                    if stages <= max(2, self.steps(config)) and self.work(config).shared_bytes <= card.shared_bytes:
                        yield config

    def predict(self, config: ExpandPoolConfig, card: Card) -> cost.Prediction:
        work, steps = self.work(config), self.steps(config)
        block = cost.BlockCost(
            flops=work.issued_flops / work.blocks,
            shared_traffic=steps * 2 * 2 * (config.block_m + config.block_n) * config.block_k,  # written, read
            waits=steps * cost.LATENCY / (config.stages - 1),
            asynchronous=cost.is_asynchronous(card, config.block_m),
        )
        return cost.predict(work, block, card)

    def shared_bytes(self, config: ExpandPoolConfig) -> int:
        """At most, of one block: tiles of both operands, in whose place rows of one image meet at the end."""
        tiles = config.stages * 2 * (config.block_m + config.block_n) * config.block_k
        return max(tiles, 4 * config.block_m * config.block_n) + KIB

    def launch(self, config: ExpandPoolConfig, pdl: bool = False) -> Launch:
        return Launch(
            expand_pool,
            (math.prod(self.tiles(config)),),
            {"x": ELEMENT, "w": ELEMENT, "b": "fp32", "out": ELEMENT},
            {"N": self.batch},
            {
                **{"P": self.pixels, "C": self.inputs, "OUT": self.outputs, "COLUMNS": self.columns},
                **{"IMAGES": config.images, "PIXELS": config.pixels, "BN": config.block_n, "BK": config.block_k},
                **{"STAGES": config.stages, "PDL": pdl},
            },
            config.warps,
        )

    def work(self, config: ExpandPoolConfig) -> Work:
        tiles_m, tiles_n = self.tiles(config)
        blocks = tiles_m * tiles_n
        read, written = self.batch * self.pixels * self.inputs, self.batch * self.outputs
        deep = triton.cdiv(self.inputs, config.block_k) * config.block_k
        groups = self.steps(config) * config.block_k // deep
        sums = 2 * config.block_m * config.block_n // (32 * config.warps)
        return Work(
            flops=2 * read * self.outputs,
            issued_flops=2 * blocks * groups * config.block_m * config.block_n * deep,
            map_bytes=2 * (read + written),
            weight_bytes=2 * self.inputs * self.columns + 4 * self.columns,
            l2_bytes=2 * tiles_n * read
            + 2 * tiles_m * groups * deep * min(self.columns, tiles_n * config.block_n)
            + 4 * tiles_m * self.columns
            + 2 * written,
            blocks=blocks,
            warps=config.warps,
            shared_bytes=self.shared_bytes(config),
            registers=min(255, 50 + sums + sums // 4),
        )

    def scratch(self, config: ExpandPoolConfig) -> dict[str, tuple[str, int]]:
        return {}

    def weights(self, conv: Conv, pool: GlobalAveragePool) -> dict[str, np.ndarray]:
        rows = triton.cdiv(self.inputs, WEIGHT_ROWS) * WEIGHT_ROWS
        operands = {"w": np.zeros((rows, self.columns), np.float32), "b": np.zeros(self.columns, np.float32)}
        operands["w"][: self.inputs, : self.outputs] = conv.weight[:, :, 0, 0].T
        operands["b"][: self.outputs] = conv.bias
        return operands

    def reference(self, x, w, b):
        """The same in torch: x (N, H, W, C), w and b as `weights` packs them, to (N, 1, 1, outputs)."""
        y = x @ w[: self.inputs, : self.outputs] + b[: self.outputs]
        return y.relu().mean(dim=(1, 2), keepdim=True)
