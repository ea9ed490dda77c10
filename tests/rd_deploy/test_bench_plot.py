"""The picture of a benchmark: every engine can be read from it, also beside one that is far slower."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from rd_deploy.bench.plot import FAR_APART, draw_latency, draw_ratios


def document_of(slowest: float) -> dict:
    """Two engines, the first of 0.2 ms, the second ``slowest`` times as slow; plain is twice as fast on the second."""
    results, ratios = [], []
    for engine, factor, ratio in (("native", 1.0, 1.0), ("torch", slowest, 2.0)):
        setting = {"engine": engine, "precision": "fp32", "batch": 2, "isa": None}
        for name, share in (("plain20", 1 / ratio), ("resnet20", 1.0)):
            time = 0.4 * factor * share
            times = {"median_ms": time, "low_ms": 0.9 * time, "high_ms": 1.1 * time}
            results.append(setting | times | {"model": name})
        ratios.append(setting | {"ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio})
    best = {"precision": "fp32", "batch": 2, "model_engine": "native", "compare_engine": "torch"}
    best |= {"ratio": slowest, "low": 0.9 * slowest, "high": 1.1 * slowest}
    networks = {"model": "plain20", "compare": "resnet20"}
    return networks | {"results": results, "ratios": ratios, "best": [], "native_against_others": [best]}


@pytest.mark.parametrize("draw", [draw_latency, draw_ratios])
@pytest.mark.parametrize(("slowest", "scale"), [(FAR_APART / 3, "linear"), (1000.0, "log")])
def test_an_engine_far_slower_than_the_others_makes_the_axis_logarithmic(draw, slowest, scale):
    axes = Figure().add_subplot()
    draw(axes, document_of(slowest))
    assert axes.get_xscale() == scale
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "log")
    least, most = axes.get_xlim()
    shown = [0.4 / 2, 0.4 * slowest / 2] if draw is draw_latency else [1.0, 1.4, 2.0, slowest]
    assert all(least < value < most for value in shown)
    if scale == "log" and draw is draw_latency:  # the shortest bar is more than a line, and ends before its number
        ends = [axes.transData.transform((bar.get_width(), 0))[0] for bar in axes.patches]
        left, right = (axes.transData.transform((value, 0))[0] for value in (least, most))
        assert (min(ends) - left) / (right - left) > 0.05
        assert (max(ends) - left) / (right - left) < 0.95
