"""Parity: the figures are right, and what is wrong does not pass."""

import dataclasses
import json
import math

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rd_deploy import parity
from rd_deploy.common import UserError
from rd_deploy.export.native import to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import source_from_name
from rd_deploy.parity import (
    TOLERANCES,
    ParityError,
    check_parity,
    check_quantized,
    compare,
    distinct,
    native_ways,
    onnx_runner,
    round_up,
    torch_logits,
)
from rd_deploy.quantize import KINDS, calibrate, to_qdq
from rd_deploy.random_weights import random_images

TOLERANCE = TOLERANCES["fp32"]


@pytest.fixture(scope="module")
def source():
    return source_from_name("resnet20", 16, width=0.25, classes=6)


@pytest.fixture(scope="module")
def images():
    return random_images(10, 3, 16, seed=9)


def content(chain) -> bytes:
    return to_onnx(chain).SerializeToString()


def test_figures_are_what_numpy_says():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(50, 40)).astype(np.float32) * 7
    error = rng.normal(size=reference.shape) * 0.01
    error[3, 5] = 0.5
    parity = compare(reference, reference + error, tolerance=0.1)
    deviation = reference.astype(np.float64).std()
    assert parity.deviation == pytest.approx(deviation)
    assert parity.max_error == pytest.approx(0.5 / deviation, rel=1e-5)
    assert parity.mean_error == pytest.approx(np.abs(error).mean() / deviation, rel=1e-4)
    assert parity.p999_error == pytest.approx(np.quantile(np.abs(error), 0.999) / deviation, rel=1e-4)
    assert parity.to_dict()["max_abs_error"] == pytest.approx(0.5, rel=1e-5)
    assert parity.passes


def test_top1_agreement_counts_images():
    reference = np.eye(4) * 2
    candidate = reference.copy()
    candidate[1] = candidate[1, ::-1]
    assert compare(reference, candidate, 1.0).top1_agreement == 0.75


def test_only_clear_changes_of_the_class_count_and_no_tolerance_covers_them():
    """All images change class; in the reference, class 0 leads by ``margin``."""
    for margin, clear in ((0.1, 0), (0.5, 10)):
        reference = np.random.default_rng(0).normal(size=(10, 100)).clip(-2, 2)  # of standard deviation 1
        reference[:, :2] = 2.5 + margin, 2.5
        parity = compare(reference, reference[:, [1, 0, *range(2, 100)]], tolerance=1e9)
        assert (parity.top1_agreement, parity.clear_changes) == (0, clear)
        assert parity.passes
        assert parity.keeps_classes == (not clear)
        assert math.isinf(parity.minimum_tolerance) == bool(clear)


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_the_minimum_tolerance_passes_and_can_be_typed(value):
    rounded = round_up(value)
    assert value <= rounded <= value * 1.1001
    assert float(f"{rounded:g}") == rounded


def test_a_tolerance_that_is_met_exactly_passes():
    reference = np.array([[0.0, 1.0], [1.0, 0.0]])
    parity = compare(reference, reference + 0.125, 0.25)
    assert parity.max_error == 0.25
    assert parity.passes
    assert not compare(reference, reference + 0.1251, 0.25).passes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_candidate_with_nan_never_passes(bad):
    reference = np.random.default_rng(0).normal(size=(4, 3))
    candidate = reference.copy()
    candidate[2, 1] = bad
    parity = compare(reference, candidate, tolerance=1e9)
    assert not parity.passes
    assert math.isinf(parity.minimum_tolerance)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (np.zeros((4, 3)), "same logit to every class"),
        (np.full((4, 3), 2.5), "same logit to every class"),
        (np.arange(4.0)[:, None] + np.zeros((4, 3)), "same logit to every class"),
        (np.zeros((4, 3)) + np.arange(3.0), "same logits for every image"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, np.inf]]), "NaN or infinity"),
    ],
)
def test_a_degenerate_reference_does_not_pass_even_against_itself(reference, message):
    with pytest.raises(ParityError, match=message):
        compare(reference, reference, 1.0)


def test_shapes_must_agree():
    with pytest.raises(ParityError, match=r"\(2, 4\)"):
        compare(np.eye(2, 3), np.eye(2, 4), 1.0)


