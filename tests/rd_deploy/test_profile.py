"""Profiles of the compiled engine: rates and limits by hand, and what a session's profile holds."""

import numpy as np
import pytest
from chains import bottlenecks, images_for

from rd_deploy.bench.profile import RUNS, Limits, profile, step_row
from rd_deploy.engines import get_engine
from rd_deploy.export.onnx import to_onnx
from rd_deploy.native import StepInfo

LIMITS = Limits(gflops=100, cache_gb_s=50, network_gb_s=10, memory_gb_s=5)


def step(flops: int, weight_bytes: int, map_bytes: int) -> StepInfo:
    return StepInfo("conv1", "direct", flops // 4, flops, weight_bytes, map_bytes, live_bytes=1)


def test_a_step_bound_by_arithmetic():
    """2e8 operations take 2 ms at best; 5e6 bytes of weights and 1e7 of maps 0.5 + 0.2 ms."""
    row = step_row(step(200_000_000, 5_000_000, 10_000_000), 0.004, LIMITS)
    assert (row["limit"], row["limit_ms"], row["share"]) == ("arithmetic", pytest.approx(2), pytest.approx(0.5))
    assert (row["median_ms"], row["gflops"], row["weights_gb_s"]) == pytest.approx((4, 50, 1.25))


def test_a_step_bound_by_reading():
    row = step_row(step(1_000_000, 40_000_000, 50_000_000), 0.01, LIMITS)
    assert (row["limit"], row["limit_ms"], row["share"]) == ("bandwidth", pytest.approx(5), pytest.approx(0.5))


def test_a_step_shorter_than_the_clock_sees():
    assert step_row(step(0, 0, 1), 0.0, LIMITS)["median_ms"] > 0


def test_a_sessions_profile():
    chain = bottlenecks()
    session = get_engine("native").load(to_onnx(chain), "fp32", 2, 2)
    row = profile("net", session, images_for(chain, 2), seconds=0.01)
    info = session.plan.info
    assert (row["model"], row["engine"], row["variant"], row["threads"]) == ("net", "native", info.isa, 2)
    assert row["runs"] >= RUNS
    assert [entry["name"] for entry in row["steps"]] == [entry.name for entry in session.plan.steps]
    assert row["memory"]["arena_bytes"] == info.arena_bytes
    assert row["limits"]["gflops"] > 0.1
    total = sum(entry["median_ms"] for entry in row["steps"])
    assert total == pytest.approx(row["median_ms"], rel=0.5)
    assert np.isfinite([entry["share"] for entry in row["steps"]]).all()
