"""Makes the fuzzer's seeds (tests/native/corpus): tiny networks with every kind of step, in both precisions.

    python tests/native/make_corpus.py [FOLDER]

A seed's first byte chooses what fuzz_rdp.cpp does with the others.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool
from rd_deploy.export.native import HEADER, to_rdp
from rd_deploy.preprocessing import Preprocessing

CORPUS = Path(__file__).parent / "corpus"
AS_IT_IS, FIXED_UP, GENERATED = b"\0", b"\1", b"\2"

# What the fuzzer found: a 1x1 convolution that adds the map it reads, fused with the convolution that makes it.
FOUND = (
    "32b0510699638a5376ad085b0b2d35ef8034c4506fb5dfcd0c54d5ef2c45034acd",
    "2e723f2bc2e90e6288554542c1b818602850be8923251ca8b182d23db92156dc5cb0bf3ab9c1e7818171e95f8304c5b13a57"
    "e48cd019d53852c23318112640d04e0702fa405da186b41fa4e5575ed6ef846a7c6392c29eee",
)


def values(*shape: int) -> np.ndarray:
    """Weights that bf16 holds exactly, the same on every machine."""
    return ((np.arange(np.prod(shape, dtype=int)) * 37 % 29 - 14) / 64).reshape(shape)


def conv(name: str, source: str, inputs: int, outputs: int, kernel: int, stride: int = 1, **changes) -> Conv:
    window = {"stride": stride, "padding": kernel // 2, "relu": True} | changes
    return Conv(name, values(outputs, inputs, kernel, kernel), values(outputs), source=source, **window)


def bottleneck() -> tuple[list, int]:
    """A plain network of ImageNet's form: a wide stem, a pool, a 3x3 between two 1x1."""
    return [
        conv("conv1", INPUT, 3, 8, 7, 2),
        MaxPool("maxpool", 3, 2, 1, "conv1"),
        conv("reduce", "maxpool", 8, 8, 1),
        conv("spatial", "reduce", 8, 8, 3),
        conv("expand", "spatial", 8, 32, 1),
        conv("narrow", "expand", 32, 17, 1, 2),
        GlobalAveragePool("avgpool", "narrow"),
    ], 17


def residual() -> tuple[list, int]:
    """A residual network of CIFAR's form, one channel in, with a strided projection."""
    return [
        conv("conv1", INPUT, 1, 4, 3),
        conv("block1.conv1", "conv1", 4, 4, 3),
        conv("block1.conv2", "block1.conv1", 4, 4, 3, add="conv1"),
        conv("block2.projection", "block1.conv2", 4, 8, 1, 2, relu=False),
        conv("block2.conv1", "block1.conv2", 4, 8, 3, 2),
        conv("block2.conv2", "block2.conv1", 8, 8, 3, add="block2.projection"),
        GlobalAveragePool("avgpool", "block2.conv2"),
    ], 8


def chains() -> dict[str, Chain]:
    made = {}
    for name, (steps, features), channels in (("bottleneck", bottleneck(), 3), ("residual", residual(), 1)):
        classes = ("cat", "Käfer", "🐸")
        head = Linear("fc", values(len(classes), features), values(len(classes)), "avgpool")
        preprocessing = Preprocessing(16, 18, channels, (0.5,) * channels, (0.25,) * channels)
        made[name] = Chain((*steps, head), (channels, 16, 16), preprocessing, classes, {"depth": 8}, {}, name)
    return made


def seeds() -> dict[str, bytes]:
    """Name and content of every seed."""
    found = {}
    for name, chain in chains().items():
        for precision in ("fp32", "bf16"):
            file = to_rdp(chain, precision)
            _, _, _, start, size, weights, *_ = HEADER.unpack_from(file)
            text = file[start : start + size]
            found[f"{name}-{precision}"] = AS_IT_IS + file
            found[f"{name}-{precision}-fixed-up"] = FIXED_UP + text + b"\0" + file[weights:]
    tricky = {"a": ['\u0000\u20ac\U0001f438"\\/\b', -0.5e-3, 12345678901234567890, True, None, {}], "b": [[[[]]]]}
    found["json"] = FIXED_UP + json.dumps(tricky).encode() + b"\0"
    for seed in range(8):
        found[f"generated-{seed}"] = GENERATED + bytes((seed + 1) * step * step % 251 for step in range(96))
    for number, text in enumerate(FOUND):
        found[f"found-{number}"] = bytes.fromhex(text)
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CORPUS)