# --- the whole check


def test_a_right_export_passes_at_batch_1_3_and_the_maximum(source, images):
    runs = check_parity(source.network, content(source.chain), images, TOLERANCE, max_batch=16)
    assert [(run.batch, run.parity.images) for run in runs] == [
        (1, 8),
        (3, 8),
        (16, 10),
    ]
    assert all(run.parity.max_error < 1e-4 and run.parity.top1_agreement == 1 for run in runs)


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_no_batch_is_over_a_small_maximum(source, images, max_batch):
    runs = check_parity(source.network, content(source.chain), images, TOLERANCE, max_batch)
    assert {run.batch for run in runs} == {1, max_batch}


def test_a_network_in_training_mode_is_judged_in_evaluation_and_left_alone(source, images):
    expected = torch_logits(source.network, images, 4)
    source.network.train()
    try:
        np.testing.assert_array_equal(torch_logits(source.network, images, 4), expected)
        assert source.network.training
    finally:
        source.network.eval()


def damage(chain, name: str, **changes):
    steps = tuple(dataclasses.replace(step, **changes) if step.name == name else step for step in chain.steps)
    return dataclasses.replace(chain, steps=steps)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("layer1.1.conv2", {"add": None}), ("layer2.0.downsample", {"relu": True}), ("layer3.2.conv1", {"relu": False})],
)
def test_a_wrong_graph_fails(source, images, name, changes):
    with pytest.raises(ParityError, match="parity failed"):
        check_parity(source.network, content(damage(source.chain, name, **changes)), images, TOLERANCE, 8)


def test_the_tolerance_that_a_failure_names_is_the_smallest_that_passes(source, images):
    bias = source.chain.steps[-1].bias
    model = content(damage(source.chain, "fc", bias=bias + np.linspace(0, 0.02, len(bias))))
    with pytest.raises(ParityError, match="smallest that would pass") as failure:
        check_parity(source.network, model, images, TOLERANCE, 8)
    minimum = float(str(failure.value).split("--tolerance ")[1].split()[0])
    assert minimum > 5 * TOLERANCE
    check_parity(source.network, model, images, minimum, 8)
    with pytest.raises(ParityError):
        check_parity(source.network, model, images, minimum / 1.11, 8)


def test_swapped_classes_fail_at_any_tolerance(source, images):
    last = source.chain.steps[-1]
    swapped = damage(source.chain, "fc", weight=last.weight[::-1], bias=last.bias[::-1])
    with pytest.raises(ParityError, match=r"images get another class .* no tolerance would pass"):
        check_parity(source.network, content(swapped), images, 1e9, 8)


def test_fp16_is_also_judged_with_rounded_activations(source, images):
    model = to_onnx(source.chain, "fp16").SerializeToString()
    runs = check_parity(source.network, model, images, TOLERANCES["fp16"], 8, "fp16")
    assert [run.engine for run in runs[-2:]] == ["onnxruntime", "onnxruntime, activations rounded to fp16"]
    assert runs[-1].parity.max_error != runs[-2].parity.max_error


def test_bf16_is_judged_with_rounded_activations_at_every_batch(source, images):
    model = to_onnx(source.chain, "bf16").SerializeToString()
    runs = check_parity(source.network, model, images, TOLERANCES["bf16"], 8, "bf16")
    assert [(run.engine, run.batch) for run in runs] == [
        ("onnxruntime, activations rounded to bf16", batch) for batch in (1, 3, 8)
    ]
    wrong = to_onnx(damage(source.chain, "conv1", relu=False), "bf16").SerializeToString()
    with pytest.raises(ParityError, match="parity failed"):
        check_parity(source.network, wrong, images, TOLERANCES["bf16"], 8, "bf16")


