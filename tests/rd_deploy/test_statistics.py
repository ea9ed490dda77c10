"""Paired statistics on synthetic samples whose truth is known."""

import numpy as np
import pytest

from rd_deploy.bench import statistics
from rd_deploy.bench.statistics import (
    Ratio,
    Summary,
    bootstrap_median,
    difference,
    instability,
    paired_ratio,
    summarise,
)


def test_percentiles_and_variation():
    values, calls = [float(value) for value in range(1, 101)], [float(value) for value in range(1, 1001)]
    summary = summarise(values, calls)
    assert summary.median == 50.5
    assert summary.p90 == pytest.approx(np.percentile(calls, 90))
    assert summary.p99 == pytest.approx(np.percentile(calls, 99))
    assert summary.cv == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert summary.low <= summary.median <= summary.high


def test_few_calls_have_no_tail():
    """With fewer than a hundred calls "p99" would be the slowest one, and calls not timed apart have no percentiles."""
    samples = [10.0, 11.0] * 10
    assert [(s.p90, s.p99) for s in (summarise(samples, [5.0] * count) for count in (0, 19, 20, 99, 100))] == [
        (None, None),
        (None, None),
        (5.0, None),
        (5.0, None),
        (5.0, 5.0),
    ]


def test_linear_drift_within_and_across_quads_cancels_exactly():
    """Samples at times 0 1 2 3 of each quad (A B B A), both slowing by the same amount per step."""
    a, b = [], []
    for quad in range(12):
        start = 4 * quad
        a += [10 + 0.1 * start, 10 + 0.1 * (start + 3)]
        b += [10 + 0.1 * (start + 1), 10 + 0.1 * (start + 2)]
    ratio = paired_ratio(a, b)
    assert ratio.value == pytest.approx(1.0, abs=1e-12)
    assert ratio.low == pytest.approx(1.0, abs=1e-12)


def test_common_noise_of_a_quad_does_not_widen_the_ratio():
    """A neighbour that slows down whole quads by up to three times leaves the ratio alone."""
    slow = np.repeat(np.random.default_rng(0).uniform(1, 3, 30), 2)
    ratio = paired_ratio(list(2.0 * slow), list(2.8 * slow))
    assert (ratio.low, ratio.high) == (pytest.approx(1.4), pytest.approx(1.4))


def test_outliers_do_not_move_the_median():
    a, b = [10.0] * 40, [15.0] * 40
    a[6], b[20], b[33] = 500.0, 900.0, 700.0
    assert paired_ratio(a, b).value == 1.5


@pytest.mark.parametrize(("quads", "correlation", "least"), [(10, 0.0, 0.89), (20, 0.3, 0.88), (40, 0.3, 0.89)])
def test_the_interval_covers_the_truth(monkeypatch, quads, correlation, least):
    """A nominal 95% interval, on few and on autocorrelated quads, in 200 simulations (standard error 0.02)."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1500)
    rng, hits, runs = np.random.default_rng(2), 0, 200
    for run in range(runs):
        noise = rng.standard_normal(quads + 20)
        for index in range(1, len(noise)):
            noise[index] = correlation * noise[index - 1] + (1 - correlation**2) ** 0.5 * noise[index]
        low, high = bootstrap_median(1.2 * np.exp(0.03 * noise[20:]), seed=run)
        hits += low <= 1.2 <= high
    assert least <= hits / runs <= 0.995


@pytest.mark.parametrize("quads", [20, 100])
def test_the_interval_of_the_median_covers_the_truth_of_skewed_samples(monkeypatch, quads):
    """Times have a floor and a tail: 10 ms plus an exponential one, whose median is 10 + ln 2 and whose mean is 11."""
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    rng, hits, runs = np.random.default_rng(5), 0, 200
    for run in range(runs):
        summary = summarise(list(10 + rng.exponential(1.0, 2 * quads)), [], seed=run)
        assert summary.low <= summary.median <= summary.high
        hits += summary.low <= 10 + np.log(2) <= summary.high
    assert 0.90 <= hits / runs <= 0.995


def test_many_quads_are_resampled_in_pieces(monkeypatch):
    values = np.random.default_rng(0).normal(10, 1, (50, 2))
    whole = bootstrap_median(values)
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    assert bootstrap_median(values) == whole


def test_the_interval_is_reproducible_and_shrinks_with_samples():
    noise = np.random.default_rng(3).normal(1.4, 0.05, 400)
    assert bootstrap_median(noise, seed=1) == bootstrap_median(noise, seed=1)
    few, many = bootstrap_median(noise[:20]), bootstrap_median(noise)
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


@pytest.mark.parametrize(("blocks", "student"), [(5, 2.776), (11, 2.228), (31, 2.042)])
def test_expanded_tail_uses_students_quantile(blocks, student):
    from statistics import NormalDist

    quantile = -NormalDist().inv_cdf(statistics._expanded_tail(blocks)) / (blocks / (blocks - 1)) ** 0.5
    assert quantile == pytest.approx(student, rel=4e-3)  # the tables' two-sided 95% points


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.99, 1.03, "no difference"),
        (0.95, 1.05, "no difference"),
        (1.0, 1.0, "no difference"),
        (1.01, 1.04, ""),
        (0.97, 0.999, ""),
        (0.94, 1.01, "no difference shown"),
        (0.36, 1.41, "no difference shown"),
    ],
)
def test_no_difference_needs_evidence(low, high, words):
    assert difference(low, high) == words
    assert Ratio(1.0, low, high).no_difference == (words == "no difference")


def test_equal_times_with_noise_show_no_difference():
    rng = np.random.default_rng(0)
    a, b = (list(10 * np.exp(0.05 * rng.standard_normal(60))) for _ in range(2))
    assert paired_ratio(a, b).no_difference


def test_instability_says_what_is_shaky():
    steady = Summary(10, 9.9, 10.1, 10.2, 10.3, 0.02)
    shaky = Summary(10, 9.9, 10.1, 14.0, 19.0, 0.31)
    assert instability({"plain": steady, "resnet": steady}, Ratio(1.2, 1.19, 1.21)) is None
    warning = instability({"plain": steady, "resnet": shaky}, Ratio(1.2, 1.1, 1.3))
    assert "resnet 31%" in warning
    assert "plain" not in warning
    assert "interval 17% wide" in warning
