"""The one network definition of the project: ResNets and their plain counterparts are one class with a switch.

The ReLU stands at the START of each block, so that what flows between blocks and stages is a pre-activation tensor:
those are the features that residual distillation splices and compares. It is the same function as torchvision's
ResNet v1.5 (stride on the 3x3), and the parameter names are torchvision's too, so its weights load with strict=True.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rd_deploy.common import UserError, nearest

Shortcuts = Literal["all", "projection", "none"]
Stem = Literal["imagenet", "small"]
Init = Literal["kaiming", "dirac"]

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
    """

    depth: int
    shortcuts: Shortcuts = "none"
    stem: Stem = "imagenet"
    width: float = 1.0
    in_channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        known = {**IMAGENET_DEPTHS, **CIFAR_DEPTHS}
        depths = ", ".join(map(str, sorted(known)))
        _check(isinstance(self.depth, int) and self.depth in known, f"depth {self.depth} is unknown (known: {depths})")
        _check(
            self.shortcuts in ("all", "projection", "none"),
            f"shortcuts '{self.shortcuts}' are unknown (known: all, projection, none)",
        )
        _check(self.stem in ("imagenet", "small"), f"stem '{self.stem}' is unknown (known: imagenet, small)")
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

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Arch":
        """Rebuild from a checkpoint's plain dict; unknown or missing entries are a `UserError`."""
        names = {field.name for field in fields(cls)}
        _check(isinstance(values, dict) and set(values) == names, f"architecture must have exactly {sorted(names)}")
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


class Block(nn.Module):
    """ReLU, two 3x3 (basic) or 1x1-3x3-1x1 (bottleneck) convolutions with BN, then the shortcut if there is one."""

    def __init__(self, arch: Arch, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * EXPANSION[arch.block]
        if arch.block == "basic":
            self.conv1, self.bn1 = _conv(c_in, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3, 1), nn.BatchNorm2d(width)
            self.conv3 = None
        else:
            self.conv1, self.bn1 = _conv(c_in, width, 1, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = _conv(width, c_out, 1, 1), nn.BatchNorm2d(c_out)
        self.has_shortcut = arch.shortcuts == "all" or (arch.shortcuts == "projection" and stride != 1)
        self.downsample = None
        if self.has_shortcut and (stride != 1 or c_in != c_out):
            self.downsample = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    @property
    def convs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The main path in order."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return pairs if self.conv3 is None else [*pairs, (self.conv3, self.bn3)]

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activation (N, C, H, W) to pre-activation (N, C', H/stride, W/stride)."""
        x = F.relu(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(F.relu(out)))
        if self.conv3 is not None:
            out = self.bn3(self.conv3(F.relu(out)))
        if self.has_shortcut:
            out = out + (x if self.downsample is None else self.downsample(x))
        return out


def _conv(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


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
    pass their input on and stay Kaiming.
    """
    _check(init in ("kaiming", "dirac"), f"init '{init}' is unknown (known: kaiming, dirac)")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if init == "kaiming":
        return
    for block in (module for module in network.modules() if isinstance(module, Block) and not module.has_shortcut):
        passed = min(conv.weight.shape[dim] for conv, _ in block.convs for dim in (0, 1))
        for conv, _ in block.convs:
            conv.weight.mul_(noise)
            channels, centre = torch.arange(passed), conv.kernel_size[0] // 2
            conv.weight[channels, channels, centre, centre] += 1.0


def parameter_count(network: nn.Module) -> int:
    """Number of trainable and fixed parameters (BN statistics are buffers and not counted)."""
    return sum(parameter.numel() for parameter in network.parameters())
