"""The one audited timer: two callables, measured interleaved.

Clock speed, temperature and neighbours drift during a benchmark, and what is measured second wins or loses by that
alone. So samples are taken in quads A B B A: within a quad, any drift linear in time adds the same to A as to B.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rd_deploy.bench.statistics import Ratio, Summary, instability

Clock = Callable[[], int]  # nanoseconds

WINDOW_CALLS, WINDOW_MS = 5, 100.0  # a warm-up window has at least so many calls and lasts at least so long
STEADY = 0.03  # a callable is steady when the medians of two successive windows differ by at most 3%
MIN_WARM_UP = 0.5  # seconds: clock speed and thread pools need this long even when the first calls agree
SETTLE_MS = 20.0  # an idle thread pool may spin for some ms after its last call, and takes cores from the next callable
APART_MS = 0.05  # calls at least this long are timed one by one: reading the clock costs them well below 1%
MIN_QUADS = 20
CLOCK_MS = 1e-6  # a nanosecond: the least that the clock tells from nothing


@dataclass(frozen=True)
class WarmUp:
    """How the warm-up of one callable ended.

    ``change``: the last difference of window medians, relative, None after one window only; ``median_ms``: of the last.
    """

    calls: int
    seconds: float
    steady: bool
    change: float | None
    median_ms: float


@dataclass(frozen=True)
class PairedSamples:
    """Times per call in ms; ``a[2q], a[2q+1]`` and ``b[2q], b[2q+1]`` are of quad q, measured as A B B A.

    ``inner``: calls per sample (a sample is their mean) of A and B. ``calls``: the single calls of all samples, in
    order; empty for calls too short to be timed one by one. Each sample follows another one of the same callable or
    untimed calls of it, so that it does not inherit the other one's caches and still-spinning threads.
    """

    a: list[float]
    b: list[float]
    inner: tuple[int, int]
    calls: tuple[list[float], list[float]]
    warm_up: tuple[WarmUp, WarmUp]


def time_pair(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    seconds: float,
    min_quads: int = MIN_QUADS,
    max_warm_up: float = 10.0,
    min_sample_ms: float = 5.0,
    clock: Clock = time.perf_counter_ns,
) -> PairedSamples:
    """Measure two callables interleaved (A B B A) for about ``seconds`` and at least ``min_quads`` quads.

    Each is first warmed up until steady or for ``max_warm_up`` seconds (reported). Calls shorter than
    ``min_sample_ms`` are repeated within a sample. The garbage collector is off while timing.
    """
    with collector_off():
        warm = (warm_up(a, max_warm_up, clock), warm_up(b, max_warm_up, clock))
        first, second = (
            _Sampler(function, state.median_ms, min_sample_ms, clock)
            for function, state in zip((a, b), warm, strict=True)
        )
        _run_for(a, WINDOW_MS, clock)  # A rested while B warmed up
        deadline = clock() + int(seconds * 1e9)
        while len(first.samples) < 2 * min_quads or clock() < deadline:
            first.sample()
            _run_for(b, SETTLE_MS, clock)
            second.sample()
            second.sample()
            _run_for(a, SETTLE_MS, clock)
            first.sample()
    return PairedSamples(first.samples, second.samples, (first.inner, second.inner), (first.calls, second.calls), warm)


def doubts(samples: PairedSamples, summaries: dict[str, Summary], ratio: Ratio) -> list[str]:
    """Reasons to doubt a measurement, in words; ``summaries``: of both callables, by name and in their order."""
    shaky = instability(summaries, ratio)
    unsteady = [_unsteady(name, warm) for name, warm in zip(summaries, samples.warm_up, strict=True) if not warm.steady]
    return ([shaky] if shaky else []) + unsteady


def _unsteady(name: str, warm: WarmUp) -> str:
    if warm.change is None:
        return f"{name} was warmed up for one window only, {warm.seconds:.1f} s"
    return f"{name} was not steady after {warm.seconds:.1f} s of warm-up (still changing by {warm.change:.0%})"


class _Sampler:
    """One callable's samples in the making."""

    def __init__(self, function: Callable[[], object], call_ms: float, min_sample_ms: float, clock: Clock):
        self.function, self.clock = function, clock
        self.inner = max(1, min(10_000, math.ceil(min_sample_ms / max(call_ms, 1e-6))))
        self.apart = call_ms >= APART_MS
        self.samples: list[float] = []
        self.calls: list[float] = []

    def sample(self) -> None:
        if self.apart:
            times = [_elapsed_ms(self.function, 1, self.clock) for _ in range(self.inner)]
            self.calls += times
            self.samples.append(sum(times) / self.inner)
        else:
            self.samples.append(_elapsed_ms(self.function, self.inner, self.clock) / self.inner)


def warm_up(function: Callable[[], object], max_seconds: float, clock: Clock) -> WarmUp:
    """Call until the medians of two successive windows differ by at most `STEADY`, or ``max_seconds`` are over.

    It takes at least `MIN_WARM_UP` seconds, unless ``max_seconds`` is less.
    """
    start, calls, previous = clock(), 0, None
    while True:
        window = _window(function, clock)
        calls += len(window)
        median = statistics.median(window)
        change = None if previous is None else abs(median - previous) / max(median, CLOCK_MS)
        seconds, steady = (clock() - start) / 1e9, change is not None and change <= STEADY
        if (steady and seconds >= MIN_WARM_UP) or seconds >= max_seconds:
            return WarmUp(calls, seconds, steady, change, median)
        previous = median


def _window(function: Callable[[], object], clock: Clock) -> list[float]:
    """Times of single calls in ms."""
    end, times = clock() + int(WINDOW_MS * 1e6), []
    while len(times) < WINDOW_CALLS or clock() < end:
        times.append(_elapsed_ms(function, 1, clock))
    return times


@contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage now and not within the block."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _run_for(function: Callable[[], object], least_ms: float, clock: Clock) -> None:
    """At least one untimed call, until ``least_ms`` have passed."""
    end = clock() + int(least_ms * 1e6)
    function()
    while clock() < end:
        function()


def _elapsed_ms(function: Callable[[], object], calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / 1e6
