"""Liveness: which feature maps exist while a step runs, given only the set of steps that have run before it.

A tensor exists between steps if all that lead to it has run and something is still to read it. While a step runs, its
results exist too. One of them may lie in the buffer of an operand that dies there; that operand is then not counted.

**Shortcut-held.** Of the two operands of a residual addition (two computed tensors of equal shape), the one with fewer
steps between it and the network's input is the shortcut (at a tie, the second). A step whose results only shortcuts use
(a projection) belongs to the shortcut too. A tensor is held by shortcuts during a step if every use of it that is still
to come, this step's included, is by a shortcut. So is, during a fused addition that writes a new tensor, the operand it
adds, whichever branch came last: without the shortcut there would be one such tensor, not two. A buffer that is being
overwritten with the sum counts as the sum. Concatenations (U-Net, DenseNet) are not shortcuts in this sense.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rd_deploy.fusion import Step
from rd_deploy.onnx_shapes import Shapes


@dataclass(frozen=True)
class Graph:
    """Fused steps in the file's order. Sets of steps are bit masks: bit n is step n.

    ``in_place``: whether an addition or product of two tensors may overwrite one of them.
    ``bytes``: of each tensor. ``makers``: for each tensor, all steps that lead to it. ``uses``, ``shortcut_uses``: for
    each tensor, the steps that read it, and those that do so as a shortcut. ``needs``: for each step, all steps that
    lead to it.
    """

    steps: list[Step]
    inputs: set[str]
    outputs: set[str]
    in_place: bool
    bytes: dict[str, int]
    makers: dict[str, int]
    uses: dict[str, int]
    shortcut_uses: dict[str, int]
    needs: list[int]

    def size(self, names: Iterable[str]) -> int:
        """Bytes of these tensors together."""
        return sum(self.bytes[name] for name in names)

    def is_wanted(self, name: str, done: int) -> bool:
        """Whether a tensor is still to be read once the steps ``done`` have run, or is the network's output."""
        return name in self.outputs or bool(self.uses.get(name, 0) & ~done)

    def live(self, done: int) -> list[str]:
        """The tensors that exist once the steps ``done`` have run."""
        return [name for name, makers in self.makers.items() if not makers & ~done and self.is_wanted(name, done)]


def build_graph(steps: list[Step], inputs: set[str], outputs: set[str], shapes: Shapes, in_place: bool) -> Graph:
    """Find what leads to each step and tensor, and what reads each tensor."""
    index = {id(step): number for number, step in enumerate(steps)}
    uses: dict[str, int] = {}
    makers, needs = dict.fromkeys(inputs, 0), [0] * len(steps)
    for number, step in enumerate(steps):
        for name in step.operands:
            uses[name] = uses.get(name, 0) | 1 << number
            needs[number] |= makers[name]
        if step.sum:  # whichever of the two products runs last reads the other's result
            uses[step.writes[0]] = 1 << index[id(step.partner)]
        for name in (*step.writes, *(step.sum.writes if step.sum else ())):
            makers[name] = makers.get(name, 0) | needs[number] | 1 << number
    sizes = {name: shapes.bytes(name) for name in makers}
    return Graph(steps, inputs, outputs, in_place, sizes, makers, uses, _shortcut_uses(steps, uses), needs)


def _shortcut_uses(steps: list[Step], uses: dict[str, int]) -> dict[str, int]:
    """For each tensor, its uses as the shortcut of an addition or by a step that lies on a shortcut."""
    found: dict[str, int] = {}
    for number in reversed(range(len(steps))):  # from the outputs: what uses a step's results is known by then
        step = steps[number]
        if step.shortcut_operand and step.shortcut_operand not in (step.reads if step.addend else ()):
            found[step.shortcut_operand] = found.get(step.shortcut_operand, 0) | 1 << number
        if step.sum and step.on_shortcut:
            found[step.writes[0]] = uses[step.writes[0]]
        results = [name for name in step.writes if uses.get(name)]
        if step.on_shortcut or (results and all(found.get(name) == uses[name] for name in results)):
            for name in step.reads:
                found[name] = found.get(name, 0) | 1 << number
    return found


@dataclass(frozen=True)
class Run:
    """One step as it runs after a given set of steps: its operators, and the tensors it reads, writes and finds live.

    ``addend``: what a fused addition adds. ``live``: the operand whose buffer became the result's is not among them.
    """

    ops: list[str]
    reads: list[str]
    writes: list[str]
    live: set[str]
    addend: str | None


def run(graph: Graph, number: int, done: int, before: Iterable[str]) -> Run:
    """Run a step after the steps ``done``, which leave the tensors ``before``: ``graph.live(done)``."""
    step = graph.steps[number]
    ops, addend, writes, overwrites = step.ops, step.addend, step.writes, step.overwrites
    if step.sum and graph.uses[step.writes[0]] & done:  # the partner has run: add its result to ours
        ops, addend, writes = [*ops, *step.sum.ops], step.partner.writes[0], step.sum.writes
        overwrites = [addend]
    reads = list(dict.fromkeys([*step.reads, *([addend] if addend else [])]))
    after = done | 1 << number
    dying = [name for name in overwrites if name not in graph.inputs and not graph.is_wanted(name, after)]
    reused = dying[:1] if step.unary or graph.in_place else []
    return Run(ops, reads, writes, {*before, *writes} - set(reused), addend)


def is_held(graph: Graph, ran: Run, name: str, number: int, done: int) -> bool:
    """Whether a tensor that is live during step ``number``, run after ``done``, is held by shortcuts."""
    to_come = graph.uses.get(name, 0) & ~done
    if name in graph.outputs or not to_come:
        return False
    only_added = name == ran.addend and name not in graph.steps[number].reads and to_come == 1 << number
    return only_added or not to_come & ~graph.shortcut_uses.get(name, 0)
