"""From a chain to the list of kernel launches that runs it, with one arena for everything that they write.

A plain chain's steps can be one kernel each or be fused: [stem, max-pool, reduce], [3x3, expand, reduce] or only
[expand, reduce], [expand, average]. For each of these places the cheapest way is taken: by the model of
`rd_deploy.triton_kernels.cost`, or by times that were measured on the card (`rd_deploy.cuda.tune`). Residual networks
run on the same kernels, each sum within the convolution before it and in place where the shortcut dies there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, Step, sources
from rd_deploy.common import UserError
from rd_deploy.cuda.arena import Interval, most_alive, place
from rd_deploy.triton_kernels.bottleneck import BottleneckKernel
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.conv import ConvKernel
from rd_deploy.triton_kernels.cost import Prediction
from rd_deploy.triton_kernels.expand_pool import ExpandPoolKernel
from rd_deploy.triton_kernels.expand_reduce import ExpandReduceKernel
from rd_deploy.triton_kernels.launch import ELEMENT, Kernel, Work
from rd_deploy.triton_kernels.pools import AveragePoolKernel, MaxPoolKernel
from rd_deploy.triton_kernels.stem import StemKernel

Fusion = Literal["auto", "always", "never"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
TYPE_BYTES = {ELEMENT: 2, "fp32": 4, "i32": 4}


@dataclass(frozen=True)
class Piece:
    """Chain steps that one kernel computes: it reads the first one's source and writes the last one's output."""

    steps: tuple[Step, ...]
    kernel: Kernel


@dataclass(frozen=True)
class PlanStep:
    """One launch. ``us``: its time by measurement if ``measured``, else as predicted."""

    piece: Piece
    config: Any
    prediction: Prediction
    us: float
    measured: bool

    @property
    def name(self) -> str:
        return " · ".join(step.name for step in self.piece.steps)

    @property
    def kernel(self) -> str:
        """What kind of kernel, such as "Bottleneck"."""
        return type(self.piece.kernel).__name__.removesuffix("Kernel")

    @property
    def settings(self) -> str:
        """The configuration in words."""
        return " ".join(f"{key}={value}" for key, value in vars(self.config).items())

    @property
    def work(self) -> Work:
        return self.piece.kernel.work(self.config)

    @property
    def predicted_us(self) -> float:
        return self.prediction.us

    @property
    def flops(self) -> int:
        return self.work.flops

    @property
    def map_bytes(self) -> int:
        return self.work.map_bytes

    @property
    def weight_bytes(self) -> int:
        return self.work.weight_bytes

    @property
    def source(self) -> str:
        return self.piece.steps[0].source

    @property
    def add(self) -> str | None:
        last = self.piece.steps[-1]
        return last.add if isinstance(last, Conv) else None

    @property
    def out(self) -> str:
        return self.piece.steps[-1].name


@dataclass(frozen=True)
class Plan:
    """How a network runs at one batch size on one card.

    ``offsets``: bytes into the arena of each tensor that a launch writes, but for the logits, and of each scratch
    operand, named "step/operand". ``feature_map_bytes``: the most bytes of feature maps alive at once, images and
    logits, which are the caller's, left out. ``scratch_bytes``: of the arena, what partial sums and counters add.
    """

    card: Card
    batch: int
    steps: tuple[PlanStep, ...]
    offsets: dict[str, int]
    arena_bytes: int
    feature_map_bytes: int

    @property
    def scratch_bytes(self) -> int:
        return self.arena_bytes - self.feature_map_bytes

    @property
    def predicted_us(self) -> float:
        return sum(step.predicted_us for step in self.steps)

    @property
    def us(self) -> float:
        return sum(step.us for step in self.steps)

    @property
    def weight_bytes(self) -> int:
        return sum(step.weight_bytes for step in self.steps)


# A piece and one configuration of its kernel to microseconds, or None for what must not be used.
Stopwatch = Callable[[Piece, Any], float | None]


def build_plan(
    chain: Chain, batch: int, card: Card, fusion: Fusion = "auto", stopwatch: Stopwatch | None = None
) -> Plan:
    """The fastest way that is known: by ``stopwatch``, which measures, or without one by the model.

    ``fusion``: "always" takes the most fused way that the kernels allow, "never" a launch for every step of the chain.
    Raises `UserError` for a chain or a batch that no kernel takes.
    """
    if fusion not in FUSIONS:
        raise UserError(f"fusion '{fusion}' is unknown (known: {', '.join(FUSIONS)})")
    steps: list[PlanStep] = []
    chosen: dict[tuple[Kernel, ...], tuple[int, list[Choice]]] = {}  # stages repeat the same shapes
    for ways in places(chain, batch):
        ways = _allowed(ways, fusion)
        key = tuple(piece.kernel for way in ways for piece in way)
        if key not in chosen:
            chosen[key] = _cheapest(ways, card, stopwatch)
        index, choices = chosen[key]
        steps += [
            PlanStep(piece, *choice, stopwatch is not None) for piece, choice in zip(ways[index], choices, strict=True)
        ]
    return layout(chain, batch, card, tuple(steps))


@lru_cache(maxsize=4096)
def configs(kernel: Kernel, card: Card) -> tuple[Any, ...]:
    """What is worth timing; ranking it takes some tens of milliseconds, and it is asked for more than once."""
    return kernel.configs(card)


class NothingToRun(UserError):
    """No way to compute a place of the chain is left, not even ``kernel``, one of its least fused."""

    def __init__(self, piece: Piece, card: Card):
        super().__init__(f"no configuration of {piece.kernel} may be used on {card.name}")
        self.kernel = piece.kernel


Choice = tuple[Any, Prediction, float]  # a configuration, its prediction, its time


def _cheapest(ways: list[list[Piece]], card: Card, stopwatch: Stopwatch | None) -> tuple[int, list[Choice]]:
    """Which way, and the fastest configuration of each of its kernels."""
    timed = [[_fastest(piece, card, stopwatch) for piece in way] for way in ways]
    possible = [index for index, way in enumerate(timed) if all(way)]
    if not possible:
        raise NothingToRun(next(p for p, choice in zip(ways[-1], timed[-1], strict=True) if choice is None), card)
    index = min(possible, key=lambda index: sum(us for _, _, us in timed[index]))
    return index, timed[index]


def _fastest(piece: Piece, card: Card, stopwatch: Stopwatch | None) -> Choice | None:
    """None: no configuration may be used."""
    choices = []
    for config in configs(piece.kernel, card):
        prediction = piece.kernel.predict(config, card)
        us = prediction.us if stopwatch is None else stopwatch(piece, config)
        if us is not None:
            choices.append((config, prediction, us))
    return min(choices, key=lambda choice: choice[2], default=None)


def _allowed(ways: list[list[Piece]], fusion: Fusion) -> list[list[Piece]]:
    """The ways whose kernels take these shapes, most fused first; the last way is one launch a step."""
    if fusion == "never":
        ways = ways[-1:]
    possible, reason = [], None
    for way in ways:
        try:
            for piece in way:
                piece.kernel.check()
            possible.append(way)
        except UserError as error:
            reason = error
    if not possible:
        raise reason
    return possible[:1] if fusion == "always" else possible


def places(chain: Chain, batch: int) -> Iterator[list[list[Piece]]]:
    """The chain cut into places, each with the ways to compute it, from the most fused to one launch a step."""
    maker = _Maker(chain, batch)
    index = 0
    while index < len(chain.steps):
        length = next(length for length in (3, 2, 1) if maker.fits(index, length))
        yield maker.ways(chain.steps[index : index + length])
        index += length


class _Maker:
    """Finds what can be fused and describes it as kernels."""

    def __init__(self, chain: Chain, batch: int):
        self.batch, self.steps, self.shapes = batch, chain.steps, chain.shapes()
        self.readers = Counter(needed for step in chain.steps for needed in sources(step))

    def fits(self, index: int, length: int) -> bool:
        """Whether so many steps from here are a place: each but the last is read by its successor alone."""
        steps = self.steps[index : index + length]
        if len(steps) < length:
            return False
        linked = all(
            after.source == before.name and self.readers[before.name] == 1 for before, after in pairwise(steps)
        )
        return length == 1 or (linked and _is_fusable(steps))

    def ways(self, steps: tuple[Step, ...]) -> list[list[Piece]]:
        single = [Piece((step,), self.single(step)) for step in steps]
        if len(steps) == 1:
            return [single]
        if isinstance(steps[1], MaxPool):
            stems = [[Piece(steps, self.stem(steps))]]
            if len(steps) == 3:
                stems.append([Piece(steps[:2], self.stem(steps[:2])), single[2]])
            return [*stems, single]
        if isinstance(steps[1], GlobalAveragePool):
            return [[Piece(steps, ExpandPoolKernel(*self.source(steps[0]), len(steps[0].bias)))], single]
        return [
            [Piece(steps, self.bottleneck(steps))],
            [single[0], Piece(steps[1:], self.expand_reduce(steps[1:]))],
            single,
        ]

    def source(self, step: Step) -> tuple[int, int, int, int]:
        """What a step reads: batch, height, width, channels."""
        channels, height, width = [*self.shapes[step.source], 1, 1][:3]
        return self.batch, height, width, channels

    def single(self, step: Step) -> Kernel:
        batch, height, width, channels = self.source(step)
        if isinstance(step, MaxPool):
            return MaxPoolKernel(batch, height, width, channels, step.kernel, step.stride, step.padding)
        if isinstance(step, GlobalAveragePool):
            return AveragePoolKernel(batch, height, width, channels)
        last = step is self.steps[-1]
        if isinstance(step, Linear):
            return ConvKernel(batch, 1, 1, channels, len(step.bias), 1, 1, 1, 0, relu=False, fp32_out=last)
        shape = (len(step.bias), *step.weight.shape[2:], step.stride, step.padding)
        return ConvKernel(batch, height, width, channels, *shape, relu=step.relu, add=step.add is not None)

    def stem(self, steps: tuple[Step, ...]) -> StemKernel:
        conv, pool = steps[:2]
        reduce = len(steps[2].bias) if len(steps) == 3 else 0
        shape = (len(conv.bias), conv.weight.shape[2], conv.stride, conv.padding)
        return StemKernel(*self.source(conv), *shape, pool.kernel, pool.stride, pool.padding, reduce)

    def bottleneck(self, steps: tuple[Step, ...]) -> BottleneckKernel:
        conv, expand, reduce = steps
        return BottleneckKernel(*self.source(conv), len(expand.bias), len(reduce.bias), conv.stride)

    def expand_reduce(self, steps: tuple[Step, ...]) -> ExpandReduceKernel:
        return ExpandReduceKernel(*self.source(steps[0]), len(steps[0].bias), len(steps[1].bias))


def _is_fusable(steps: tuple[Step, ...]) -> bool:
    """Whether kernels exist for this kind of sequence; their `check` decides about its shapes."""
    first, second, *third = steps
    if isinstance(second, MaxPool):
        stem = first.source == INPUT and _is_plain(first) and first.weight.shape[2] == first.weight.shape[3]
        return stem and all(_is_pointwise(step) for step in third)
    if isinstance(second, GlobalAveragePool):
        return not third and _is_pointwise(first)
    return bool(third) and _is_3x3(first) and _is_pointwise(second) and _is_pointwise(third[0])


def _is_plain(step: Step) -> bool:
    return isinstance(step, Conv) and step.relu and step.add is None


def _is_pointwise(step: Step) -> bool:
    return _is_plain(step) and step.weight.shape[2:] == (1, 1) and (step.stride, step.padding) == (1, 0)


def _is_3x3(step: Step) -> bool:
    """As wide as its input, which is what the fused kernel takes."""
    if not _is_plain(step):
        return False
    out, inputs, *kernel = step.weight.shape
    return out == inputs and kernel == [3, 3] and step.padding == 1


def layout(chain: Chain, batch: int, card: Card, steps: tuple[PlanStep, ...]) -> Plan:
    """Put all that the launches write into one arena."""
    shapes = chain.shapes()
    sizes = {name: batch * int(np.prod(shape)) * TYPE_BYTES[ELEMENT] for name, shape in shapes.items()}
    maps, homes = _lives(steps, sizes)
    offsets, arena = place([*maps.values(), *_scratch(steps)])
    offsets |= {name: offsets[home] for name, home in homes.items()}
    return Plan(card, batch, steps, offsets, arena, most_alive(list(maps.values())))


def _lives(steps: tuple[PlanStep, ...], sizes: dict[str, int]) -> tuple[dict[str, Interval], dict[str, str]]:
    """How long bytes are needed, and for a sum that is written over its shortcut, whose bytes it takes."""
    read = {name: index for index, step in enumerate(steps) for name in (step.source, step.add) if name}
    lives: dict[str, Interval] = {}
    homes: dict[str, str] = {}
    for index, step in enumerate(steps[:-1]):  # the last one writes the logits, which are the caller's
        last, home = read[step.out], homes.get(step.add, step.add)
        if home in lives and read[step.add] == index and step.source != step.add:
            homes[step.out] = home
            lives[home] = replace(lives[home], last=last)
        else:
            lives[step.out] = Interval(step.out, sizes[step.out], index, last)
    return lives, homes


def _scratch(steps: tuple[PlanStep, ...]) -> Iterator[Interval]:
    """Partial sums live for their launch; counters, which a launch leaves at zero, for ever."""
    for index, step in enumerate(steps):
        for operand, (kind, elements) in step.piece.kernel.scratch(step.config).items():
            first, last = (0, len(steps) - 1) if kind == "i32" else (index, index)
            yield Interval(f"{step.out}/{operand}", elements * TYPE_BYTES[kind], first, last)
