"""The order of a network's steps that needs the least memory.

A step that every earlier step leads to, and that leads to every later step, has the same live tensors in every order,
so these steps cut the network into independent parts. Within a part, a dynamic programme over the sets of steps already
run finds the lowest peak exactly (what is live depends on the set only). Of several orders with this peak, the one with
the fewest live bytes summed over its steps is best, then the fewest held by shortcuts: what the ledger says about a
network does not depend on the order in which a file lists its nodes. A part too wide to search (`MAX_SEARCH`) keeps the
file's order.
"""

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import TypeVar

from rd_deploy.liveness import Graph, is_held, run

MAX_SEARCH = 1_000_000  # sets of steps x steps that the search for the best order looks at, per part of the network

Cost = TypeVar("Cost")  # ordered: the lowest is best


def best_order(graph: Graph) -> tuple[list[int], bool]:
    """The steps in the order with the lowest peak, part by part; False if a part was too wide to search."""
    order, best = [], True
    for part in _parts(graph):
        found = _search(graph, part)
        best = best and found is not None
        order += found or part
    return order, best


def _parts(graph: Graph) -> list[list[int]]:
    """Cut the steps, in the file's order, before and after each step that is comparable with every other one."""
    # For each step, the steps that lead to all of the later ones; after the last step, there is nothing to lead to.
    to_all_later = [*itertools.accumulate(reversed(graph.needs[1:]), operator.and_, initial=-1)][::-1]
    parts, was_cut = [], True
    for number, needs in enumerate(graph.needs):
        is_cut = needs == (1 << number) - 1 and to_all_later[number] >> number & 1
        if is_cut or was_cut:
            parts.append([])
        parts[-1].append(number)
        was_cut = is_cut
    return parts


def _search(graph: Graph, part: list[int]) -> list[int] | None:
    """The best order of a part, or None if there are too many to look at.

    First the lowest peak, then, among the orders that stay below it, the least live bytes summed over the steps and
    the least shortcut bytes. Two passes, since the lowest peak of a beginning need not lead to the least sum.
    """
    found = _cheapest(graph, part, lambda cost, live, held: max(cost, live), 0)
    if found is None:
        return None
    peak, _ = found

    def add(cost: tuple[int, int], live: int, held: int) -> tuple[int, int] | None:
        return (cost[0] + live, cost[1] + held) if live <= peak else None

    _, order = _cheapest(graph, part, add, (0, 0))
    return list(order)


def _cheapest(graph: Graph, part: list[int], add: Callable, start: Cost) -> tuple[Cost, tuple[int, ...]] | None:
    """The lowest cost of running a part, and the first order in the file that has it; None: too many to look at.

    ``add`` gives the cost after one more step from the cost so far and that step's live and shortcut-held bytes (None:
    not allowed). For each set of steps already run, ``reached`` has the lowest cost that leads to it, and the order.
    """
    reached = {(1 << part[0]) - 1: (start, ())}
    looked_at = 0
    for _ in part:
        sets, reached = reached, {}
        for done, (cost, order) in sets.items():
            for number, live, held in _next_steps(graph, part, done):
                total = add(cost, live, held)
                if total is not None:
                    candidate, after = (total, (*order, number)), done | 1 << number
                    reached[after] = min(candidate, reached.get(after, candidate))
            if (looked_at + len(reached)) * len(part) > MAX_SEARCH:
                return None
        looked_at += len(reached)
    (found,) = reached.values()
    return found


def _next_steps(graph: Graph, part: list[int], done: int) -> Iterator[tuple[int, int, int]]:
    """The steps of a part that can run after the steps ``done``, each with its live and its shortcut-held bytes."""
    before = graph.live(done)
    for number in part:
        if not done >> number & 1 and not graph.needs[number] & ~done:
            ran = run(graph, number, done, before)
            held = (name for name in ran.live if is_held(graph, ran, name, number, done))
            yield number, graph.size(ran.live), graph.size(held)
