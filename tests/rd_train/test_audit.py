"""The gradient audit: its two paths are what the losses' own gradients give, and it leaves nothing behind."""

from functools import partial

import pytest
import torch

from rd_train.audit import gradient_audit, plot_audit
from rd_train.distill import CrossEntropy, ResidualDistillation
from rd_train.networks import Network, parse_arch


def tiny(name: str, seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(parse_arch(name, width=1 / 16, in_channels=1, classes=3)).double()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def joint(student: Network, **options) -> ResidualDistillation:
    return ResidualDistillation(student, tiny("resnet20", 2), **{"feature_weight": 0.0, **options}).double()


def stage_gradients(make, scale: float) -> list[torch.Tensor]:
    """Gradients of stages 1 and 2, each flat, of ``scale`` times a task's loss at the start of training."""
    task, (images, labels) = make(tiny("plain20", 1)).train(), batch()
    (scale * task(images, labels, torch.tensor(0.0))["loss"]).backward()
    stages = [task.student.stage_blocks(index).parameters() for index in (0, 1)]
    return [torch.cat([parameter.grad.flatten() for parameter in stage]) for stage in stages]


# Whatever else the loss has, the paths are of cross-entropies alone.
@pytest.mark.parametrize("more", [{}, {"feature_weight": 1.0}, {"kd_weight": 0.5}, {"splice_weight": 3.0}])
def test_paths_are_those_of_the_cross_entropies(more):
    figures = gradient_audit(joint(tiny("plain20", 1), **more).train(), *batch())
    assert set(figures) == {f"audit{k}_{name}" for k in (1, 2) for name in ("plain", "teacher", "cosine")}
    # At m = 1 the joint loss is a third of the sum of the student's and the splices' cross-entropies.
    plain, whole = stage_gradients(CrossEntropy, 1.0), stage_gradients(joint, 3.0)
    for stage in (0, 1):
        teacher = whole[stage] - plain[stage]
        cosine = plain[stage] @ teacher / (plain[stage].norm() * teacher.norm())
        expected = {"plain": plain[stage].norm(), "teacher": teacher.norm(), "cosine": cosine}
        for name, value in expected.items():
            torch.testing.assert_close(figures[f"audit{stage + 1}_{name}"], float(value), rtol=1e-6, atol=1e-9)


def test_nothing_is_left_behind():
    task = joint(tiny("plain20", 1)).train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    gradient_audit(task, *batch())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())


def test_the_picture_is_drawn_if_there_is_something_to_draw(tmp_path):
    assert not plot_audit(tmp_path / "none.png", [{"phase": "student", "epoch": 1}])
    audit = partial(gradient_audit, joint(tiny("plain20", 1)).train())
    assert plot_audit(tmp_path / "audit.png", [{"epoch": epoch, **audit(*batch(epoch))} for epoch in (1, 2)])
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()
