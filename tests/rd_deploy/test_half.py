"""Float16 and bfloat16 storage on the CPU against a NumPy execution that rounds after every operator."""

import dataclasses

import ml_dtypes
import numpy as np
import onnx
import pytest

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, run_step
from rd_deploy.export.half import with_half_storage
from rd_deploy.export.onnx import to_onnx
from rd_deploy.parity import ParityError, onnx_runner
from rd_deploy.preprocessing import Preprocessing

HALVES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def rounded_logits(chain: Chain, images: np.ndarray, dtype: type) -> np.ndarray:
    """Float64 arithmetic on half-precision weights; rounding after each operator (ReLU changes nothing)."""

    def half(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float64)

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
    """Weights with few bits: float32 sums are exact in any order, half-precision results are not."""

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


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("seed", range(5))
def test_every_result_is_rounded_as_numpy_rounds_it(seed, precision):
    rng = np.random.default_rng(seed)
    model, images = to_onnx(chain := exact_chain(rng), precision), rng.integers(-255, 256, (3, 2, 8, 8)) / 256
    stored = with_half_storage(model)
    onnx.checker.check_model(stored, full_check=True)
    logits = onnx_runner(stored.SerializeToString(), threads=1)(images.astype(np.float32))
    np.testing.assert_array_equal(logits, rounded_logits(chain, images, HALVES[precision]))
    other = next(dtype for name, dtype in HALVES.items() if name != precision)
    assert not np.array_equal(logits, rounded_logits(chain, images, other))


def test_onnxruntime_itself_does_not_round_float16_and_has_no_bfloat16():
    """Should it learn one of the two, that part of export/half.py can go."""
    rng = np.random.default_rng(0)
    chain, images = exact_chain(rng), rng.integers(-255, 256, (3, 2, 8, 8)).astype(np.float32) / 256
    logits = onnx_runner(to_onnx(chain, "fp16").SerializeToString(), threads=1)(images)
    assert not np.array_equal(logits, rounded_logits(chain, images, np.float16))
    with pytest.raises(ParityError, match=r"NOT_IMPLEMENTED.*Conv\(22\)"):
        onnx_runner(to_onnx(chain, "bf16").SerializeToString(), threads=1)


@pytest.mark.parametrize("precision", HALVES)
def test_the_given_model_is_not_changed(precision):
    model = to_onnx(exact_chain(np.random.default_rng(0)), precision)
    before = model.SerializeToString(deterministic=True)
    with_half_storage(model)
    assert model.SerializeToString(deterministic=True) == before
