"""The one network definition of the project: ResNets and their plain counterparts are one class with a switch.

The ReLU stands at the START of each block, so that what flows between blocks and stages is a pre-activation tensor:
those are the features that residual distillation splices and compares. It is the same function as torchvision's
ResNet v1.5 (stride on the 3x3), and the parameter names are torchvision's too, so its weights load with strict=True.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rd_deploy.common import UserError, nearest

Shortcuts = Literal["all", "projection", "none"]
Stem = Literal["imagenet", "small"]
Init = Literal["kaiming", "dirac", "identity"]
Reparam = Literal["none", "dirac", "skip", "identity", "branches"]

BESIDE = ("skip", "identity", "branches")  # of these, those that stand beside each convolution

# depth: (block, blocks per stage). He et al. 2016, tables 1 (ImageNet) and 6 (CIFAR: 3 stages of n = (depth - 2) / 6).
IMAGENET_DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
CIFAR_DEPTHS = {depth: ("basic", ((depth - 2) // 6,) * 3) for depth in (20, 32, 44, 56, 110)}
ARCH_NAMES = tuple(f"{kind}{depth}" for kind in ("resnet", "plain") for depth in (*IMAGENET_DEPTHS, *CIFAR_DEPTHS))
EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class Arch:
    """Everything that decides the shape of a network; stored in the checkpoint.

    ``shortcuts``: ``all`` is the ResNet, ``none`` the plain network, ``projection`` keeps only the strided
    shortcuts at the start of stages 2-4, which is what the method's authors released as their plain network.
    ``reparam``: what plain blocks have in training only, and export folds away: ``dirac`` (kernels α·δ + β·W),
    ``skip`` (each convolution's input is added to its BN's output), ``identity`` (a BN of the input instead),
    ``branches`` (a 1x1 convolution + BN besides).
    """

    depth: int
    shortcuts: Shortcuts = "none"
    stem: Stem = "imagenet"
    width: float = 1.0
    in_channels: int = 3
    classes: int = 1000
    reparam: Reparam = "none"

    def __post_init__(self) -> None:
        known = {**IMAGENET_DEPTHS, **CIFAR_DEPTHS}
        depths = ", ".join(map(str, sorted(known)))
        _check(isinstance(self.depth, int) and self.depth in known, f"depth {self.depth} is unknown (known: {depths})")
        _check(
            self.shortcuts in ("all", "projection", "none"),
            f"shortcuts '{self.shortcuts}' are unknown (known: all, projection, none)",
        )
        _check(self.stem in ("imagenet", "small"), f"stem '{self.stem}' is unknown (known: imagenet, small)")
        _check(
            self.reparam in get_args(Reparam),
            f"reparam '{self.reparam}' is unknown (known: {', '.join(get_args(Reparam))})",
        )
        _check(isinstance(self.width, int | float) and 1 / 64 <= self.width <= 16, "width must be from 1/64 to 16")
        _check(isinstance(self.in_channels, int) and 1 <= self.in_channels <= 64, "in_channels must be from 1 to 64")
        _check(isinstance(self.classes, int) and 2 <= self.classes <= 1_000_000, "classes must be from 2 to 1,000,000")

    @property
    def block(self) -> str:
        """``basic`` (two 3x3) or ``bottleneck`` (1x1, 3x3, 1x1)."""
        return {**IMAGENET_DEPTHS, **CIFAR_DEPTHS}[self.depth][0]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return {**IMAGENET_DEPTHS, **CIFAR_DEPTHS}[self.depth][1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the 3x3 convolutions, per stage."""
        base = 64 if self.depth in IMAGENET_DEPTHS else 16
        return tuple(max(1, round(base * 2**stage * self.width)) for stage in range(len(self.blocks)))

    @property
    def name(self) -> str:
        """``resnet50``, ``plain50`` or ``plain50-projection``."""
        if self.shortcuts == "all":
            return f"resnet{self.depth}"
        return f"plain{self.depth}" + ("-projection" if self.shortcuts == "projection" else "")

    @property
    def deployed(self) -> "Arch":
        """What export makes of it: the same network without what is there for training only."""
        return replace(self, reparam="none")

    def to_dict(self) -> dict:
        """Plain containers; without ``reparam`` where there is none, as files have it that are older than this."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("reparam", "none")}

    @classmethod
    def from_dict(cls, values: dict) -> "Arch":
        """Rebuild from a checkpoint's plain dict; unknown or missing entries are a `UserError`."""
        names = {field.name for field in fields(cls)}
        known = isinstance(values, dict) and {*values, "reparam"} == names
        _check(known, f"architecture must have exactly {sorted(names - {'reparam'})} and may have reparam")
        return cls(**values)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def parse_arch(name: str, **changes) -> Arch:
    """The architecture of a name such as ``plain50``; ``changes`` are fields of `Arch`.

    The depths 20 to 110 of the CIFAR family get the 32x32 stem unless ``stem`` says otherwise.
    """
    _check(name in ARCH_NAMES, f"unknown architecture '{name}'{nearest(name, ARCH_NAMES)}")
    kind, depth = ("resnet", int(name[6:])) if name.startswith("resnet") else ("plain", int(name[5:]))
    defaults = {
        "shortcuts": "all" if kind == "resnet" else "none",
        "stem": "imagenet" if depth in IMAGENET_DEPTHS else "small",
    }
    return Arch(depth=depth, **(defaults | changes))


