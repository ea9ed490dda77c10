"""Small chains with random weights, without torch, for the tests of what runs chains."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, Step, run_chain
from rd_deploy.export.files import Artefact, write_artefacts
from rd_deploy.preprocessing import Preprocessing


def export(make: Callable[..., Artefact], *arguments, **options) -> dict:
    """Write what an exporter's ``make`` makes; returns the sidecar."""
    artefact = make(*arguments, **options)
    write_artefacts([artefact])
    return artefact.sidecar


class ChainBuilder:
    """Adds steps one after the other; each reads the one before it unless told otherwise."""

    def __init__(self, channels: int, seed: int = 0):
        self.rng, self.steps, self.last = np.random.default_rng(seed), [], INPUT
        self.channels: dict[str, int] = {INPUT: channels}

    def add(self, step: Step, channels: int) -> str:
        self.steps.append(step)
        self.channels[step.name], self.last = channels, step.name
        return step.name

    def conv(self, out: int, kernel: int = 3, stride: int = 1, relu: bool = True, source=None, add=None) -> str:
        """Kaiming's scale, halved where something is added, so that activations keep their size."""
        source = source or self.last
        fan_in = self.channels[source] * kernel * kernel
        weight = self.rng.standard_normal((out, self.channels[source], kernel, kernel)) * np.sqrt(2 / fan_in)
        bias = self.rng.standard_normal(out) * 0.1
        name = f"conv{len(self.steps)}"
        weight = weight / 2 if add else weight
        return self.add(Conv(name, weight, bias, stride, kernel // 2, relu, source, add), out)

    def pool(self, kernel: int = 3, stride: int = 2) -> str:
        name = f"pool{len(self.steps)}"
        return self.add(MaxPool(name, kernel, stride, kernel // 2, self.last), self.channels[self.last])

    def finish(self, height: int, width: int, classes: int) -> Chain:
        inputs, images = self.channels[self.last], self.channels[INPUT]
        pooled = self.add(GlobalAveragePool("avgpool", self.last), inputs)
        weight = self.rng.standard_normal((classes, inputs)) / np.sqrt(inputs)
        self.add(Linear("fc", weight, self.rng.standard_normal(classes), pooled), classes)
        preprocessing = Preprocessing(min(height, width), min(height, width), images, (0.4,) * images, (0.3,) * images)
        names = tuple(f"class {index}" for index in range(classes))
        return Chain(tuple(self.steps), (images, height, width), preprocessing, names, name="test")


def bottlenecks(width=16, stages=(2, 2), size=(20, 20), channels=3, classes=7, shortcuts=False, seed=0) -> Chain:
    """7x7 stem and max-pooling, then stages of [1x1, 3x3, 1x1] of 4 times the width, the way of ResNet-50."""
    chain = ChainBuilder(channels, seed)
    chain.conv(width, 7, stride=2)
    chain.pool()
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            narrow, stride, entry = width << stage, 2 if stage and not block else 1, chain.last
            chain.conv(narrow, 1)
            middle = chain.conv(narrow, 3, stride)
            shortcut = entry
            if shortcuts and not block:
                shortcut = chain.conv(4 * narrow, 1, stride, relu=False, source=entry)
            chain.conv(4 * narrow, 1, source=middle, add=shortcut if shortcuts else None)
    return chain.finish(*size, classes)


def basics(widths=(16, 32), blocks=1, size=(12, 12), channels=1, classes=10, shortcuts=False, seed=0) -> Chain:
    """3x3 stem, then blocks of two 3x3 convolutions, the way of the ResNets for 32x32 images."""
    chain = ChainBuilder(channels, seed)
    chain.conv(widths[0], 3)
    for before, width in pairwise((widths[0], *widths)):
        for block in range(blocks):
            stride, entry = 2 if before != width and not block else 1, chain.last
            middle = chain.conv(width, 3, stride)
            shortcut = chain.conv(width, 1, stride, relu=False, source=entry) if shortcuts and stride == 2 else entry
            chain.conv(width, 3, source=middle, add=shortcut if shortcuts else None)
    return chain.finish(*size, classes)


def images_for(chain: Chain, count: int, seed: int = 1) -> np.ndarray:
    """float32 images (count, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((count, *chain.input_shape)).astype(np.float32)


def reference(chain: Chain, images: np.ndarray) -> np.ndarray:
    """Logits in float64 by the NumPy reference."""
    for _, output in run_chain(chain, images.astype(np.float64)):
        logits = output
    return logits
