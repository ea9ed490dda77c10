"""The order of a network's steps that needs the least memory.

A step that every earlier step leads to, and that leads to every later step, has the same live tensors in every order,
so these steps cut the network into independent parts. Within a part, a dynamic programme over the sets of steps already
run finds the lowest peak exactly (what is live depends on the set only); ties go to the file's order. A part too wide
to search (`MAX_SEARCH`) keeps the file's order.
"""

import itertools
import operator

from rd_deploy.liveness import Graph, run

MAX_SEARCH = 1_000_000  # sets of steps x steps that the search for the best order looks at, per part of the network


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
    """The order of a part with the lowest peak (ties: the file's order), or None if there are too many to look at.

    For each set of steps already run, ``reached`` has the lowest peak that leads to it, and the order that does.
    """
    reached = {(1 << part[0]) - 1: (0, ())}
    looked_at = 0
    for _ in part:
        sets, reached = reached, {}
        for done, (peak, order) in sets.items():
            live = graph.live(done)
            for number in part:
                if done >> number & 1 or graph.needs[number] & ~done:
                    continue
                ran = run(graph, number, done, live)
                candidate = (max(peak, graph.size(ran.live)), (*order, number))
                after = done | 1 << number
                reached[after] = min(candidate, reached.get(after, candidate))
            if (looked_at + len(reached)) * len(part) > MAX_SEARCH:
                return None
        looked_at += len(reached)
    ((_, order),) = reached.values()
    return list(order)