class DiracConv2d(nn.Conv2d):
    """A convolution with the kernel α·δ + β·W, with α and β (C_out,) learnt (Zagoruyko and Komodakis 2017, DiracNets).

    δ passes the first ``passed`` channels on. Weight decay pulls W to 0 and leaves α: towards the identity, where it
    pulls an ordinary kernel that started as one away from it. Initialised by `initialise`.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, passed: int):
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
        self.alpha, self.beta = nn.Parameter(torch.ones(c_out)), nn.Parameter(torch.ones(c_out))
        delta = torch.zeros(c_out, c_in, kernel, kernel)
        add_dirac(delta, passed)
        self.register_buffer("delta", delta, persistent=False)

    def kernel(self) -> Tensor:
        """The kernel of the ordinary convolution that this one is, (C_out, C_in, k, k)."""
        alpha, beta = (factor.view(-1, 1, 1, 1) for factor in (self.alpha, self.beta))
        return alpha * self.delta + beta * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), None)


class Sides(nn.Module):
    """Train-time branches beside a convolution + BN, which export folds into it (Ding et al. 2021, RepVGG).

    The first ``passed`` channels of the convolution's input, by ``reparam`` as they are (``skip``) or through a BN of
    their own (``identity``); with ``branches`` a 1x1 convolution + BN besides, unless the convolution is one itself.
    """

    def __init__(self, conv: nn.Conv2d, passed: int, reparam: Reparam):
        super().__init__()
        self.stride, self.passed = conv.stride[0], passed
        self.identity = nn.Identity() if reparam == "skip" else nn.BatchNorm2d(passed)
        self.pointwise = None
        if reparam == "branches" and conv.kernel_size[0] > 1:
            one = _conv(conv.in_channels, conv.out_channels, 1, self.stride)
            self.pointwise = nn.Sequential(one, nn.BatchNorm2d(conv.out_channels))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The convolution's input (N, C_in, H, W) and its BN's output (N, C_out, H', W') to the sum of all branches.

        The sum is written to ``out``.
        """
        same = self.identity(x[:, : self.passed, :: self.stride, :: self.stride])
        # In place, which a BN's backward bears, as it does without its output: one map less to write, and to hold.
        out += F.pad(same, (0, 0, 0, 0, 0, out.shape[1] - self.passed)) if self.passed < out.shape[1] else same
        return out if self.pointwise is None else out.add_(self.pointwise(x))


def has_shortcut(arch: Arch, stride: int) -> bool:
    """Whether an architecture's block of this stride has a shortcut."""
    return arch.shortcuts == "all" or (arch.shortcuts == "projection" and stride != 1)


