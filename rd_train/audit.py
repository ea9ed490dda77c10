"""Where the gradient of a stage comes from: through the plain rest of the student, or through the teacher's.

Both gradients are taken with respect to the weights of the same stage on the same batch: of the student's cross-entropy
with the labels, and of the sum of the splices'. The loss's weights, feature distances and logit distillation are left
out. A teacher path that is much longer than the plain one decides alone where the stage goes; a negative cosine says
that the two disagree.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rd_deploy.common import atomic_path
from rd_train import distributed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("plain", "teacher", "cosine")


def gradient_audit(task: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Per stage k (from 1; the last has no teacher path): ``audit{k}_plain``, ``_teacher`` (norms) and ``_cosine``.

    The task must offer ``gradient_paths``. One forward in training mode and two backwards; running statistics of BN
    and gradients are left as they were. Of several processes each gives its own images; the figures are of all of them.
    """
    buffers = {name: value.clone() for name, value in task.named_buffers()}
    own, spliced = task.gradient_paths(images, labels)
    stages = [list(task.student.stage_blocks(index).parameters()) for index in range(task.student.stages - 1)]
    parameters = [parameter for stage in stages for parameter in stage]
    plain = torch.autograd.grad(own, parameters, retain_graph=True, allow_unused=True)
    teacher = torch.autograd.grad(spliced, parameters, allow_unused=True)
    for name, value in task.named_buffers():
        value.copy_(buffers[name])
    figures, start = {}, 0
    for number, stage in enumerate(stages, start=1):
        part = slice(start, start + len(stage))
        one, other = (_flat(gradients[part], stage) for gradients in (plain, teacher))
        distributed.average([one, other])
        cosine = F.cosine_similarity(one, other, dim=0)
        values = dict(zip(FIGURES, (one.norm(), other.norm(), cosine), strict=True))
        figures |= {f"audit{number}_{name}": float(value) for name, value in values.items()}
        start += len(stage)
    return figures


def _flat(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    """One double vector; a parameter that a path does not reach counts as zeros."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs])


def plot_audit(path: Path, rows: list[dict]) -> "Figure | None":
    """Draw the audits in a run's rows: norms on the left, cosines on the right; None if there are none."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "audit1_plain" in row]
    if not rows:
        return None
    epochs, stages = [row["epoch"] for row in rows], range(1, sum(name.endswith("_cosine") for name in rows[0]) + 1)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    norms, cosines = figure.subplots(1, 2)
    for stage in stages:
        values = {name: [row[f"audit{stage}_{name}"] for row in rows] for name in FIGURES}
        color = f"C{stage - 1}"
        norms.plot(epochs, values["plain"], marker=".", color=color, label=f"stage {stage}, plain path")
        norms.plot(epochs, values["teacher"], "--", marker=".", color=color, label=f"stage {stage}, teacher path")
        cosines.plot(epochs, values["cosine"], marker=".", color=color, label=f"stage {stage}")
    drawn = any(math.isfinite(value) and value > 0 for line in norms.lines for value in line.get_ydata())
    norms.set(xlabel="epoch", ylabel="norm of the gradient", yscale="log" if drawn else "linear")
    cosines.set(xlabel="epoch", ylabel="cosine of plain and teacher path", ylim=(-1, 1))
    for axes in (norms, cosines):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)  # a frame would be white in the report's dark mode
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return figure
