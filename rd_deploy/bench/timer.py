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

WINDOW = 5  # calls per warm-up window
STEADY = 0.03  # a callable is steady when the medians of two successive windows differ by at most 3%
MIN_QUADS = 10


@dataclass(frozen=True)
class WarmUp:
    """How the warm-up of one callable ended: ``change`` is the last difference of window medians, relative."""

    calls: int
    seconds: float
    steady: bool
    change: float


@dataclass(frozen=True)
class PairedSamples:
    """Times per call in ms; ``a[2q], a[2q+1]`` and ``b[2q], b[2q+1]`` are of quad q, measured as A B B A.

    ``inner``: calls per sample (a sample is their mean) of A and B. Each sample follows one untimed call of the same
    callable, so that it does not inherit the other one's caches and still-spinning threads.
    """

    a: list[float]
    b: list[float]
    inner: tuple[int, int]
    warm_up: tuple[WarmUp, WarmUp]


def time_pair(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    seconds: float,
    min_quads: int = MIN_QUADS,
    max_warm_up: float = 10.0,
    min_sample_ms: float = 5.0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> PairedSamples:
    """Measure two callables interleaved (A B B A) for about ``seconds`` and at least ``min_quads`` quads.

    Each is first warmed up until steady or for ``max_warm_up`` seconds (reported). Calls shorter than
    ``min_sample_ms`` are repeated within a sample. The garbage collector is off while timing. ``clock``: nanoseconds.
    """
    with collector_off():
        warm = tuple(warm_up(function, max_warm_up, clock) for function in (a, b))
        inner = tuple(_inner(function, min_sample_ms, clock) for function in (a, b))
        samples_a: list[float] = []
        samples_b: list[float] = []
        deadline = clock() + int(seconds * 1e9)
        while len(samples_a) < 2 * min_quads or clock() < deadline:
            first_a = _sample(a, inner[0], clock)
            first_b = _sample(b, inner[1], clock)
            second_b = _sample(b, inner[1], clock)
            second_a = _sample(a, inner[0], clock)
            samples_a += [first_a, second_a]
            samples_b += [first_b, second_b]
    return PairedSamples(samples_a, samples_b, inner, warm)


def warm_up(function: Callable[[], object], max_seconds: float, clock: Callable[[], int]) -> WarmUp:
    """Call until the medians of two successive windows of `WINDOW` calls differ by at most `STEADY`, or time is up."""
    start, calls, previous, change = clock(), 0, math.inf, math.inf
    while True:
        window = [_elapsed_ms(function, 1, clock) for _ in range(WINDOW)]
        calls += WINDOW
        median = statistics.median(window)
        change = abs(median - previous) / median if math.isfinite(previous) and median > 0 else math.inf
        seconds = (clock() - start) / 1e9
        if change <= STEADY or seconds >= max_seconds:
            return WarmUp(calls, seconds, change <= STEADY, change if math.isfinite(change) else 1.0)
        previous = median


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


def _inner(function: Callable[[], object], min_sample_ms: float, clock: Callable[[], int]) -> int:
    """Calls per sample, so that a sample lasts ``min_sample_ms`` and the clock's own cost does not matter."""
    once = min(_elapsed_ms(function, 1, clock) for _ in range(3))
    return max(1, min(10_000, math.ceil(min_sample_ms / max(once, 1e-6))))


def _sample(function: Callable[[], object], inner: int, clock: Callable[[], int]) -> float:
    function()
    return _elapsed_ms(function, inner, clock) / inner


def _elapsed_ms(function: Callable[[], object], calls: int, clock: Callable[[], int]) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / 1e6
