"""The deploy IR: a network after BN folding, as a flat list of steps that every exporter and engine compiles.

A plain network is a list in which each step reads its predecessor. A shortcut is a step that names an earlier tensor
to ``add`` before its ReLU, so the same IR holds ResNets. Free of torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rd_deploy.preprocessing import Preprocessing

INPUT = "images"


class ChainError(ValueError):
    """A chain that does not describe a network: a mistake of the program that made it, not of the user."""


@dataclass(frozen=True, eq=False)
class Conv:
    """``relu?(conv(source) + bias (+ add))``: cross-correlation, symmetric zero padding, one group.

    ``weight``: (out, in, height, width), ``bias``: (out,); ``add`` names a tensor of the output's shape.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    stride: int
    padding: int
    relu: bool
    source: str
    add: str | None = None


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Square max-pooling; the padding never wins (as if it were -infinity)."""

    name: str
    kernel: int
    stride: int
    padding: int
    source: str


@dataclass(frozen=True, eq=False)
class GlobalAveragePool:
    """(C, H, W) to (C,): the mean over the pixels."""

    name: str
    source: str


@dataclass(frozen=True, eq=False)
class Linear:
    """``weight @ source + bias``; ``weight``: (out, in), ``bias``: (out,)."""

    name: str
    weight: np.ndarray
    bias: np.ndarray
    source: str


Step = Conv | MaxPool | GlobalAveragePool | Linear


@dataclass(frozen=True, eq=False)
class Chain:
    """A network ready for deployment, in topological order; the last step gives the logits.

    ``input_shape``: (C, H, W) of one image after ``preprocessing``. Weights are float64 when they come from
    `rd_deploy.fold`; exporters round them once. ``arch`` is what rebuilds the training network.
    """

    steps: tuple[Step, ...]
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    arch: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    name: str = "network"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor for one image, without the batch, in the order they are made (`INPUT` first)."""
        shapes: dict[str, tuple[int, ...]] = {INPUT: tuple(self.input_shape)}
        for step in self.steps:
            for needed in sources(step):
                _check(needed in shapes, f"{step.name} reads {needed}, which does not exist yet")
            _check(step.name not in shapes, f"two tensors are named {step.name}")
            shapes[step.name] = output_shape(step, shapes)
        return shapes

    def macs(self) -> int:
        """Multiply-accumulates of convolutions and linear layers for one image (He et al. 2016 call them FLOPs)."""
        shapes = self.shapes()
        return sum(
            step.weight.size * int(np.prod(shapes[step.name][1:]))
            for step in self.steps
            if isinstance(step, Conv | Linear)
        )

    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(step.weight.size + step.bias.size for step in self.steps if isinstance(step, Conv | Linear))

    def sha256(self) -> str:
        """Identity of the weights: hash over names, shapes and float32 values, the same for every export precision."""
        digest = hashlib.sha256()
        for step in self.steps:
            for part, values in weights(step):
                digest.update(f"{step.name}.{part}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values, dtype="<f4"))
        return digest.hexdigest()

    def check(self) -> None:
        """Raise `ChainError` unless shapes fit, values are finite, every tensor is used and logits come out."""
        _check(bool(self.steps), "a chain needs steps")
        _check(len(self.input_shape) == 3 and min(self.input_shape) >= 1, "the input must be (C, H, W)")
        _check(self.input_shape[0] == self.preprocessing.channels, "preprocessing has other channels than the input")
        shapes = self.shapes()
        last = self.steps[-1].name
        _check(
            shapes[last] == (len(self.classes),), f"{last} gives {shapes[last]}, not {len(self.classes)} class logits"
        )
        used = {needed for step in self.steps for needed in sources(step)} | {last}
        _check(set(shapes) == used, f"nothing reads {', '.join(sorted(set(shapes) - used))}")
        for step in self.steps:
            for part, values in weights(step):
                _check(bool(np.isfinite(values).all()), f"{step.name}.{part} holds NaN or infinity")


def sources(step: Step) -> tuple[str, ...]:
    """The tensors a step reads; the one it adds comes last."""
    added = step.add if isinstance(step, Conv) else None
    return (step.source,) if added is None else (step.source, added)


def weights(step: Step) -> tuple[tuple[str, np.ndarray], ...]:
    """``("weight", array), ("bias", array)`` of a step, or nothing."""
    return (("weight", step.weight), ("bias", step.bias)) if isinstance(step, Conv | Linear) else ()


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, as float32; infinite beyond its range."""
    return round_to(values, bits=8, least=-133)


def round_to(values: np.ndarray, bits: int, least: int) -> np.ndarray:
    """To the nearest number of ``bits`` significant bits that is a multiple of 2^least, ties to even, as float32.

    In one step from float64: by way of float32, as ml_dtypes does it, what rounds to a tie there would round once more.
    """
    values = values.astype(np.float64)
    _, exponent = np.frexp(values)  # values are below 2^exponent
    unit = np.maximum(exponent - bits, least)
    return np.ldexp(np.rint(np.ldexp(values, -unit)), unit).astype(np.float32)


def output_shape(step: Step, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a step's output for one image; raises `ChainError` when its operands do not fit."""
    shape = shapes[step.source]
    if isinstance(step, Linear):
        out, wanted = step.weight.shape
        _check(shape == (wanted,), f"{step.name} needs {wanted} features, {step.source} is {shape}")
        _check(step.bias.shape == (out,), f"{step.name} needs a bias of {out}")
        return (out,)
    _check(len(shape) == 3, f"{step.name} needs an image (C, H, W), {step.source} is {shape}")
    if isinstance(step, GlobalAveragePool):
        return shape[:1]
    _check(step.stride >= 1 and step.padding >= 0, f"{step.name} needs a positive stride and no negative padding")
    if isinstance(step, MaxPool):
        _check(2 * step.padding <= step.kernel, f"{step.name} pads more than half its kernel")
        return shape[0], *_slides(step, shape[1:], (step.kernel, step.kernel))
    return _conv_shape(step, shape, shapes)


def _conv_shape(step: Conv, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    _check(step.weight.ndim == 4, f"{step.name} needs a weight (out, in, height, width)")
    out, wanted, *kernel = step.weight.shape
    _check(shape[0] == wanted, f"{step.name} needs {wanted} channels, {step.source} has {shape[0]}")
    _check(step.bias.shape == (out,), f"{step.name} needs a bias of {out}")
    result = (out, *_slides(step, shape[1:], tuple(kernel)))
    if step.add is not None:
        _check(shapes[step.add] == result, f"{step.name} is {result} and cannot add {step.add}, {shapes[step.add]}")
    return result


def _slides(step: Conv | MaxPool, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of a sliding window along height and width."""
    count = tuple((s + 2 * step.padding - k) // step.stride + 1 for s, k in zip(size, kernel, strict=True))
    _check(min(count) >= 1, f"{step.name}: a window of {kernel} does not fit into {step.source}, {size}")
    return count


def run_chain(chain: Chain, images: np.ndarray) -> Iterator[tuple[Step, np.ndarray]]:
    """Run a chain step by step in numpy, in the images' dtype: the slow, obvious reference for every engine.

    ``images``: (N, C, H, W), of any size that fits the network; yields each step with its output (N, ...). Tensors
    are dropped after their last reader.
    """
    last_reader = {needed: index for index, step in enumerate(chain.steps) for needed in sources(step)}
    alive = {INPUT: images}
    for index, step in enumerate(chain.steps):
        alive[step.name] = output = run_step(step, alive)
        yield step, output
        for needed in sources(step):
            if last_reader[needed] == index:
                alive.pop(needed, None)


def run_step(step: Step, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The output of one step, (N, ...), given the tensors it reads."""
    x = tensors[step.source]
    if isinstance(step, GlobalAveragePool):
        return x.mean(axis=(2, 3))
    if isinstance(step, Linear):
        return x @ step.weight.T.astype(x.dtype) + step.bias.astype(x.dtype)
    if isinstance(step, MaxPool):
        return _windows(x, step, (step.kernel, step.kernel), -np.inf).max(axis=(4, 5))
    windows = _windows(x, step, step.weight.shape[2:], 0.0)
    out = np.tensordot(windows, step.weight.astype(x.dtype), axes=((1, 4, 5), (1, 2, 3)))
    out = (out + step.bias.astype(x.dtype)).transpose(0, 3, 1, 2)
    if step.add is not None:
        out = out + tensors[step.add]
    return np.maximum(out, 0) if step.relu else out


def _windows(x: np.ndarray, step: Conv | MaxPool, kernel: tuple[int, ...], fill: float) -> np.ndarray:
    """(N, C, H, W) to the view (N, C, H', W', kernel height, kernel width)."""
    pad = (step.padding, step.padding)
    padded = np.pad(x, ((0, 0), (0, 0), pad, pad), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))
    return windows[:, :, :: step.stride, :: step.stride]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ChainError(message)
