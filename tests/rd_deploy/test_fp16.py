"""Float16 storage on the CPU against a NumPy execution that rounds after every operator."""

import dataclasses

import numpy as np
import onnx
import pytest

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, run_step
from rd_deploy.export.fp16 import with_fp16_storage
from rd_deploy.export.onnx import to_onnx
from rd_deploy.parity import onnx_runner
from rd_deploy.preprocessing import Preprocessing


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def rounded_logits(chain: Chain, images: np.ndarray) -> np.ndarray:
    """Float64 arithmetic on float16 weights; rounding after each operator (ReLU changes nothing)."""
    tensors = {INPUT: half(images)}
    for step in chain.steps:
        if isinstance(step, Conv):
            plain = dataclasses.replace(step, weight=half(step.weight), bias=half(step.bias), relu=False, add=None)
            out = half(run_step(plain, tensors))
            out = half(out + tensors[step.add]) if step.add else out
            tensors[step.name] = np.maximum(out, 0) if step.relu else out
        elif hasattr(step, "weight"):
            plain = dataclasses.replace(step, weight=half(step.weight), bias=half(step.bias))
            tensors[step.name] = half(run_step(plain, tensors))
        else:
            tensors[step.name] = half(run_step(step, tensors))
    return tensors[chain.steps[-1].name]


def exact_chain(rng: np.random.Generator) -> Chain:
    """Weights with few bits: float32 sums are exact in any order, float16 results are not."""

    def values(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape) / 8

    steps = (
        Conv("a", values(4, 2, 3, 3), values(4), 1, 1, True, INPUT),
        MaxPool("pool", 3, 2, 1, "a"),
        Conv("b", values(4, 4, 3, 3), values(4), 1, 1, True, "pool", add="pool"),
        GlobalAveragePool("mean", "b"),
        Linear("fc", values(6, 4), values(6), "mean"),
    )
    return Chain(steps, (2, 8, 8), Preprocessing(8, 8, 2, (0, 0), (1, 1)), tuple("uvwxyz"))


@pytest.mark.parametrize("seed", range(5))
def test_every_result_is_rounded_as_numpy_rounds_it(seed):
    rng = np.random.default_rng(seed)
    model, images = to_onnx(chain := exact_chain(rng), "fp16"), rng.integers(-255, 256, (3, 2, 8, 8)) / 256
    stored = with_fp16_storage(model)
    onnx.checker.check_model(stored, full_check=True)
    logits = onnx_runner(stored.SerializeToString(), threads=1)(images.astype(np.float32))
    np.testing.assert_array_equal(logits, rounded_logits(chain, images))
    # ONNX Runtime by itself rounds only the logits; should it learn float16 one day, this module can go.
    assert not np.array_equal(onnx_runner(model.SerializeToString(), threads=1)(images.astype(np.float32)), logits)


def test_the_given_model_is_not_changed():
    model = to_onnx(exact_chain(np.random.default_rng(0)), "fp16")
    before = model.SerializeToString(deterministic=True)
    with_fp16_storage(model)
    assert model.SerializeToString(deterministic=True) == before
