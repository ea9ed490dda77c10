"""Times of work on the GPU by the one audited timer (`rd_deploy.bench.timer`), whose clock is the GPU's own."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpu import card
from rd_deploy.bench.statistics import paired_ratio, summarise
from rd_deploy.bench.timer import Clock, PairedSamples, doubts, time_pair

BURST_MS = 4.0  # runs queued between two readings of the clock: the launch that nothing hides costs 0.2% of it
LOAD_SECONDS = 0.05  # of work queued at a time while the card is asked for its clocks
READINGS = 5  # of what is not compared with anything
MOST_RUNS = 500  # queued at once: the driver's queue is longer
SIDES = ("model", "compare")


@dataclass(frozen=True)
class Length:
    """Of a measurement: ``seconds`` of sampling and at most ``warm_up`` seconds of warm-up each, ``quads`` at least."""

    seconds: float = 2.0
    warm_up: float = 2.0
    quads: int = 20


DRY = Length(0.0, 0.0, 3)


class GpuClock:
    """Nanoseconds on the GPU: an event at the end of all that is queued, waited for.

    Summed up from reading to reading, since an event's distance is a float32 number of milliseconds.
    """

    def __init__(self):
        import torch

        self._event = lambda: torch.cuda.Event(enable_timing=True)
        self._now, self._last = 0.0, self._event()
        self._last.record()

    def __call__(self) -> int:
        event = self._event()
        event.record()
        event.synchronize()
        self._now += self._last.elapsed_time(event) * 1e6
        self._last = event
        return int(self._now)


def resident(dry: bool) -> Clock:
    """The clock for work on resident images: the GPU's, or the CPU's in a dry run."""
    return time.perf_counter_ns if dry else GpuClock()


def compare(first: Callable, second: Callable, clock: Clock, length: Length, dry: bool, burst_ms: float) -> dict:
    """Times of one run of each, interleaved A B B A, and second / first with its interval; states of the card.

    ``burst_ms``: runs are queued together until a reading covers so much (0: each is read for itself).
    """
    runs = [_burst(call, clock, burst_ms) for call in (first, second)]
    bursts = [_repeated(call, count) for call, count in zip((first, second), runs, strict=True)]
    before = card.state(dry, _load(first, clock))
    samples = time_pair(
        *bursts, seconds=length.seconds, min_quads=length.quads, max_warm_up=length.warm_up, clock=clock
    )
    after = card.state(dry, _load(first, clock))
    return _result(samples, runs, before, after)


def median_ms(call: Callable, dry: bool) -> float:
    """Milliseconds of one run, without the care that a comparison takes."""
    clock = resident(dry)
    runs = _burst(call, clock, 0 if dry else BURST_MS)
    return statistics.median(_milliseconds(call, runs, clock) / runs for _ in range(READINGS))


def _result(samples: PairedSamples, runs: list[int], before: dict | None, after: dict | None) -> dict:
    """What is kept of a comparison, in milliseconds per run."""
    times = [[value / count for value in values] for values, count in zip((samples.a, samples.b), runs, strict=True)]
    singles = [calls if count == 1 else [] for calls, count in zip(samples.calls, runs, strict=True)]
    summaries = [summarise(values, calls) for values, calls in zip(times, singles, strict=True)]
    ratio = paired_ratio(*times)
    warnings = doubts(samples, dict(zip(SIDES, summaries, strict=True)), ratio) + card.doubts(before, after)
    sides = {
        side: {
            **{"median_ms": summary.median, "low_ms": summary.low, "high_ms": summary.high, "cv": summary.cv},
            **{"p90_ms": summary.p90, "p99_ms": summary.p99, "runs_per_reading": count},
            "samples_ms": [round(value, 6) for value in values],
        }
        for side, summary, count, values in zip(SIDES, summaries, runs, times, strict=True)
    }
    interval = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "quads": len(samples.a) // 2}
    return {**sides, **interval, "state_before": before, "state_after": after, "warnings": warnings}


def _burst(call: Callable, clock: Clock, burst_ms: float) -> int:
    """How many runs one reading of the clock shall cover."""
    if burst_ms == 0:
        return 1
    call()
    once = _milliseconds(call, 1, clock)
    return max(1, min(MOST_RUNS, round(burst_ms / max(once, 1e-3))))


def _milliseconds(call: Callable, runs: int, clock: Clock) -> float:
    start = clock()
    for _ in range(runs):
        call()
    return (clock() - start) / 1e6


def _repeated(call: Callable, runs: int) -> Callable[[], None]:
    def burst() -> None:
        for _ in range(runs):
            call()

    return burst


def _load(call: Callable, clock: Clock) -> Callable[[], None]:
    once = _milliseconds(call, 1, clock)
    return _repeated(call, max(1, min(MOST_RUNS, round(1e3 * LOAD_SECONDS / max(once, 1e-3)))))
