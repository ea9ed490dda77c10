"""The timer, with a clock that the test moves: nothing here depends on the machine."""

import gc
import itertools

import pytest

from rd_deploy.bench.statistics import paired_ratio
from rd_deploy.bench.timer import MIN_QUADS, collector_off, time_pair, warm_up


class Machine:
    """A clock in ns and callables that move it; ``drift``: how much slower everything gets per second."""

    def __init__(self, drift: float = 0.0):
        self.now, self.drift, self.log = 0, drift, []

    def clock(self) -> int:
        return self.now

    def call(self, name: str, ms: float):
        def function():
            self.log.append(name)
            self.now += int(ms * 1e6 * (1 + self.drift * self.now / 1e9))

        return function

    def times(self, times_ms):
        iterator = iter(times_ms)

        def function():
            self.now += int(next(iterator) * 1e6)

        return function


def test_order_is_abba_with_untimed_calls_where_the_callable_changes():
    """Untimed calls (here one of 20 ms, two of 10 ms) stand between A and B, and not between two samples of one."""
    machine = Machine()
    samples = time_pair(machine.call("A", 10), machine.call("B", 20), seconds=0.0, clock=machine.clock)
    assert samples.inner == (1, 1)
    quad = "A" + "bBB" + "aaA"
    assert "".join(machine.log[-len(quad) * MIN_QUADS :]) == quad.upper() * MIN_QUADS
    assert samples.a == [10.0] * (2 * MIN_QUADS)
    assert samples.b == [20.0] * (2 * MIN_QUADS)
    assert samples.calls == (samples.a, samples.b)


def test_both_are_warm_when_sampling_starts():
    """B is warmed up last, for half a second or more in which A rests: A runs again before the first quad."""
    machine = Machine()
    time_pair(machine.call("A", 10), machine.call("B", 20), seconds=0.0, min_quads=1, clock=machine.clock)
    assert "".join(machine.log[: -len("ABBBAAA")]) == "A" * 50 + "B" * 25 + "A" * 10


def test_linear_drift_hurts_neither_side():
    """Everything gets 5% slower per second: A is always first, yet the ratio is the true one."""
    machine = Machine(drift=0.05)
    samples = time_pair(machine.call("A", 10), machine.call("B", 14), seconds=5.0, clock=machine.clock)
    assert samples.a[-1] > 1.1 * samples.a[0]
    assert paired_ratio(samples.a, samples.b).value == pytest.approx(1.4, rel=1e-4)
    naive = sum(samples.b[len(samples.b) // 2 :]) / sum(samples.a[: len(samples.a) // 2])
    assert naive > 1.45  # A in the first half and B in the second would have claimed more


def test_short_calls_are_repeated_within_a_sample():
    machine = Machine()
    samples = time_pair(
        machine.call("A", 0.01), machine.call("B", 3), seconds=0.0, min_sample_ms=5.0, clock=machine.clock
    )
    assert samples.inner == (500, 2)
    assert samples.a[0] == pytest.approx(0.01)
    assert samples.b[0] == pytest.approx(3)


def test_calls_are_timed_one_by_one_when_reading_the_clock_costs_nothing_beside_them():
    """Every tenth call takes five times as long: means hide it, single calls show it. 10 us are too short."""
    machine, count = Machine(), itertools.count(1)

    def uneven():
        machine.now += 5_000_000 if next(count) % 10 == 0 else 1_000_000

    samples = time_pair(uneven, machine.call("B", 0.01), seconds=1.0, clock=machine.clock)
    assert samples.calls[1] == []
    single, inner = samples.calls[0], samples.inner[0]
    assert len(single) == inner * len(samples.a) > 100
    assert samples.a == pytest.approx([sum(single[i : i + inner]) / inner for i in range(0, len(single), inner)])
    assert set(single) == {1.0, 5.0}
    assert max(samples.a) < 2.0


def test_time_budget_and_least_number_of_quads():
    machine = Machine()
    samples = time_pair(machine.call("A", 10), machine.call("B", 10), seconds=8.0, clock=machine.clock)
    assert len(samples.a) == len(samples.b) == 2 * 100  # a quad takes 80 ms, half of it untimed
    samples = time_pair(machine.call("A", 900), machine.call("B", 900), seconds=1.0, min_quads=4, clock=machine.clock)
    assert len(samples.a) == 8


def test_warm_up_ends_when_two_windows_agree():
    machine = Machine()
    warm = warm_up(machine.times([500] * 5 + [200] * 5 + [100] * 20), 30.0, machine.clock)
    assert warm.steady
    assert warm.calls == 20
    assert warm.change == 0
    assert warm.median_ms == 100


def test_short_calls_are_not_steady_after_a_few():
    """Windows of at least 100 ms: calls that get slower after 0.15 s are seen, and half a second is the least."""
    machine = Machine()
    warm = warm_up(machine.call("A", 0.3), 10.0, machine.clock)
    assert warm.steady
    assert 0.5 <= warm.seconds < 0.7
    machine = Machine()
    warm = warm_up(machine.times([1.0] * 550 + [2.0] * 2000), 10.0, machine.clock)
    assert warm.steady
    assert warm.median_ms == 1.0
    machine = Machine()
    warm = warm_up(machine.times([1.0] * 150 + [2.0] * 2000), 10.0, machine.clock)
    assert warm.median_ms == 2.0


def test_warm_up_gives_up_after_its_time_and_says_so():
    machine = Machine()
    warm = warm_up(machine.times([100 * 0.9**index for index in range(100)]), 0.6, machine.clock)
    assert not warm.steady
    assert warm.seconds >= 0.6
    assert warm.change > 0.03


def test_after_one_window_there_is_no_change():
    """Five calls of 100 ms are a window, and all the time there is: nothing says whether a sixth would differ."""
    machine = Machine()
    warm = warm_up(machine.call("A", 100), 0.2, machine.clock)
    assert (warm.calls, warm.steady, warm.change, warm.median_ms) == (5, False, None, 100)


def test_the_collector_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def fail():
        seen.append(gc.isenabled())
        raise RuntimeError

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        time_pair(fail, fail, seconds=0.0)
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
