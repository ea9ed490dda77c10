"""A convolution as one kernel, layer by layer: whatever no fused kernel takes in, linear layers among them.

It is one matrix product: rows are the output pixels of all images, columns the output channels, and the products of
one output are its taps times the input channels. The patches of x are never laid out; each step of a block's loop
reads BM pixels x BK channels of one tap where they lie and multiplies them by BK rows of w. A 1x1 convolution without
stride has one tap and no padding, so nothing of taps is left in it.

Order of blocks: those of the same pixels follow each other. Maps may exceed the L2 cache (51 MB in stage 1 at batch
32) but weights never do (at most 4.7 MB), so x and out meet DRAM once each, and w comes from the L2 cache every time.
Where weights are the larger (stage 4, batch 1), all blocks run at once and no order matters.

Too few tiles for a card are split: SPLITS blocks take a share of the steps each, leave fp32 sums in ``partials``, and
the last to arrive adds them up, always in the same order, so results are bit-equal from run to run.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Conv, Linear
from rd_deploy.common import UserError
from rd_deploy.triton_kernels import conv_tiles
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.conv_tiles import ConvConfig, registers, shared_bytes, worth_timing
from rd_deploy.triton_kernels.cost import Prediction, ceil_div
from rd_deploy.triton_kernels.launch import ELEMENT, MAX_ELEMENTS, Launch, Work, begin, dot, relu

WEIGHT_ROWS = 64  # rows and columns of the packed weights are padded to multiples of these
WEIGHT_COLUMNS = 16


@triton.jit(do_not_specialize=["M"])
def conv(
    x,  # (N, H, W, C)
    w,  # (ROWS, COLUMNS): row (kh·KW + kw)·C + c, column output channel, zeros beyond
    b,  # (COLUMNS)
    add,  # (M, OUT), may be out itself; None: nothing to add
    out,  # (M, OUT), M pixels in all
    partials,  # (tiles, SPLITS, BM, BN) fp32; None: SPLITS is 1
    arrivals,  # (tiles), zero before and after; None: SPLITS is 1
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    GATHER: tl.constexpr,  # steps run over (kh, kw, c) as one index; otherwise BK divides C
    BM: tl.constexpr,  # output pixels per block, of all images
    BN: tl.constexpr,  # output channels per block
    BK: tl.constexpr,  # rows of w per step
    SPLITS: tl.constexpr,  # blocks that share a tile's steps
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n: tl.constexpr = (OUT + BN - 1) // BN
    pixel = tile // tiles_n * BM + tl.arange(0, BM)
    column = tile % tiles_n * BN + tl.arange(0, BN)
    # The bias is where the sums of one split start: its load hides behind the first tiles'.
    bias = tl.load(b + column, mask=(column < COLUMNS) & (tl.program_id(1) == 0), other=0.0)
    begin(PDL)
    k = tl.arange(0, BK)
    live = pixel < M
    inside = live
    row = 0
    left = 0
    corner = pixel
    if KH * KW > 1 or STRIDE > 1 or PADDING > 0:
        row = pixel // OW % OH * STRIDE - PADDING
        left = pixel % OW * STRIDE - PADDING
        corner = (pixel // (OH * OW) * H + row) * W + left
    x_at = x + corner[:, None] * C
    w_at = w + k[:, None] * COLUMNS + column[None, :]

    steps: tl.constexpr = (KH * KW * C + BK - 1) // BK
    per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, steps)
    if steps % SPLITS == 0:  # a length known when compiling
        last = first + per_split
    acc = tl.zeros([BM, BN], tl.float32) + bias[None, :]
    for step in tl.range(first, last, num_stages=STAGES):
        if GATHER:
            index = step * BK + k
            kh = index // (KW * C)
            kw = index // C % KW
            rows = row[:, None] + kh[None, :]
            lefts = left[:, None] + kw[None, :]
            mask = (
                live[:, None] & (rows >= 0) & (rows < H) & (lefts >= 0) & (lefts < W) & (index < KH * KW * C)[None, :]
            )
            a_at = x_at + ((kh * W + kw) * C + index % C)[None, :]
            first_row = step * BK
        else:
            tap = step // (C // BK)
            channel = step % (C // BK) * BK
            kh = tap // KW
            kw = tap % KW
            if KH * KW > 1 or PADDING > 0:
                inside = live & (row + kh >= 0) & (row + kh < H) & (left + kw >= 0) & (left + kw < W)
            mask = inside[:, None]
            a_at = x_at + ((kh * W + kw) * C + channel + k[None, :])
            first_row = tap * C + channel
        a = tl.load(a_at, mask=mask, other=0.0)
        if COLUMNS % BN == 0:
            weight = tl.load(w_at + first_row * COLUMNS)
        else:
            weight = tl.load(w_at + first_row * COLUMNS, mask=(column < COLUMNS)[None, :], other=0.0)
        acc = dot(a, weight, acc)

    if SPLITS == 1:
        finish(acc, add, out, pixel, column, M, OUT, RELU)
    else:
        own = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(partials + (tile * SPLITS + tl.program_id(1)) * (BM * BN) + own, acc)
        tl.debug_barrier()  # all threads have stored before one announces it
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            acc = tl.zeros([BM, BN], tl.float32)
            # Always in this order, whichever block came last. Two reads at a time: four can spill.
            for split in tl.range(SPLITS, loop_unroll_factor=2):
                acc += tl.load(partials + (tile * SPLITS + split) * (BM * BN) + own, cache_modifier=".cg")
            finish(acc, add, out, pixel, column, M, OUT, RELU)
            tl.store(arrivals + tile, 0)


@triton.jit
def finish(acc, add, out, pixel, column, M, OUT: tl.constexpr, RELU: tl.constexpr):
    """``relu?(acc (+ add))`` to ``out``, which may be ``add``: one thread reads an element and then writes it."""
    live = (pixel < M)[:, None] & (column < OUT)[None, :]
    at = pixel[:, None] * OUT + column[None, :]
    if add is not None:
        acc += tl.load(add + at, mask=live, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class ConvKernel:
    """``relu?(conv(x) + b (+ add))``: x (N, H, W, inputs), w and b from `weights`, add and out (N, OH, OW, outputs).

    A linear layer is a 1x1 convolution of a 1x1 map; ``fp32_out`` is for its logits. Sums are in fp32.

    With M = N·OH·OW pixels, K = kernel_height·kernel_width·inputs products per output and 16-bit elements:
    2·M·K·outputs FLOPs; DRAM moves x, w and out once; the L2 cache gives (1/block_n + 1/block_m) · 2·M·K·outputs bytes,
    padding apart. Plain-50 at 224x224 on an H100, the first configuration, times as modelled (none is measured):

    | layer          | batch | GFLOP | w MB | maps MB | L2 MB | tile     | blocks | µs   |
    | 3x3, stage 3   |     1 |  0.23 |  1.2 |     0.2 |    10 | 64x64    | 16 · 4 |  8.3 |
    | expand 3       |     1 |  0.10 |  0.5 |     0.5 |     4 | 64x64    |     64 |  4.5 |
    | 3x3, stage 4   |     1 |  0.23 |  4.7 |     0.1 |    12 | 64x32    | 16 · 6 |  9.4 |
    | expand 4       |     1 |  0.10 |  2.1 |     0.3 |     6 | 64x32    |     64 |  4.9 |
    | 3x3, stage 1   |    32 |  7.40 |  0.1 |    25.7 |   184 | 128x64   |    784 | 40   |
    | 3x3, stage 3   |    32 |  7.40 |  1.2 |     6.4 |   114 | 128x128  |     98 | 28   |
    | expand 3       |    32 |  3.29 |  0.5 |    16.1 |    64 | 128x128  |    392 | 16   |
    | 3x3, stage 4   |    32 |  7.40 |  4.7 |     3.2 |   124 | 128x128  | 52 · 2 | 32   |
    | expand 4       |    32 |  3.29 |  2.1 |     8.0 |    47 | 128x256  |    104 | 14   |

    At batch 1 every layer is a chain of waits (2 µs to launch, 1 µs to fill, then steps) far from any peak. At batch 32
    three quarters of the peak would give 7.4 GFLOP in 12 µs: stages 3 and 4 lose to blocks that fill 98 to 104 of 132
    multiprocessors, stage 1 to reading x nine times from the L2 cache.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride: int
    padding: int
    relu: bool
    add: bool = False
    fp32_out: bool = False

    @functools.cached_property  # as the pixels: asked for as often as there are configurations
    def out_size(self) -> tuple[int, int]:
        sizes = (self.height, self.kernel_height), (self.width, self.kernel_width)
        return tuple((size + 2 * self.padding - kernel) // self.stride + 1 for size, kernel in sizes)

    @functools.cached_property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def depth(self) -> int:
        """Products per output: taps times input channels."""
        return self.kernel_height * self.kernel_width * self.inputs

    @property
    def gather(self) -> bool:
        """Too few or odd channels for steps within one tap."""
        return self.inputs % 16 != 0

    @property
    def columns(self) -> int:
        """Of the packed weights."""
        return _round_up(self.outputs, WEIGHT_COLUMNS)

    def tiles(self, config: ConvConfig) -> tuple[int, int]:
        """Tiles of pixels, tiles of output channels."""
        return ceil_div(self.pixels, config.block_m), ceil_div(self.outputs, config.block_n)

    def steps(self, config: ConvConfig) -> int:
        """Of a tile's loop, all its splits together."""
        return ceil_div(self.depth, config.block_k)

    def check(self) -> None:
        sizes = {
            "its input": self.batch * self.height * self.width * self.inputs,
            "its output": self.pixels * self.outputs,
            "its weight": _round_up(self.depth, WEIGHT_ROWS) * self.columns,
        }
        for what, elements in sizes.items():
            if elements >= MAX_ELEMENTS:
                raise UserError(
                    f"a convolution: {what} has 2^31 elements or more: use a smaller batch or smaller images"
                )

    def configs(self, card: Card) -> tuple[ConvConfig, ...]:
        return worth_timing(self, card)

    def predict(self, config: ConvConfig, card: Card) -> Prediction:
        return conv_tiles.predict(self, config, card)

    def launch(self, config: ConvConfig, pdl: bool = False) -> Launch:
        height, width = self.out_size
        tensors = {"x": ELEMENT, "w": ELEMENT, "b": "fp32", "out": "fp32" if self.fp32_out else ELEMENT}
        tensors |= {"add": ELEMENT} if self.add else {}
        tensors |= {name: kind for name, (kind, _) in self.scratch(config).items()}
        absent = {name: None for name in ("add", "partials", "arrivals") if name not in tensors}
        return Launch(
            conv,
            (math.prod(self.tiles(config)), config.splits),
            tensors,
            {"M": self.pixels},
            {
                **{"H": self.height, "W": self.width, "C": self.inputs, "OH": height, "OW": width},
                **{"OUT": self.outputs, "COLUMNS": self.columns, "KH": self.kernel_height, "KW": self.kernel_width},
                **{"STRIDE": self.stride, "PADDING": self.padding, "RELU": self.relu, "GATHER": self.gather},
                **{"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "SPLITS": config.splits},
                **{"STAGES": config.stages, "PDL": pdl},
                **absent,
            },
            config.warps,
        )

    def work(self, config: ConvConfig) -> Work:
        tiles_m, tiles_n = self.tiles(config)
        height, width = self.out_size
        rows = _touched(self.height, height, self.kernel_height, self.stride)
        columns = _touched(self.width, width, self.kernel_width, self.stride)
        issued = tiles_m * config.block_m * tiles_n * config.block_n * self.steps(config) * config.block_k
        return Work(
            flops=2 * self.pixels * self.depth * self.outputs,
            issued_flops=2 * issued,
            map_bytes=2 * self.batch * rows * columns * self.inputs + self._out_bytes(),
            weight_bytes=2 * self.depth * self.columns + 4 * self.columns,
            l2_bytes=self._l2_bytes(config),
            blocks=tiles_m * tiles_n * config.splits,
            warps=config.warps,
            shared_bytes=shared_bytes(self, config, config.stages),
            registers=registers(self, config),
        )

    def _l2_bytes(self, config: ConvConfig) -> int:
        tiles_m, tiles_n = self.tiles(config)
        height, width = self.out_size
        taps = _inside(self.height, height, self.kernel_height, self.stride, self.padding)
        taps *= _inside(self.width, width, self.kernel_width, self.stride, self.padding)  # padding is not loaded
        maps = 2 * tiles_n * self.batch * taps * self.inputs
        columns = min(self.columns, tiles_n * config.block_n)
        weights = tiles_m * columns * (2 * self.steps(config) * config.block_k + 4)
        partials = 2 * sum(elements for kind, elements in self.scratch(config).values() if kind == "fp32")
        return maps + weights + self._out_bytes() + 4 * partials

    def _out_bytes(self) -> int:
        """Written to ``out``, and read from ``add``."""
        return self.pixels * self.outputs * ((4 if self.fp32_out else 2) + (2 if self.add else 0))

    def scratch(self, config: ConvConfig) -> dict[str, tuple[str, int]]:
        if config.splits == 1:
            return {}
        tiles = math.prod(self.tiles(config))
        return {
            "partials": ("fp32", tiles * config.splits * config.block_m * config.block_n),
            "arrivals": ("i32", tiles),
        }

    def weights(self, step: Conv | Linear) -> dict[str, np.ndarray]:
        outputs = step.weight.shape[0]
        rows = step.weight.reshape(outputs, self.inputs, -1).transpose(2, 1, 0).reshape(self.depth, outputs)
        w = np.zeros((_round_up(self.depth, WEIGHT_ROWS), self.columns), np.float32)
        w[: self.depth, :outputs] = rows
        b = np.zeros(self.columns, np.float32)
        b[:outputs] = step.bias
        return {"w": w, "b": b}

    def reference(self, x, w, b, add=None):
        """The same in torch: x (N, H, W, C), w and b as `weights` packs them, to (N, OH, OW, outputs)."""
        import torch

        kernel = w[: self.depth, : self.outputs].reshape(self.kernel_height, self.kernel_width, self.inputs, -1)
        y = torch.nn.functional.conv2d(
            x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), b[: self.outputs], self.stride, self.padding
        ).permute(0, 2, 3, 1)
        y = y if add is None else y + add
        return y.relu() if self.relu else y


def _touched(size: int, out: int, kernel: int, stride: int) -> int:
    """Rows (or columns) of a map that some window reads."""
    return min(size, out * min(kernel, stride) + max(0, kernel - stride))


@functools.cache
def _inside(size: int, out: int, kernel: int, stride: int, padding: int) -> int:
    """Pairs of an output row and a tap that lie within the map, not in its padding."""
    rows = np.arange(out)[:, None] * stride - padding + np.arange(kernel)
    return int(((rows >= 0) & (rows < size)).sum())


def _round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple
