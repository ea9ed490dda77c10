"""The best order against a brute force over every order of random programs, with births and deaths of tensors."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_builder import UNIT, Builder, elements

from rd_deploy.memory import ledger


@dataclass(frozen=True)
class Planned:
    """A step of a random program. Tensor 0 is the image, tensor n is what step n makes. ``addend``: a tensor."""

    kind: str
    sources: tuple[int, ...]
    addend: int | None = None


@dataclass(frozen=True)
class Program:
    steps: dict[int, Planned]
    channels: list[int]  # of each tensor, the image first; all have one pixel

    @property
    def outputs(self) -> set[int]:
        """Every tensor that no step reads."""
        return set(self.steps) - {name for step in self.steps.values() for name in (*step.sources, step.addend)}

    def model(self) -> onnx.ModelProto:
        builder, names = Builder(), ["image"]
        for number, step in self.steps.items():
            sources = [names[source] for source in step.sources]
            if step.kind == "conv":
                name = builder.conv(sources[0], self.channels[step.sources[0]], self.channels[number])
                names.append(name if step.addend is None else builder.op("Add", name, names[step.addend]))
            else:
                attributes = {"MaxPool": {"kernel_shape": [1, 1]}, "Concat": {"axis": 1}}.get(step.kind, {})
                names.append(builder.op(step.kind, *sources, **attributes))
        return builder.model(["N", self.channels[0], 1, 1], *(names[number] for number in sorted(self.outputs)))

    def partners(self) -> dict[int, int]:
        """Pairs of convolutions whose results are only added to each other: whichever runs last adds."""
        readers = [name for step in self.steps.values() for name in (*set(step.sources), step.addend)]
        pairs = {}
        for number, step in self.steps.items():
            other = self.steps.get(step.addend)
            if other and other.kind == "conv" and other.addend is None and readers.count(step.addend) == 1:
                pairs |= {number: step.addend, step.addend: number}
        return pairs

    def orders(self) -> Iterator[tuple[int, ...]]:
        """Every order in which each step comes after the makers of what it reads."""
        pairs = self.partners()
        needs = {
            number: {*step.sources, step.addend} - {None, 0, pairs.get(number)} for number, step in self.steps.items()
        }
        needs = {number: read | {pairs[name] for name in read if name in pairs} for number, read in needs.items()}
        for order in itertools.permutations(self.steps):
            if all(needs[number] <= set(order[:place]) for place, number in enumerate(order)):
                yield order

    def peak(self, order: tuple[int, ...], policy: str) -> int:
        """The most elements that are live in this order."""
        pairs, births, deaths, saved = self.partners(), {0: 0}, {}, []
        for time, number in enumerate(order):
            step, added, result = self.steps[number], self.steps[number].addend, number
            if number in pairs:
                is_last = pairs[number] in order[:time]
                adds, total = step.addend is not None, max(number, pairs[number])  # the later one names the sum
                added = (min(number, pairs[number]) if adds else -total) if is_last else None
                result = total if is_last else (-total if adds else number)  # -total: what the later one makes alone
            births[result] = time
            deaths |= dict.fromkeys((*step.sources, *([] if added is None else [added])), time)
            may = step.sources if step.kind == "Sigmoid" else () if added in (None, *step.sources) else (added,)
            saved += [(time, name) for name in may if step.kind == "Sigmoid" or policy == "in-place"]
        deaths |= dict.fromkeys(self.outputs, len(order))
        overwritten = {(time, name) for time, name in saved if deaths[name] == time and name != 0}
        return max(
            sum(
                self.channels[abs(name)]
                for name, birth in births.items()
                if birth <= time <= deaths[name] and (time, name) not in overwritten
            )
            for time in range(len(order))
        )


@st.composite
def programs(draw) -> Program:
    steps, channels = {}, [draw(st.integers(1, 3))]
    for number in range(1, draw(st.integers(2, 6)) + 1):
        tensor = st.integers(max(0, number - 4), number - 1)
        kind = draw(st.sampled_from(["conv", "conv", "sum", "sum", "MaxPool", "Sigmoid", "Concat"]))
        source, other = draw(tensor), draw(tensor)
        if kind == "sum":
            steps[number] = Planned("conv", (source,), other)
        elif kind == "Concat":
            steps[number] = Planned(kind, (source, other))
        elif kind == "Sigmoid" and source and steps[source].kind == "conv":
            steps[number] = Planned("MaxPool", (source,))  # a pointwise operator would be fused into the convolution
        else:
            steps[number] = Planned(kind, (source,))
        sizes = {"conv": draw(st.integers(1, 4)), "sum": channels[other], "Concat": channels[source] + channels[other]}
        channels.append(sizes.get(kind, channels[source]))
    return Program(steps, channels)


@settings(max_examples=150, deadline=None)
@given(programs())
def test_peak_is_the_lowest_over_all_orders(program):
    for policy in ("separate", "in-place"):
        best = min(program.peak(order, policy) for order in program.orders())
        found = ledger(program.model(), element_bytes=1, policy=policy)
        assert (found.peak_bytes, found.best_order) == (best, True)
        assert len(found.steps) == len(program.steps)


def shuffled(model: onnx.ModelProto, draw: random.Random) -> onnx.ModelProto:
    """The same network in a file that lists its nodes in another order."""
    copy, waiting, made = onnx.ModelProto(), list(model.graph.node), {"image"}
    copy.CopyFrom(model)
    made |= {tensor.name for tensor in model.graph.initializer}
    del copy.graph.node[:]
    while waiting:
        node = draw.choice([node for node in waiting if made.issuperset(node.input)])
        waiting.remove(node)
        made |= set(node.output)
        copy.graph.node.append(node)
    return copy


@settings(max_examples=100, deadline=None)
@given(programs(), st.randoms(use_true_random=False))
def test_the_figures_belong_to_the_network_and_not_to_its_file(program, draw):
    model = program.model()
    for policy in ("separate", "in-place"):
        one, other = (ledger(file, element_bytes=1, policy=policy) for file in (model, shuffled(model, draw)))
        for figure in ("peak_bytes", "shortcut_share", "traffic_bytes"):
            assert getattr(one, figure) == getattr(other, figure), figure


def test_of_orders_with_the_same_peak_the_one_with_less_in_memory_is_taken():
    """Two branches of 1 and 3 channels, then a step that sets the peak: the small branch goes first."""
    sizes = []
    for first, second in ((1, 3), (3, 1)):
        builder = Builder()
        branches = [builder.conv("image", 9, channels) for channels in (first, second)]
        result = builder.conv(builder.op("Concat", *branches, axis=1), 4, 99)
        sizes.append([step.live_bytes for step in ledger(builder.model(["N", 9, 1, 1], result), 1, 1).steps])
    assert sizes[0] == sizes[1] == [9 + 1, 9 + 1 + 3, 4 + 4, 4 + 99]


def test_a_part_too_wide_to_search_keeps_the_files_order_and_says_so(monkeypatch):
    monkeypatch.setattr("rd_deploy.schedule.MAX_SEARCH", 10)
    found = elements(50, True, "in-place", swap=True)
    assert not found.best_order
    assert found.peak_bytes == 8 * UNIT  # the projection before reduce, as the file has it