class Block(nn.Module):
    """ReLU, two 3x3 (basic) or 1x1-3x3-1x1 (bottleneck) convolutions with BN, then the shortcut if there is one.

    ``fading``: None, or a 0-d tensor λ: the shortcut is then a temporary one, that training weighs by λ and evaluation
    does without (`fade_shortcuts`).
    """

    def __init__(self, arch: Arch, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * EXPANSION[arch.block]
        self.stride, self.has_shortcut = stride, has_shortcut(arch, stride)
        reparam = "none" if self.has_shortcut else arch.reparam
        self.passed = min(c_in, width)  # channels that all convolutions have at the same place
        conv = _conv if reparam != "dirac" else lambda *shape: DiracConv2d(*shape, passed=self.passed)
        if arch.block == "basic":
            self.conv1, self.bn1 = conv(c_in, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, 1), nn.BatchNorm2d(width)
            self.conv3 = None
        else:
            self.conv1, self.bn1 = conv(c_in, width, 1, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, c_out, 1, 1), nn.BatchNorm2d(c_out)
        self.sides = None
        if reparam in BESIDE:
            self.sides = nn.ModuleList(Sides(conv, self.passed, reparam) for conv, _ in self.convs)
        self.downsample = None
        if self.has_shortcut and (stride != 1 or c_in != c_out):
            self.downsample = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
        self.register_buffer("fading", None, persistent=False)

    @property
    def convs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The main path in order."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return pairs if self.conv3 is None else [*pairs, (self.conv3, self.bn3)]

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activation (N, C, H, W) to pre-activation (N, C', H/stride, W/stride)."""
        x = out = F.relu(x)
        for number in range(len(self.convs)):
            out = self.layer(number, F.relu(out) if number else out)
        if self.has_shortcut and (self.fading is None or self.training):
            shortcut = x if self.downsample is None else self.downsample(x)
            out = out + (shortcut if self.fading is None else self.fading * shortcut)
        return out

    def layer(self, number: int, x: Tensor) -> Tensor:
        """One convolution (from 0) with BN and the branches beside it."""
        conv, bn = self.convs[number]
        return bn(conv(x)) if self.sides is None else self.sides[number](x, bn(conv(x)))


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution as one of stride 1 on every so many pixels, which is the same sum.

    oneDNN's gradient of a strided 1x1 kernel writes past its memory, or is wrong, in NHWC with fewer input channels
    than a register has lanes: 8 in AVX2, where it was seen, 16 in AVX-512 by its source
    (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    LANES = 16

    def forward(self, x: Tensor) -> Tensor:
        vertical, horizontal = self.stride
        return F.conv2d(x[:, :, ::vertical, ::horizontal], self.weight, self.bias)


def _conv(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Conv2d:
    kind = SubsampledConv2d if kernel == 1 and stride > 1 and c_in < SubsampledConv2d.LANES else nn.Conv2d
    return kind(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


@torch.no_grad()
def add_dirac(kernel: Tensor, channels: int) -> None:
    """Add 1 at the centre of (C_out, C_in, k, k) from channel i to channel i, for the first ``channels`` of them."""
    index, centre = torch.arange(channels), kernel.shape[2] // 2
    kernel[index, index, centre, centre] += 1.0


class Network(nn.Module):
    """A ResNet or its plain counterpart, which can be run stage by stage.

    ``forward(x) == head(stage(n - 1, ... stage(0, stem(x))))``, images (N, in_channels, H, W) to logits (N, classes).
    """

    def __init__(self, arch: Arch, init: Init = "kaiming", init_noise: float = 0.5):
        super().__init__()
        self.arch = arch
        c_stem = arch.widths[0]
        self.conv1 = (
            nn.Conv2d(arch.in_channels, c_stem, 7, 2, 3, bias=False)
            if arch.stem == "imagenet"
            else _conv(arch.in_channels, c_stem, 3, 1)
        )
        self.bn1 = nn.BatchNorm2d(c_stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if arch.stem == "imagenet" else nn.Identity()
        c_in = c_stem
        for index, (width, count) in enumerate(zip(arch.widths, arch.blocks, strict=True)):
            blocks = []
            for number in range(count):
                stride = 2 if number == 0 and index > 0 else 1
                blocks.append(Block(arch, c_in, width, stride))
                c_in = width * EXPANSION[arch.block]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c_in, arch.classes)
        initialise(self, init, init_noise)

    @property
    def stages(self) -> int:
        """Number of stages (4 for the ImageNet family, 3 for the CIFAR family)."""
        return len(self.arch.blocks)

    def stage_blocks(self, index: int) -> nn.Sequential:
        """The blocks of one stage."""
        return getattr(self, f"layer{index + 1}")

    def blocks(self) -> list[tuple[str, Block]]:
        """All blocks in order, with the names of their parameters' prefix."""
        return [
            (f"layer{index + 1}.{number}", block)
            for index in range(self.stages)
            for number, block in enumerate(self.stage_blocks(index))
        ]

    def stem(self, x: Tensor) -> Tensor:
        """Images to the pre-activation input of stage 0. (max-pool commutes with the ReLU that follows it.)"""
        return self.maxpool(self.bn1(self.conv1(x)))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run one stage, pre-activation to pre-activation."""
        return self.stage_blocks(index)(x)

    def head(self, x: Tensor) -> Tensor:
        """ReLU, global average pool, classifier: pre-activation of the last stage to logits."""
        return self.fc(F.relu(x).mean(dim=(2, 3)))

    def features(self, x: Tensor) -> list[Tensor]:
        """The pre-activation output of each stage."""
        x, outputs = self.stem(x), []
        for index in range(self.stages):
            x = self.stage(index, x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1])


@torch.no_grad()
def initialise(network: Network, init: Init, noise: float = 0.5) -> None:
    """Kaiming-normal (fan out) convolutions and unit BN; ``dirac`` makes plain blocks near-identities.

    ``dirac``: each convolution of a block without a shortcut becomes Dirac + noise · Kaiming. Where the number of
    channels changes, the Dirac covers the channels both sides have; in a bottleneck it covers the first w channels of
    all three convolutions, so that w channels pass unchanged (up to BN and ReLU). Blocks with a shortcut already
    pass their input on and stay Kaiming. ``identity``: the same, but for convolutions with branches beside them, and
    `start_as_identity` then sets their BN.
    """
    _check(init in ("kaiming", "dirac", "identity"), f"init '{init}' is unknown (known: kaiming, dirac, identity)")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for block in plain_blocks(network):
        for conv, _ in block.convs:
            if isinstance(conv, DiracConv2d):
                nn.init.constant_(conv.alpha, 0.0 if init == "kaiming" else 1.0)
                nn.init.constant_(conv.beta, 1.0 if init == "kaiming" else noise)
            elif init == "dirac" or (init == "identity" and block.sides is None):
                conv.weight.mul_(noise)
                add_dirac(conv.weight, block.passed)


def plain_blocks(network: Network) -> list[Block]:
    """The blocks without a shortcut, in order."""
    return [module for module in network.modules() if isinstance(module, Block) and not module.has_shortcut]


@torch.no_grad()
def start_as_identity(network: Network, images: Tensor, noise: float) -> None:
    """Set γ and β in plain blocks so that each starts as the identity on its (rectified) input, but for the noise.

    A BN of γ = 1 and β = 0 centres what its Dirac passes on, and the next ReLU cuts half of it off. Here a BN gives
    each channel that is passed on the mean and deviation it had before the convolution: γ = √(σ² + ε), β = μ over
    ``images`` (N, in_channels, H, W). Where branches stand beside a convolution, its input passes by a skip, or by a
    BN of that γ and β, and the convolution, then without a Dirac, comes with ``noise`` times that deviation; elsewhere
    the noise is in the kernel already (`initialise`). Without noise, ``block(x) == relu(x)`` there for the batch,
    strides apart. Running statistics are those of a fresh network.
    """
    modes = {module: module.training for module in network.modules()}
    x = network.train().stem(images)
    for index in range(network.stages):
        for block in network.stage_blocks(index):
            if not block.has_shortcut:
                _pass_statistics(block, x, noise)
            x = block(x)
    for module, mode in modes.items():
        module.training = mode
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def _pass_statistics(block: Block, x: Tensor, noise: float) -> None:
    for number, (conv, bn) in enumerate(block.convs):
        x, stride, passed = F.relu(x), conv.stride[0], block.passed
        var, mean = torch.var_mean(x[:, :passed, ::stride, ::stride], dim=(0, 2, 3), correction=0)
        deviation = torch.sqrt(var + bn.eps)
        if block.sides is not None:
            side = block.sides[number]
            for other in [bn] if side.pointwise is None else [bn, side.pointwise[1]]:
                other.weight[:passed], other.bias[:passed] = noise * deviation, 0.0
            bn = side.identity
        if isinstance(bn, nn.BatchNorm2d):
            bn.weight[:passed], bn.bias[:passed] = deviation, mean
        x = block.layer(number, x)


def fade_shortcuts(network: Network, arch: Arch) -> None:
    """Make the shortcuts that ``arch`` lacks temporary ones: weighed by `set_fading` in training, absent in evaluation.

    The network is from then on an ``arch`` that still has the parameters of projections; `deployed_state` has not.
    """
    for _, block in network.blocks():
        if not has_shortcut(arch, block.stride):
            block.fading = torch.ones_like(network.fc.bias[0].detach())
    network.arch = arch


def fading_blocks(network: Network) -> list[tuple[str, Block]]:
    """Name and block of each temporary shortcut, in order."""
    return [(name, block) for name, block in network.blocks() if block.fading is not None]


@torch.no_grad()
def set_fading(network: Network, progress: float) -> None:
    """Weights λ of temporary shortcuts when ``progress`` of the fading is done: one block after the other goes 1 to 0.

    With B of them, block b (from 0, the first of the network goes first) has λ = b + 1 - B·progress, clipped to [0, 1].
    """
    blocks = fading_blocks(network)
    for number, (_, block) in enumerate(blocks):
        block.fading.fill_(min(1.0, max(0.0, number + 1 - len(blocks) * progress)))


def deployed_state(network: Network) -> dict[str, Tensor]:
    """The ``state_dict`` of ``network.arch``: without the projections of temporary shortcuts."""
    gone = tuple(f"{name}.downsample." for name, _ in fading_blocks(network))
    return {name: value for name, value in network.state_dict().items() if not name.startswith(gone)}


def parameter_count(network: nn.Module) -> int:
    """Number of trainable and fixed parameters (BN statistics are buffers and not counted)."""
    return sum(parameter.numel() for parameter in network.parameters())
