"""Pooling as kernels of its own, for networks whose pools no convolution takes in."""

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Step
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.cost import BlockCost, Prediction, predict
from rd_deploy.triton_kernels.launch import ELEMENT, Launch, Work, begin, check_size


@triton.jit(do_not_specialize=["M"])
def max_pool(
    x,  # (N, H, W, C)
    out,  # (N, OH, OW, C), M pixels in all
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BM: tl.constexpr,  # output pixels per block
    BC: tl.constexpr,  # channels per block
    PDL: tl.constexpr,
):
    begin(PDL)
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    live = (pixel < M)[:, None] & (channel < C)[None, :]
    row = pixel // OW % OH * STRIDE - PADDING
    column = pixel % OW * STRIDE - PADDING
    corner = (pixel // (OH * OW) * H + row) * W + column
    best = tl.full([BM, BC], float("-inf"), tl.float32)
    for kh in range(KERNEL):
        for kw in range(KERNEL):
            inside = (row + kh >= 0) & (row + kh < H) & (column + kw >= 0) & (column + kw < W)
            at = (corner + kh * W + kw)[:, None] * C + channel[None, :]
            value = tl.load(x + at, mask=live & inside[:, None], other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + pixel[:, None] * C + channel[None, :], best.to(x.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class PoolConfig:
    block_m: int
    block_c: int
    warps: int


class _Pool:
    """What both pools offer: they multiply nothing and need nothing but their map."""

    def check(self) -> None:
        check_size(self.batch * self.height * self.width * self.channels)

    def predict(self, config: PoolConfig, card: Card) -> Prediction:
        return predict(self.work(config), BlockCost(), card)

    def scratch(self, config: PoolConfig) -> dict[str, tuple[str, int]]:
        return {}

    def weights(self, step: Step) -> dict[str, np.ndarray]:
        return {}


@dataclass(frozen=True)
class MaxPoolKernel(_Pool):
    """Max-pooling (N, H, W, C) to (N, OH, OW, C). Padding never wins.

    Bound by memory: H·W·C + OH·OW·C elements per image; overlapping windows are read again from the caches.
    """

    batch: int
    height: int
    width: int
    channels: int
    kernel: int
    stride: int
    padding: int

    @property
    def out_size(self) -> tuple[int, int]:
        reach = 2 * self.padding - self.kernel
        return (self.height + reach) // self.stride + 1, (self.width + reach) // self.stride + 1

    @property
    def pixels(self) -> int:
        return self.batch * self.out_size[0] * self.out_size[1]

    def configs(self, card: Card) -> tuple[PoolConfig, ...]:
        block_c = min(64, triton.next_power_of_2(self.channels))
        return tuple(PoolConfig(block_m, block_c, warps) for block_m, warps in ((32, 8), (16, 4), (64, 8)))

    def launch(self, config: PoolConfig, pdl: bool = False) -> Launch:
        height, width = self.out_size
        return Launch(
            max_pool,
            (triton.cdiv(self.pixels, config.block_m), triton.cdiv(self.channels, config.block_c)),
            {"x": ELEMENT, "out": ELEMENT},
            {"M": self.pixels},
            {
                **{"H": self.height, "W": self.width, "OH": height, "OW": width, "C": self.channels},
                **{"KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding},
                **{"BM": config.block_m, "BC": config.block_c, "PDL": pdl},
            },
            config.warps,
        )

    def work(self, config: PoolConfig) -> Work:
        read = self.batch * self.height * self.width * self.channels
        written = self.pixels * self.channels
        return Work(
            flops=0,
            issued_flops=0,
            map_bytes=2 * (read + written),
            weight_bytes=0,
            l2_bytes=2 * (read + written),  # windows overlap within a block: its L1 cache serves them
            blocks=int(np.prod(self.launch(config).grid)),
            warps=config.warps,
            shared_bytes=0,
            registers=64,
        )

    def reference(self, x):
        """The same in torch: x (N, H, W, C) to (N, OH, OW, C)."""
        import torch

        pooled = torch.nn.functional.max_pool2d(x.permute(0, 3, 1, 2), self.kernel, self.stride, self.padding)
        return pooled.permute(0, 2, 3, 1)


@triton.jit
def average_pool(
    x,  # (N, P, C)
    out,  # (N, C)
    P: tl.constexpr,  # pixels of an image
    C: tl.constexpr,
    BP: tl.constexpr,  # pixels at a time
    BC: tl.constexpr,  # channels per block
    PDL: tl.constexpr,
):
    begin(PDL)
    image = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    for first in range(0, P, BP):
        pixel = first + tl.arange(0, BP)
        live = (pixel < P)[:, None] & (channel < C)[None, :]
        values = tl.load(x + (image * P + pixel)[:, None] * C + channel[None, :], mask=live, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=0)
    tl.store(out + image * C + channel, (total / P).to(x.dtype.element_ty), mask=channel < C)


@dataclass(frozen=True)
class AveragePoolKernel(_Pool):
    """Global average pooling (N, H, W, C) to (N, 1, 1, C): fp32 sums. Bound by memory: H·W·C elements per image."""

    batch: int
    height: int
    width: int
    channels: int

    def configs(self, card: Card) -> tuple[PoolConfig, ...]:
        block_c = triton.next_power_of_2(self.channels)
        return tuple(PoolConfig(16, min(width, block_c), 4) for width in (128, 64, 256))

    def launch(self, config: PoolConfig, pdl: bool = False) -> Launch:
        constants = {"P": self.height * self.width, "C": self.channels, "BP": config.block_m, "BC": config.block_c}
        grid = (self.batch, triton.cdiv(self.channels, config.block_c))
        return Launch(average_pool, grid, {"x": ELEMENT, "out": ELEMENT}, {}, {**constants, "PDL": pdl}, config.warps)

    def work(self, config: PoolConfig) -> Work:
        moved = 2 * self.batch * self.channels * (self.height * self.width + 1)
        blocks = int(np.prod(self.launch(config).grid))
        return Work(0, 0, moved, 0, moved, blocks, config.warps, 4 * config.block_c * config.warps, 64)

    def reference(self, x):
        """The same in torch: x (N, H, W, C) to (N, 1, 1, C)."""
        return x.mean(dim=(1, 2), keepdim=True)
