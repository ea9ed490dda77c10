"""Feature-map ledger: how many bytes of feature maps an ONNX network needs while it runs, step by step.

It is analysis, not measurement: shapes come from shape inference, weights and workspace are left out, and every
convolution is one step together with its batch normalisation, activation and residual addition (`rd_deploy.fusion`).
`Policy` says where the sum of a residual block goes:

``separate``  the convolution that adds the shortcut writes a new tensor (its input, the shortcut and the sum are live);
``in-place``  it accumulates into the shortcut's buffer where that is legal: nothing else still reads the shortcut, the
              convolution itself does not read it, and it is not the caller's input. Unfused sums and products likewise.

Under both policies a unary pointwise operator overwrites an operand that dies there, views (reshape, flatten, dropout)
cost nothing, and each block runs in the order of its branches that needs the least (`rd_deploy.schedule`). Network
inputs count until their last reader, network outputs from their step to the end. Operators that are not known here are
one step each, with all their inputs and outputs live: an upper bound. A block fused into one kernel by an engine can
need less. What a shortcut is, and which bytes it holds, is defined in `rd_deploy.liveness`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx

from rd_deploy.common import UserError
from rd_deploy.fusion import fuse
from rd_deploy.liveness import Graph, build_graph, is_held, run
from rd_deploy.onnx_files import runtime_inputs
from rd_deploy.onnx_shapes import Shapes, infer_shapes
from rd_deploy.schedule import best_order

Policy = Literal["separate", "in-place"]


@dataclass(frozen=True)
class LedgerStep:
    """One fused step. Bytes for the whole batch.

    ``live_bytes``: all feature maps that exist while it runs: its inputs, its outputs and everything waiting.
    ``shortcut_bytes``: the part of them that only shortcuts still need. ``read_bytes``, ``written_bytes``: each input
    and output once.
    """

    name: str
    op: str
    live_bytes: int
    shortcut_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Ledger:
    """The feature maps of one network in the order of execution, under one policy; see the module's docstring.

    ``best_order``: False if a part of the network had too many orders to search and kept the file's order.
    """

    policy: Policy
    batch: int
    element_bytes: int
    steps: tuple[LedgerStep, ...]
    best_order: bool

    @property
    def _peak(self) -> LedgerStep:
        return max(self.steps, key=lambda step: (step.live_bytes, -step.shortcut_bytes))

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are live at once."""
        return self._peak.live_bytes

    @property
    def peak_step(self) -> str:
        """Name of the step that needs `peak_bytes`; of several, the first of those where shortcuts hold least."""
        return self._peak.name

    @property
    def shortcut_peak_bytes(self) -> int:
        """Bytes held by shortcuts at `peak_step`."""
        return self._peak.shortcut_bytes

    @property
    def shortcut_share(self) -> float:
        """Bytes held by shortcuts / live bytes, each summed over the steps: 0 to 1."""
        return sum(step.shortcut_bytes for step in self.steps) / sum(step.live_bytes for step in self.steps)

    @property
    def traffic_bytes(self) -> int:
        """Bytes of feature maps read and written by all steps (weights excluded)."""
        return sum(step.read_bytes + step.written_bytes for step in self.steps)


def ledger(model: onnx.ModelProto, batch: int = 1, element_bytes: int = 4, policy: Policy = "separate") -> Ledger:
    """Count the feature maps of ``model`` at ``batch``, with every floating-point element in ``element_bytes`` bytes.

    Integer and boolean tensors keep their own size. A file with another fixed batch is re-inferred for this one.
    Raises `UserError` when a shape cannot be known before running, or the file cannot run at this batch.
    """
    if policy not in ("separate", "in-place"):
        raise UserError(f"policy '{policy}' is unknown (known: separate, in-place)")
    if batch < 1 or element_bytes not in (1, 2, 4, 8):
        raise UserError(f"batch {batch} and {element_bytes} bytes per element: need batch >= 1 and 1, 2, 4 or 8 bytes")
    inputs = {value.name for value in runtime_inputs(model)}
    inferred = infer_shapes(model, batch)
    shapes = Shapes(inferred, element_bytes)
    steps, outputs = fuse(inferred, inputs, shapes)
    graph = build_graph(steps, inputs, outputs, shapes, in_place=policy == "in-place")
    order, best = best_order(graph)
    return Ledger(policy, batch, element_bytes, tuple(_walk(graph, order)), best)


def _walk(graph: Graph, order: list[int]) -> Iterator[LedgerStep]:
    """The ledger's lines in the order given."""
    done, size = 0, graph.size
    for number in order:
        ran = run(graph, number, done, graph.live(done))
        held = [name for name in ran.live if is_held(graph, ran, name, number, done)]
        name, op = graph.steps[number].name, "+".join(ran.ops)
        yield LedgerStep(name, op, size(ran.live), size(held), size(ran.reads), size(ran.writes))
        done |= 1 << number
