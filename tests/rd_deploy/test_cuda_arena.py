"""The arena: no two tensors that live at once share a byte, and chains get the least that is possible."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rd_deploy.cuda.arena import ALIGNMENT, Interval, most_alive, place


def chain(*sizes: int) -> list[Interval]:
    """Tensor i is written by step i and read by step i + 1."""
    return [Interval(f"t{index}", size, index, index + 1) for index, size in enumerate(sizes)]


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 12), st.integers(0, 6)), max_size=25))
def test_tensors_that_live_at_once_never_share_bytes(shapes):
    intervals = [
        Interval(str(number), size, first, first + length) for number, (size, first, length) in enumerate(shapes)
    ]
    offsets, total = place(intervals)
    for number, interval in enumerate(intervals):
        start = offsets[interval.name]
        assert start % ALIGNMENT == 0
        assert start + interval.size <= total
        for other in intervals[:number]:
            if interval.overlaps(other):
                apart = start >= offsets[other.name] + other.size or offsets[other.name] >= start + interval.size
                assert apart, (interval, other)
    assert total >= most_alive(intervals)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=20))
def test_a_chain_needs_its_largest_pair(sizes):
    scaled = [size * ALIGNMENT for size in sizes]
    pairs = max(first + second for first, second in pairwise(scaled))
    intervals = chain(*scaled)
    assert most_alive(intervals) == pairs
    # Greedy placement is not optimal for every chain; it is for sizes that fall or rise, as those of a network do.
    falling = chain(*sorted(scaled, reverse=True))
    assert place(falling)[1] == most_alive(falling)


def test_nothing_needs_nothing():
    assert place([]) == ({}, 0)
    assert most_alive([]) == 0


def test_sizes_are_rounded_to_the_alignment():
    offsets, total = place(chain(1, 1))
    assert sorted(offsets.values()) == [0, ALIGNMENT]
    assert total == 2 * ALIGNMENT


@pytest.mark.parametrize(("first", "second", "together"), [((0, 1), (1, 2), True), ((0, 1), (2, 3), False)])
def test_a_life_includes_its_last_step(first, second, together):
    assert Interval("a", 1, *first).overlaps(Interval("b", 1, *second)) is together
