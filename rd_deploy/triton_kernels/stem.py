"""The start of an ImageNet network as one kernel: convolution, max-pooling and, of a bottleneck network, the first 1x1
convolution. The map between convolution and pool, the largest of the network, never exists in memory.

A block owns ``columns`` columns of pooled pixels, each ``rows`` high, and walks down the convolution's rows: products
of weights `(channels, 32)`, which stay in shared memory, and pixels `(32, columns)`, for each of the three neighbours
under a pooled pixel. The lowest row under one pooled pixel is the highest under the next: its maximum is kept, so that
rows pooled pixels take 2·rows + 1 rows instead of 3·rows. The left neighbour is also the right one of the pixel to the
left and is computed twice: exchanging it between threads would take about as long.

Gathering single pixels of three channels would take longer than the products, so the image is loaded in parts: some
elements of a row, whatever pixels they belong to (4 of fp16, 8 bytes, at 224x224), by as many rows as a window has. The
three neighbours share their parts, and all addresses of a row differ by constants. A window begins anywhere within its
first part: before it the packed weights are zero, and where depends on the neighbour, but not on the column. (So what
is not a number may reach one pixel further sideways than it should.)
"""

import math
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from rd_deploy.chain import Conv, MaxPool
from rd_deploy.common import UserError
from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import KIB, Card
from rd_deploy.triton_kernels.launch import ELEMENT, Launch, Work, begin, check_size, dot, relu

NEIGHBOURS = 3  # columns, and rows, under a pooled pixel
MAX_CHANNELS = 128
LEAST_SHARED = 99 * KIB  # of a block, on every card

# columns, stages, warps
TILES = (64, 1, 4), (32, 1, 4), (32, 2, 4), (32, 1, 8), (16, 2, 4), (16, 1, 4)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 14)
ROW_WAIT = 0.35e-6  # s: of a row for its pixels, most of them in the L1 cache, and for products to come back


