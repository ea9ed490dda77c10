"""Running a plan: its arena, its weights on the GPU, and the launches in order."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rd_deploy.chain import INPUT, Conv, Linear, Step, round_to_bf16
from rd_deploy.common import UserError
from rd_deploy.cuda.plan import TYPE_BYTES, Piece, Plan, PlanStep
from rd_deploy.triton_kernels.launch import ELEMENT, Launch


@dataclass(frozen=True)
class Bound:
    """A launch with the memory of its operands; ``weights``: the names of those that are weights."""

    launch: Launch
    operands: dict[str, Any]
    weights: list[str]


class Program:
    """A plan with its memory: one arena, weights, and every launch's operands.

    ``images``: torch tensor (N, H, W, C), ``logits``: (N, classes) float32, both on ``device`` and the caller's.
    ``precision``: "fp16" or "bf16". ``pdl``: programmatic dependent launch between kernels, from sm_90 on.
    """

    def __init__(self, plan: Plan, precision: str, images, logits, pdl: bool = False):
        import torch

        self.plan, self.images, self.logits = plan, images, logits
        self.arena = torch.zeros(plan.arena_bytes, dtype=torch.uint8, device=images.device)
        self._types = {ELEMENT: images.dtype, "fp32": torch.float32, "i32": torch.int32}
        self.launches: list[Bound] = []
        for step in plan.steps:
            launch = step.piece.kernel.launch(step.config, pdl)
            weights = self._packed(step.piece, launch, precision)
            self.launches.append(Bound(launch, self._maps(step) | self._scratch(step) | weights, list(weights)))

    def run(self) -> None:
        """Enqueue every launch on torch's current stream."""
        for bound in self.launches:
            bound.launch.run(bound.operands)

    def _maps(self, step: PlanStep) -> dict[str, Any]:
        last = step is self.plan.steps[-1]
        maps = {"x": self._tensor(step.source), "out": self.logits if last else self._tensor(step.out)}
        return maps | ({"add": self._tensor(step.add)} if step.add else {})

    def _tensor(self, name: str):
        """A map by its name; kernels know its shape and need only where it begins."""
        return self.images if name == INPUT else self._view(name, ELEMENT, 1)

    def _scratch(self, step: PlanStep) -> dict[str, Any]:
        wanted = step.piece.kernel.scratch(step.config)
        return {name: self._view(f"{step.out}/{name}", kind, count) for name, (kind, count) in wanted.items()}

    def _view(self, name: str, kind: str, elements: int):
        start = self.plan.offsets[name]
        return self.arena[start : start + elements * TYPE_BYTES[kind]].view(self._types[kind])

    def _packed(self, piece: Piece, launch: Launch, precision: str) -> dict[str, Any]:
        """Weights as the kernel reads them."""
        import torch

        packed = {}
        for name, values in pack(piece, precision, launch).items():
            kind = self._types[launch.tensors[name]]
            packed[name] = torch.from_numpy(np.array(values)).to(self.images.device, kind)
        return packed


def pack(piece: Piece, precision: str, launch: Launch) -> dict[str, np.ndarray]:
    """The kernel's operands in float32, its weights rounded once to ``precision``; one beyond it is a `UserError`."""
    operands = piece.kernel.weights(*(_rounded(step, precision) for step in piece.steps))
    for name, values in operands.items():
        if launch.tensors[name] == ELEMENT and not np.isfinite(values).all():
            names = " · ".join(step.name for step in piece.steps)
            most = max(np.abs(step.weight).max() for step in piece.steps if isinstance(step, Conv | Linear))
            advice = "use bf16" if precision == "fp16" else "train again"
            raise UserError(f"{names}: a weight of {most:.3g} is more than {precision} holds; {advice}")
    return operands


def _rounded(step: Step, precision: str) -> Step:
    """A step with weights of the precision, before its kernel makes float32 of them; biases stay as they are."""
    if not isinstance(step, Conv | Linear):
        return step
    with np.errstate(over="ignore"):
        weight = round_to_bf16(step.weight) if precision == "bf16" else step.weight.astype(np.float16)
    return replace(step, weight=weight)
