"""Does a compiled step of residual distillation compute the eager gradients? (Minutes: a compiler runs.)

    python benchmarks/check_compile.py

Float64, all combinations of teacher mode and teacher BN; exit 1 where the student's gradients differ by more than 1e-9.
"""

import copy
import itertools
import sys

import torch

from rd_train.distill import ResidualDistillation
from rd_train.networks import Network, parse_arch


def gradients(student: Network, teacher: Network, compiled: bool, **options) -> torch.Tensor:
    """All gradients of the student after one step."""
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    torch.manual_seed(1)  # the connectors
    task = ResidualDistillation(student, teacher, **options).double().train()
    torch.manual_seed(2)
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    step = torch.compile(task) if compiled else task
    step(images, labels, torch.tensor(0.3, dtype=torch.float64))["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def main() -> int:
    """Compare and report."""
    torch.manual_seed(0)
    student, teacher = (
        Network(parse_arch(name, width=1 / 16, in_channels=1, classes=3)).double() for name in ("plain20", "resnet20")
    )
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    worst = 0.0
    for train_teacher, teacher_bn in itertools.product((False, True), ("eval", "batch")):
        options = {"train_teacher": train_teacher, "teacher_bn": teacher_bn}
        eager, compiled = (gradients(student, teacher, flag, **options) for flag in (False, True))
        error = float((eager - compiled).norm() / eager.norm())
        worst = max(worst, error)
        print(f"{options}: relative difference {error:.1e}", flush=True)
    return int(not worst < 1e-9)


if __name__ == "__main__":
    sys.exit(main())
