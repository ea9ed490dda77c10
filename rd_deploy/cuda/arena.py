"""Where each tensor lies in one block of memory, so that tensors of disjoint lives share bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes, as cudaMalloc aligns


@dataclass(frozen=True)
class Interval:
    """A tensor that must keep its bytes from step ``first`` to step ``last``, both included."""

    name: str
    size: int
    first: int
    last: int

    def overlaps(self, other: "Interval") -> bool:
        return self.first <= other.last and other.first <= self.last


def place(intervals: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """Offsets of all tensors, multiples of `ALIGNMENT`, and the bytes they need together.

    Largest first, each into the lowest gap among those it lives with (greedy by size, Pisarchyk and Lee 2020). For a
    chain, in which two tensors live at a time, this is the optimum.
    """
    placed: list[tuple[int, Interval]] = []
    for interval in sorted(intervals, key=lambda entry: (-entry.size, entry.first)):
        start = 0
        for offset, other in sorted(((o, i) for o, i in placed if i.overlaps(interval)), key=lambda entry: entry[0]):
            if start + _rounded(interval.size) <= offset:
                break
            start = max(start, offset + _rounded(other.size))
        placed.append((start, interval))
    return {i.name: o for o, i in placed}, max((o + _rounded(i.size) for o, i in placed), default=0)


def most_alive(intervals: Sequence[Interval]) -> int:
    """The most bytes alive at one step: no arena can be smaller."""
    steps = {interval.first for interval in intervals}
    return max((sum(i.size for i in intervals if i.first <= step <= i.last) for step in steps), default=0)


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