@pytest.fixture(scope="module")
def quantised(source, images):
    return {kind: to_qdq(source.chain, calibrate(source.chain, kind, "minmax", [images]), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_file_means_the_same_to_every_kernel_and_batch(quantised, images, kind):
    runs = check_quantized(quantised[kind].SerializeToString(), images, TOLERANCES[kind], 8, kind)
    assert [(run.engine, run.batch, run.parity.images) for run in runs] == [
        ("onnxruntime", 1, 8),
        ("onnxruntime", 3, 8),
        ("onnxruntime", 8, 10),
    ]
    assert all(run.parity.max_error < TOLERANCES[kind] for run in runs)


def test_kernels_that_compute_another_network_fail(quantised, images, monkeypatch):
    """ONNX Runtime 1.32 with the pass that drops ReLUs before a float8 Q."""
    model = quantised["fp8"].SerializeToString()
    real = parity.onnx_runner

    def runner(model, threads=0, literal=False):
        monkeypatch.setattr(parity, "WRONG_OPTIMIZERS", ["ReluQuantRewrite"] if literal else [])
        return real(model, threads, literal)

    monkeypatch.setattr(parity, "onnx_runner", runner)
    with pytest.raises(ParityError, match="parity failed"):
        check_quantized(model, images, TOLERANCES["fp8"], 8, "fp8")


def test_without_a_tolerance_errors_are_reported_and_only_nan_fails():
    reference = np.random.default_rng(0).normal(size=(10, 4))
    found = compare(reference, -reference, None)
    assert found.max_error > 1
    assert found.clear_changes > 0
    assert (found.passes, found.keeps_classes) == (True, True)
    json.dumps(found.to_dict(), allow_nan=False)
    broken = compare(reference, reference * np.nan, None)
    assert (broken.passes, broken.keeps_classes) == (False, False)


def test_activations_that_overflow_fp16_fail_although_the_cpu_computes_them(source, images):
    first = source.chain.steps[0]
    loud = to_onnx(damage(source.chain, "conv1", bias=first.bias + 6.5e4), "fp16").SerializeToString()
    assert np.isfinite(onnx_runner(loud, threads=1)(images)).all()
    with pytest.raises(ParityError, match=r"NaN or infinity.*rounded to fp16"):
        check_parity(source.network, loud, images, 1e9, 8, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_native_engine_is_judged_like_onnx_runtime(source, images, precision):
    tolerance = TOLERANCES[precision]
    right, wrong = (to_rdp(chain, precision) for chain in (source.chain, damage(source.chain, "conv1", relu=False)))
    runs = check_parity(source.network, right, images, tolerance, 4, precision, native_ways)
    assert [(run.batch, run.parity.images) for run in runs] == [(1, 8), (3, 8), (4, 10)]
    assert all(run.engine.startswith("native, ") and run.parity.max_error > 0 for run in runs)
    with pytest.raises(ParityError, match=r"parity failed: .* \(native, "):
        check_parity(source.network, wrong, images, tolerance, 4, precision, native_ways)


def test_a_model_that_does_not_load_fails(source, images):
    model = onnx.ModelProto()
    model.ParseFromString(content(source.chain))
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ParityError, match="refuses"):
        check_parity(source.network, model.SerializeToString(), images, TOLERANCE, 8)


def test_one_image_is_not_enough(source, images):
    with pytest.raises(UserError, match="at least 2"):
        check_parity(source.network, content(source.chain), images[:1], TOLERANCE, 8)
    with pytest.raises(UserError, match="at least 2 different"):
        check_parity(source.network, content(source.chain), images[[0, 0]], TOLERANCE, 8)


def test_doubles_are_left_out_in_the_order_of_the_images(source, images):
    np.testing.assert_array_equal(distinct(images[[3, 1, 3, 2, 1]]), images[[3, 1, 2]])
    runs = check_parity(source.network, content(source.chain), images[[3, 1, 3, 2, 1]], TOLERANCE, max_batch=4)
    assert [run.parity.images for run in runs] == [3, 3, 3]


def test_every_image_is_judged_when_there_are_more_than_the_largest_batch(source):
    images = random_images(21, 3, 16, seed=4)
    model = content(source.chain)
    assert [run.parity.images for run in check_parity(source.network, model, images, TOLERANCE, 4)] == [8, 8, 21]


def test_the_runner_takes_any_batch(source, images):
    run = onnx_runner(content(source.chain), threads=1)
    whole = run(images)
    for size in (1, 4):
        np.testing.assert_allclose(run(images[:size]), whole[:size], rtol=0, atol=1e-5)