@triton.jit(do_not_specialize=["M"])
def stem(
    x,  # (N, H, W, C)
    w,  # (2, TAKEN, CH, ROWS·WIDE): of the middle and the outer neighbours; column kh·WIDE + element; zeros elsewhere
    b,  # (CH)
    w2,  # (CH2, CH): row is the output channel; None: no second convolution
    b2,  # (CH2)
    out,  # (N, PH, PW, OUT)
    M,  # columns of all strips: N·STRIPS·PW
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OH: tl.constexpr,  # of the convolution's map
    OW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    OUT: tl.constexpr,
    KH: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FRONT: tl.constexpr,  # elements before the first neighbour's window, so that parts begin at multiples of WIDE
    PARTS: tl.constexpr,  # of three neighbours' windows together, each WIDE elements by ROWS rows
    TAKEN: tl.constexpr,  # of one window, from its first part on
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    MIDDLE: tl.constexpr,  # first part of the second neighbour
    RIGHT: tl.constexpr,  # and of the third
    CH: tl.constexpr,  # channels of the map and of what w2 makes of it, rounded up to powers of two
    CH2: tl.constexpr,
    BP: tl.constexpr,  # columns per block
    R: tl.constexpr,  # pooled rows per strip
    STRIPS: tl.constexpr,  # per image
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Constants of all launches, so they may be read before an earlier launch has finished.
    BK: tl.constexpr = ROWS * WIDE
    channel = tl.arange(0, CH)
    w_at = w + channel[:, None] * BK + tl.arange(0, BK)[None, :]
    middle = ()
    outer = ()
    for part in tl.static_range(TAKEN):
        middle += (tl.load(w_at + part * (CH * BK)),)
        outer += (tl.load(w_at + (TAKEN + part) * (CH * BK)),)
    bias = tl.load(b + channel)
    begin(PDL)
    index = tl.program_id(0) * BP + tl.arange(0, BP)
    live = index < M
    column = index % PW
    strip = index // PW
    image = strip // STRIPS
    first = strip % STRIPS * R
    row = 2 * first - 1  # of the map's rows, the highest one that the strip needs
    left = column * (2 * STRIDE * C // WIDE) - (STRIDE * C + PADDING * C + FRONT) // WIDE  # first part, in parts
    k = tl.arange(0, BK)
    top = tl.where(live, row * STRIDE - PADDING, -(1 << 20))[None, :] + (k // WIDE)[:, None]
    corner = (image * H + row * STRIDE - PADDING) * (W * C) + left * WIDE
    x_at = x + (corner[None, :] + (k // WIDE * (W * C) + k % WIDE)[:, None])
    wanted = (k // WIDE < KH)[:, None]

    above = tl.full([CH, BP], float("-inf"), tl.float32)  # without bias and ReLU: both are monotone and can come last
    for down in tl.range(0, 2 * R + 1, num_stages=STAGES):
        inside = wanted & ((top + down * STRIDE).to(tl.uint32) < H)  # neither negative nor too large
        pixels = ()
        for part in tl.static_range(PARTS):
            if W * C % WIDE == 0:  # parts lie within a row or outside: no mask cuts a load in pieces
                mask = inside & ((left + part).to(tl.uint32) < W * C // WIDE)[None, :]
            else:
                mask = inside & ((((left + part) * WIDE)[None, :] + (k % WIDE)[:, None]).to(tl.uint32) < W * C)
            pixels += (tl.load(x_at + (down * (STRIDE * W * C) + part * WIDE), mask=mask, other=0.0),)
        best = tl.full([CH, BP], float("-inf"), tl.float32)
        for neighbour in tl.static_range(3):
            sums = tl.zeros([CH, BP], tl.float32)
            for part in tl.static_range(TAKEN):
                if neighbour == 1:
                    sums = dot(middle[part], pixels[MIDDLE + part], sums)
                else:
                    sums = dot(outer[part], pixels[neighbour // 2 * RIGHT + part], sums)
            exists = (2 * column - 1 + neighbour).to(tl.uint32) < OW
            best = largest(best, tl.where(exists[None, :], sums, float("-inf")))
        best = tl.where(((row + down).to(tl.uint32) < OH)[None, :], best, float("-inf"))
        above = largest(above, best)
        if down % 2 == 0:
            if down > 0:
                pooled = first + down // 2 - 1
                at = ((image * PH + pooled) * PW + column) * OUT
                finish(above, bias, w2, b2, out, at, live & (pooled < PH), OUT, CH, CH2)
            above = best


@triton.jit
def largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finish(best, bias, w2, b2, out, at, live, OUT: tl.constexpr, CH: tl.constexpr, CH2: tl.constexpr):
    """Pooled sums (CH, columns) to the outputs at ``at``."""
    pooled = relu(best + bias[:, None])
    channel = tl.arange(0, CH)
    if w2 is not None:
        channel = tl.arange(0, CH2)
        weight = tl.load(w2 + channel[:, None] * CH + tl.arange(0, CH)[None, :])
        zeros = tl.zeros([CH2, best.shape[1]], tl.float32)
        pooled = relu(dot(weight, pooled.to(weight.dtype), zeros) + tl.load(b2 + channel)[:, None])
    mask = (channel < OUT)[:, None] & live[None, :]
    tl.store(out + at[None, :] + channel[:, None], pooled.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class StemConfig:
    """``columns`` per block, of ``rows`` pooled pixels each; with two ``stages`` the next row is loaded meanwhile."""

    columns: int
    rows: int
    stages: int
    warps: int


@dataclass(frozen=True)
class StemKernel:
    """(N, H, W, C) to (N, PH, PW, reduce or outputs), ReLU after each convolution, rounded as if stored.

    For 224x224 to 64 and 64 channels: 0.7 MB of maps per image instead of 4.7 MB layer by layer, and 0.26 GFLOP, of
    which 2.0 to 2.75 times as many are issued: 192 products for 147, three columns for two, 2·rows + 1 rows for 2·rows.
    On 132 multiprocessors, batch 1: 98 blocks (32 columns, 1 row) or 196 (16 columns), one wave, bound by the wait for
    weights and three rows. Batch 32: 392 blocks of 64 columns by 4 rows, two at a time on each, so 1.5 waves but equal
    shares of three; 17.5 GFLOP, 22 us at an H100's full rate, against 7.5 us of DRAM and about 11 us of L2 cache.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    pool_kernel: int
    pool_stride: int
    pool_padding: int
    reduce: int = 0

    @property
    def conv_size(self) -> tuple[int, int]:
        reach = 2 * self.padding - self.kernel
        return (self.height + reach) // self.stride + 1, (self.width + reach) // self.stride + 1

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = self.conv_size
        return (height - 1) // 2 + 1, (width - 1) // 2 + 1

    @property
    def wide(self) -> int:
        """Elements of a part's row: at most 16 bytes, and windows of all pixels begin at the same remainder."""
        return math.gcd(8, 2 * self.stride * self.inputs)

    @property
    def rows(self) -> int:
        """Of a part: a power of two, for products of at least 16."""
        return max(triton.next_power_of_2(self.kernel), 16 // self.wide)

    @property
    def starts(self) -> tuple[int, int, int]:
        """Elements from the first part's to the windows of three neighbours."""
        front = -(self.stride + self.padding) * self.inputs % self.wide
        return tuple(front + neighbour * self.stride * self.inputs for neighbour in range(NEIGHBOURS))

    @property
    def taken(self) -> int:
        """Parts that one window needs, at most."""
        return max(triton.cdiv(start % self.wide + self.kernel * self.inputs, self.wide) for start in self.starts)

    @property
    def parts(self) -> int:
        return self.starts[2] // self.wide + self.taken

    @property
    def channels(self) -> tuple[int, int]:
        """Of both convolutions, as powers of two; the second may be 0."""
        return _padded(self.outputs), _padded(self.reduce) if self.reduce else 0

    def strips(self, config: StemConfig) -> int:
        """Per image."""
        return triton.cdiv(self.out_size[0], config.rows)

    def columns(self, config: StemConfig) -> int:
        """Of all strips."""
        return self.batch * self.strips(config) * self.out_size[1]

    def check(self) -> None:
        if (self.pool_kernel, self.pool_stride, self.pool_padding) != (3, 2, 1):
            raise UserError("the fused stem's max-pool must be 3x3 with stride 2 and padding 1")
        if max(self.channels) > MAX_CHANNELS:
            raise UserError(f"the fused stem takes at most {MAX_CHANNELS} channels")
        if self.shared_bytes(StemConfig(16, 1, 1, 4)) > LEAST_SHARED:
            window = f"{self.kernel}x{self.kernel}x{self.inputs}"
            raise UserError(f"the fused stem's weights, {window} to {self.outputs}, do not fit into shared memory")
        pixels = self.batch * math.prod(self.out_size)
        most = max(self.batch * self.height * self.width * self.inputs, pixels * (self.reduce or self.outputs))
        check_size(most)

    def configs(self, card: Card) -> tuple[StemConfig, ...]:
        """The least modelled time first."""
        candidates = (StemConfig(columns, rows, *rest) for columns, *rest in TILES for rows in ROWS)
        times = {config: self.predict(config, card).us for config in candidates if self.fits(config, card)}
        return cost.best(times, alike=lambda config: (config.columns, config.stages, config.warps))

    def fits(self, config: StemConfig, card: Card) -> bool:
        """Within a card's shared memory, and without spills."""
        sums = max(self.channels) * config.columns // (32 * config.warps)  # of a thread, for each neighbour
        most = 32 if card.capability == 90 else 16  # operands are in registers, too; sm_100: tensor memory is short
        warps = 4 if card.capability in (90, 100) else 8
        if self.width * self.inputs % self.wide:  # masks of single elements
            most //= 2
        return (
            config.warps <= warps
            and sums <= max(most, max(self.channels) * 16 // 128)  # the smallest tile may always be tried
            and config.rows <= self.out_size[0]
            and self.shared_bytes(config) <= card.shared_bytes
        )

    def predict(self, config: StemConfig, card: Card) -> cost.Prediction:
        work, rows = self.work(config), 2 * config.rows + 1
        flops = work.issued_flops / work.blocks
        waits = rows * ROW_WAIT
        if config.stages == 1:  # pixels are waited for before they are multiplied
            waits += flops / (card.tflops * 1e12 / card.multiprocessors * cost.MATRIX_SHARE)
        deep = self.rows * self.wide
        products = NEIGHBOURS * self.taken * (self.channels[0] + config.columns)  # rows of both operands
        block = cost.BlockCost(
            flops=flops,
            shared_traffic=rows * 2 * deep * (products + self.parts * config.columns),
            waits=waits,
            asynchronous=cost.is_asynchronous(card, self.channels[0]),
        )
        return cost.predict(work, block, card)

    def shared_bytes(self, config: StemConfig) -> int:
        """At most, of one block: weights, pixels, and of the second convolution weights, operands and sums."""
        (channels, reduced), deep = self.channels, self.rows * self.wide
        pixels = 2 * self.parts * deep * config.columns
        rest = 2 * channels * reduced + 6 * max(channels, reduced) * config.columns
        loop = max(pixels, rest) if config.stages == 1 else (config.stages + 1) * pixels + rest
        return 2 * 2 * self.taken * channels * deep + loop + 4 * KIB

    def launch(self, config: StemConfig, pdl: bool = False) -> Launch:
        tensors = {"x": ELEMENT, "w": ELEMENT, "b": "fp32"}
        tensors |= {"w2": ELEMENT, "b2": "fp32"} if self.reduce else {}
        (conv_height, conv_width), (height, width) = self.conv_size, self.out_size
        return Launch(
            stem,
            (triton.cdiv(self.columns(config), config.columns),),
            {**tensors, "out": ELEMENT},
            {"M": self.columns(config)},
            {
                **{"H": self.height, "W": self.width, "C": self.inputs, "OH": conv_height, "OW": conv_width},
                **{"PH": height, "PW": width, "OUT": self.reduce or self.outputs, "KH": self.kernel},
                **{"STRIDE": self.stride, "PADDING": self.padding, "FRONT": self.starts[0], "PARTS": self.parts},
                **{"TAKEN": self.taken, "WIDE": self.wide, "ROWS": self.rows},
                **{"MIDDLE": self.starts[1] // self.wide, "RIGHT": self.starts[2] // self.wide},
                **{"CH": self.channels[0], "CH2": self.channels[1], "BP": config.columns, "R": config.rows},
                **{"STRIPS": self.strips(config), "STAGES": config.stages, "PDL": pdl},
                **({} if self.reduce else {"w2": None, "b2": None}),
            },
            config.warps,
        )

    def work(self, config: StemConfig) -> Work:
        blocks = triton.cdiv(self.columns(config), config.columns)
        (channels, reduced), deep = self.channels, self.rows * self.wide
        pixels = self.batch * math.prod(self.out_size)
        flops = self.batch * math.prod(self.conv_size) * self.kernel**2 * self.inputs * self.outputs
        rows = 2 * config.rows + 1
        issued = rows * NEIGHBOURS * self.taken * deep * channels + config.rows * channels * reduced
        sizes = (self.height, self.conv_size[0]), (self.width, self.conv_size[1])
        read = math.prod(_read(*pair, self.kernel, self.stride, self.padding) for pair in sizes)
        read, written = read * self.batch * self.inputs, pixels * (self.reduce or self.outputs)
        weights = 2 * (2 * self.taken * deep * channels + channels * reduced) + 4 * (channels + reduced)
        # The L1 cache keeps what a block's windows share.
        lines = 2 * config.rows * self.stride + self.kernel
        line = (config.columns - 1) * 2 * self.stride * self.inputs + self.parts * self.wide
        return Work(
            flops=2 * (flops + pixels * self.outputs * self.reduce),
            issued_flops=2 * blocks * issued * config.columns,
            map_bytes=2 * (read + written),
            weight_bytes=weights,
            l2_bytes=blocks * (weights + 2 * lines * line) + 2 * written,
            blocks=blocks,
            warps=config.warps,
            shared_bytes=self.shared_bytes(config),
            registers=min(255, 100 + 5 * channels * config.columns // (32 * config.warps)),
        )

    def scratch(self, config: StemConfig) -> dict[str, tuple[str, int]]:
        return {}

    def weights(self, conv: Conv, pool: MaxPool, reduce: Conv | None = None) -> dict[str, np.ndarray]:
        (channels, reduced), wide = self.channels, self.wide
        lines = conv.weight.transpose(2, 3, 1, 0).reshape(self.kernel, -1, self.outputs)
        w = np.zeros((2, self.rows, self.taken * wide, channels), np.float32)
        for packed, start in zip(w, (self.starts[1], self.starts[0]), strict=True):
            first = start % wide
            packed[: self.kernel, first : first + lines.shape[1], : self.outputs] = lines
        w = w.reshape(2, self.rows, self.taken, wide, channels).transpose(0, 2, 4, 1, 3)
        operands = {"w": w.reshape(2, self.taken, channels, -1), "b": np.zeros(channels, np.float32)}
        operands["b"][: self.outputs] = conv.bias
        if reduce is not None:
            operands |= {"w2": np.zeros((reduced, channels), np.float32), "b2": np.zeros(reduced, np.float32)}
            operands["w2"][: self.reduce, : self.outputs] = reduce.weight[:, :, 0, 0]
            operands["b2"][: self.reduce] = reduce.bias
        return operands

    def reference(self, x, w, b, w2=None, b2=None):
        """The same in torch: x (N, H, W, C) and operands as `weights` packs them, to (N, PH, PW, outputs)."""
        import torch

        first = self.starts[0] % self.wide
        lines = w[1].reshape(self.taken, -1, self.rows, self.wide).permute(2, 0, 3, 1)
        lines = lines.reshape(self.rows, self.taken * self.wide, -1)
        lines = lines[: self.kernel, first : first + self.kernel * self.inputs, : self.outputs]
        kernel = lines.reshape(self.kernel, self.kernel, self.inputs, -1).permute(3, 2, 0, 1)
        functional = torch.nn.functional
        y = functional.conv2d(x.permute(0, 3, 1, 2), kernel, b[: self.outputs], self.stride, self.padding).relu()
        y = functional.max_pool2d(y, self.pool_kernel, self.pool_stride, self.pool_padding).permute(0, 2, 3, 1)
        if self.reduce:
            y = (y @ w2[: self.reduce, : self.outputs].T + b2[: self.reduce]).relu()
        return y


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _read(size: int, out: int, kernel: int, stride: int, padding: int) -> int:
    """Rows (or columns) of a map that some window reads."""
    rows = np.arange(out)[:, None] * stride - padding + np.arange(kernel)
    return len(np.unique(rows[(rows >= 0) & (rows < size)]))
