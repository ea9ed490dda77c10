"""The chain: reference execution against torch, shapes and MACs against published figures, refusal of nonsense."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rd_deploy.chain import (
    INPUT,
    Chain,
    ChainError,
    Conv,
    GlobalAveragePool,
    Linear,
    MaxPool,
    round_to_bf16,
    run_chain,
    run_step,
)
from rd_deploy.fold import fold
from rd_deploy.preprocessing import Preprocessing
from rd_train.networks import Network, parse_arch

PREPROCESSING = Preprocessing(6, 6, 2, (0.5, 0.5), (1, 1))


def small_chain(**last_conv) -> Chain:
    """conv -> pool -> conv + shortcut -> pool -> linear, on (2, 6, 6)."""
    rng = np.random.default_rng(0)
    second = {"stride": 1, "padding": 1, "relu": True, "source": "pool", "add": "pool"} | last_conv
    steps = (
        Conv("a", rng.normal(size=(4, 2, 3, 3)), rng.normal(size=4), 1, 1, True, INPUT),
        MaxPool("pool", 3, 2, 1, "a"),
        Conv("b", rng.normal(size=(4, 4, 3, 3)), rng.normal(size=4), **second),
        GlobalAveragePool("mean", "b"),
        Linear("fc", rng.normal(size=(3, 4)), rng.normal(size=3), "mean"),
    )
    return Chain(steps, (2, 6, 6), PREPROCESSING, ("x", "y", "z"))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (7, 2, 3), (2, 3, 0)]
)
@pytest.mark.parametrize("add", [False, True])
def test_conv_is_torchs(kernel, stride, padding, add):
    rng = np.random.default_rng(kernel)
    x, weight, bias = rng.normal(size=(2, 3, 9, 11)), rng.normal(size=(5, 3, kernel, kernel)), rng.normal(size=5)
    expected = F.conv2d(*map(torch.from_numpy, (x, weight, bias)), stride, padding)
    shortcut = rng.normal(size=expected.shape)
    expected = (expected + torch.from_numpy(shortcut) * add).relu().numpy()
    step = Conv("y", weight, bias, stride, padding, True, "x", "shortcut" if add else None)
    np.testing.assert_allclose(run_step(step, {"x": x, "shortcut": shortcut}), expected, rtol=1e-12, atol=1e-12)


def test_negative_values_survive_max_pooling_at_the_border():
    x = -1 - np.random.default_rng(0).random((1, 2, 7, 7))
    expected = F.max_pool2d(torch.from_numpy(x), 3, 2, 1).numpy()
    np.testing.assert_array_equal(run_step(MaxPool("y", 3, 2, 1, "x"), {"x": x}), expected)


def test_running_gives_the_declared_shapes_in_the_images_dtype():
    chain = small_chain()
    chain.check()
    shapes = chain.shapes()
    images = np.random.default_rng(1).normal(size=(3, 2, 6, 6)).astype(np.float32)
    outputs = {step.name: output for step, output in run_chain(chain, images)}
    assert {name: output.shape for name, output in outputs.items()} == {
        name: (3, *shape) for name, shape in shapes.items() if name != INPUT
    }
    assert {output.dtype for output in outputs.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "macs"),
    # torchvision's published GFLOPs (1.81 and 4.09), exactly; the second needs the stride on the 3x3 (v1.5).
    [("resnet18", 1_814_073_344), ("resnet50", 4_089_184_256)],
)
def test_macs_are_the_published_ones(name, macs):
    chain = fold(Network(parse_arch(name)), 224)
    assert chain.macs() == macs


def test_a_plain_network_is_a_list_and_a_resnet_adds():
    plain, residual = (fold(Network(parse_arch(name, width=1 / 8)), 32) for name in ("plain50", "resnet50"))
    names = [INPUT, *(step.name for step in plain.steps)]
    assert [step.source for step in plain.steps] == names[:-1]
    assert not any(isinstance(step, Conv) and step.add for step in plain.steps)
    convs = [step for step in residual.steps if isinstance(step, Conv)]
    assert sum(step.add is not None for step in convs) == 16
    assert [step.name for step in convs if not step.relu] == [f"layer{stage}.0.downsample" for stage in (1, 2, 3, 4)]


def test_sha256_identifies_the_weights_at_float32():
    chain = small_chain()
    rounded = tuple(
        dataclasses.replace(step, weight=step.weight.astype(np.float32)) if hasattr(step, "weight") else step
        for step in chain.steps
    )
    changed = dataclasses.replace(chain.steps[0], bias=chain.steps[0].bias + 1e-3)
    assert dataclasses.replace(chain, steps=rounded).sha256() == chain.sha256()
    assert dataclasses.replace(chain, steps=(changed, *chain.steps[1:])).sha256() != chain.sha256()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere"}, "does not exist"),
        ({"source": "b"}, "does not exist"),
        ({"add": "a"}, "cannot add"),
        ({"add": None, "source": "a", "stride": 2}, "nothing reads pool"),
        ({"source": INPUT}, "needs 4 channels"),
        ({"stride": 0}, "positive stride"),
        ({"padding": 2}, "cannot add"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ChainError, match=message):
        small_chain(**change).check()


def test_bad_values_and_logits_are_refused():
    chain = small_chain()
    broken = dataclasses.replace(chain.steps[-1], bias=np.array([0, np.nan, 0]))
    for bad, message in (
        (dataclasses.replace(chain, steps=(*chain.steps[:-1], broken)), "NaN"),
        (dataclasses.replace(chain, classes=("x", "y")), "class logits"),
        (dataclasses.replace(chain, steps=(chain.steps[0], *chain.steps)), "two tensors"),
        (dataclasses.replace(chain, steps=()), "needs steps"),
        (dataclasses.replace(chain, input_shape=(3, 6, 6)), "channels"),
        (dataclasses.replace(chain, input_shape=(2, 0, 6)), "must be"),
    ):
        with pytest.raises(ChainError, match=message):
            bad.check()


# --- rounding


def torch_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def test_bf16_of_float32_values_is_torchs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 1 << 16, 10_000, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties, ties + 1, ties - 1, np.arange(300_000, dtype=np.uint32)]).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch_bf16(values)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_to_bf16(values).view(np.uint32), expected.view(np.uint32))


def test_bf16_of_float64_values_is_rounded_once():
    """Just above a tie: float32 would round to the tie, and the tie then to even."""
    value = 1 + 2.0**-8 + 2.0**-40
    assert round_to_bf16(np.array([value])) == 1 + 2.0**-7
    assert torch_bf16(np.array([value]).astype(np.float32)) == 1
    assert round_to_bf16(np.array([1 + 2.0**-8])) == 1  # a tie, to even


@given(st.floats(width=64, allow_nan=False, allow_infinity=False, min_value=0, max_value=3e38))
def test_bf16_is_the_nearest_value(value):
    rounded = round_to_bf16(np.array([value]))
    bits = rounded.view(np.uint32)
    assert bits[0] & 0xFFFF == 0
    for neighbour in (int(bits[0]) + 0x10000, max(int(bits[0]), 0x10000) - 0x10000):
        other = np.array([neighbour], np.uint32).view(np.float32)
        assert abs(float(rounded[0]) - value) <= abs(float(other[0]) - value)
