"""Where the compiled engine's time goes: each step of its plan against this machine's limits, measured beside it."""

import time
from dataclasses import asdict, dataclass

import numpy as np

from rd_deploy import native
from rd_deploy.bench.timer import collector_off
from rd_deploy.engines.native import NativeSession
from rd_deploy.native import StepInfo

RUNS, WARM_UP = 20, 3
CACHED, UNCACHED = 256 << 10, 64 << 20  # bytes per thread that surely lie in the second-level cache, and surely do not
ACCOUNTS = ("arena", "feature_map", "scratch", "alignment", "weight", "packed")


@dataclass(frozen=True)
class Limits:
    """What this machine does at best with a session's threads, instruction set and precision.

    ``gflops``: 1e9 operations per second of the engine's own matrix product on operands in the L1 cache. The others
    are read bandwidths in GB/s: of 256 KiB per thread; of as many bytes as one run of the network touches (weights and
    arena), over and over; of 64 MiB per thread.
    """

    gflops: float
    cache_gb_s: float
    network_gb_s: float
    memory_gb_s: float


def measure_limits(session: NativeSession) -> Limits:
    """Takes about a second."""
    info, threads = session.plan.info, session.threads
    touched = sum(step.weight_bytes for step in session.plan.steps) + info.arena_bytes
    sizes = (CACHED * threads, touched, UNCACHED * threads)
    cache, network, memory = (native.measure_read(size, threads) / 1e9 for size in sizes)
    return Limits(native.measure_product(session.precision, threads, info.isa) / 1e9, cache, network, memory)


def profile(name: str, session: NativeSession, images: np.ndarray, seconds: float) -> dict:
    """``bench.json``'s entry: medians over at least `RUNS` runs, for ``seconds`` if those take longer."""
    info, limits = session.plan.info, measure_limits(session)
    times = _sample(session, images, seconds)
    steps = zip(session.plan.steps, np.median(times, axis=0), strict=True)
    return {
        "model": name,
        "engine": session.engine.name,
        "variant": session.variant,
        "precision": session.precision,
        "batch": session.batch,
        "threads": session.threads,
        "runs": len(times),
        "median_ms": float(np.median(times.sum(axis=1))) * 1e3,
        "limits": asdict(limits),
        "memory": {f"{account}_bytes": getattr(info, f"{account}_bytes") for account in ACCOUNTS},
        "steps": [step_row(step, float(median), limits) for step, median in steps],
    }


def _sample(session: NativeSession, images: np.ndarray, seconds: float) -> np.ndarray:
    """Seconds, (runs, steps)."""
    for _ in range(WARM_UP):
        session.profile(images)
    with collector_off():
        times, end = [], time.perf_counter() + seconds
        while len(times) < RUNS or time.perf_counter() < end:
            times.append(session.profile(images))
    return np.array(times)


def step_row(step: StepInfo, seconds: float, limits: Limits) -> dict:
    """One step: its rates, and the least time that arithmetic or reading would take, whichever is longer.

    Reading: the weights at the bandwidth of the whole network, since each run reads them all, and the maps, which were
    written a moment ago, at that of the cache. ``share`` is the limit's time / the step's.
    """
    seconds = max(seconds, 1e-9)  # the clock may not see a step at all
    arithmetic = step.flops / (limits.gflops * 1e9)
    reading = step.weight_bytes / (limits.network_gb_s * 1e9) + step.map_bytes / (limits.cache_gb_s * 1e9)
    least = max(arithmetic, reading)
    return {
        "name": step.name,
        "kernel": step.kernel,
        "median_ms": seconds * 1e3,
        "macs": step.macs,
        "flops": step.flops,
        "weight_bytes": step.weight_bytes,
        "map_bytes": step.map_bytes,
        "live_bytes": step.live_bytes,
        "gflops": step.flops / seconds / 1e9,
        "weights_gb_s": step.weight_bytes / seconds / 1e9,
        "limit": "arithmetic" if arithmetic >= reading else "bandwidth",
        "limit_ms": least * 1e3,
        "share": least / seconds,
    }
