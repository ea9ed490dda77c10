"""Ranges against NumPy on the same feature maps; images that say nothing are refused."""

import dataclasses

import numpy as np
import pytest
from chains import basics, bottlenecks, images_for

from rd_deploy.chain import INPUT, run_chain
from rd_deploy.common import UserError
from rd_deploy.quantize import CALIBRATORS, KINDS, CalibrationError, calibrate
from rd_deploy.quantize.calibrate import BATCH_BYTES, batch_size
from rd_deploy.quantize.qdq import quantized_tensors


@pytest.fixture(scope="module")
def chain():
    return basics(widths=(8,), shortcuts=True)  # few feature maps: entropy takes its time over each


@pytest.fixture(scope="module")
def images(chain):
    return images_for(chain, 12)


@pytest.fixture(scope="module")
def maps(chain, images):
    """All feature maps in float64."""
    return {INPUT: images, **{step.name: output for step, output in run_chain(chain, images.astype(np.float64))}}


def test_minmax_is_the_largest_absolute_value_of_what_is_quantised(chain, images, maps):
    ranges = calibrate(chain, "int8", "minmax", [images])
    assert tuple(ranges) == quantized_tensors(chain, KINDS["int8"])
    for name, value in ranges.items():
        assert value == pytest.approx(np.abs(maps[name]).max(), rel=1e-5)


@pytest.mark.parametrize("method", ["minmax", "percentile", "distribution"])
def test_batches_of_any_size_give_the_ranges_of_all_images(chain, images, method):
    whole = calibrate(chain, "fp8", method, [images])
    parts = calibrate(chain, "fp8", method, (images[at : at + 5] for at in range(0, len(images), 5)))
    for name, value in whole.items():  # bins grow from the first batch on, so histograms differ a little
        assert parts[name] == pytest.approx(value, rel=1e-6 if method == "minmax" else 0.05)


def test_percentile_is_numpys(chain, images, maps):
    for name, value in calibrate(chain, "int8", "percentile", [images]).items():
        values = np.abs(maps[name])
        width = values.max() / 2048  # of a bin
        assert value == pytest.approx(np.quantile(values, 0.9999, method="inverted_cdf"), abs=float(1.01 * width))


def test_entropy_stays_between_a_quarter_and_all_of_the_largest_value(chain, images):
    largest, ranges = (calibrate(chain, "int8", method, [images]) for method in ("minmax", "entropy"))
    shares = np.array([ranges[name] / largest[name] for name in ranges])
    assert ((shares > 0.24) & (shares < 1.001)).all()
    assert (shares < 0.95).any()  # with its default options it returns the largest value


def test_distribution_matches_standard_deviations(chain, images, maps):
    numbers = np.array([(m + (8 if e else 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)])[:-1]
    deviation = np.sqrt((numbers**2).mean())  # symmetric, so of mean 0
    for name, value in calibrate(chain, "fp8", "distribution", [images]).items():
        assert value == pytest.approx(448 * maps[name].std() / deviation, rel=0.01)


def test_distribution_is_for_fp8_and_other_names_are_unknown(chain, images):
    with pytest.raises(UserError, match="'distribution' is none of int8's"):
        calibrate(chain, "int8", "distribution", [images])
    with pytest.raises(UserError, match="did you mean 'percentile'"):
        calibrate(chain, "fp8", "percentil", [images])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", CALIBRATORS["fp8"])
def test_images_that_are_not_finite_are_refused(chain, images, method, bad):
    broken = images.copy()
    broken[7, 0, 3, 3] = bad
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        calibrate(chain, "fp8", method, [broken[:6], broken[6:]])


def with_bias(chain, name: str, change: float):
    steps = (dataclasses.replace(s, bias=s.bias + change) if s.name == name else s for s in chain.steps)
    return dataclasses.replace(chain, steps=tuple(steps))


@pytest.mark.parametrize("method", CALIBRATORS["fp8"])
def test_a_dead_feature_map_is_named(method):
    chain = basics()
    with pytest.raises(CalibrationError, match=f"{method} finds nothing but 0 in conv1"):
        calibrate(with_bias(chain, "conv1", -1e6), "fp8", method, [images_for(chain, 4)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # onnxruntime's, about what the test is about
@pytest.mark.parametrize("method", CALIBRATORS["int8"])
def test_a_feature_map_beyond_float32_is_named(method):
    chain = basics()
    chain = with_bias(with_bias(chain, "conv0", 1e38), "conv1", 1e38)
    with pytest.raises(CalibrationError, match="finds no"):
        calibrate(chain, "int8", method, [images_for(chain, 4)])


@pytest.mark.parametrize("method", CALIBRATORS["int8"])
def test_a_constant_feature_map_has_a_range(method):
    chain = basics()
    steps = (
        dataclasses.replace(s, weight=0 * s.weight, bias=0 * s.bias + 3) if s.name == "conv1" else s
        for s in chain.steps
    )
    ranges = calibrate(dataclasses.replace(chain, steps=tuple(steps)), "fp8", method, [images_for(chain, 4)])
    assert 0 < ranges["conv1"] < 100


def test_an_outlier_stretches_minmax_but_not_percentile(chain, images):
    loud = images.copy()
    loud[0, 0, 0, 0] = 1e3
    assert calibrate(chain, "int8", "minmax", [loud])["images"] == 1e3
    assert calibrate(chain, "int8", "percentile", [images] * 8 + [loud])["images"] < 10


def test_one_batch_is_in_memory_at_a_time(chain, images):
    seen = []

    def batches():
        for at in range(0, 12, 3):
            seen.append(at)
            yield images[at : at + 3]

    calibrate(chain, "int8", "minmax", batches())
    assert seen == [0, 3, 6, 9]
    wide = bottlenecks(size=(800, 800))
    values = sum(int(np.prod(shape)) for shape in wide.shapes().values())
    assert batch_size(chain) == 64
    assert batch_size(wide) == BATCH_BYTES // (4 * values) < 64


def test_no_images_are_refused(chain):
    with pytest.raises(CalibrationError, match="minmax finds no ranges"):
        calibrate(chain, "int8", "minmax", [])
