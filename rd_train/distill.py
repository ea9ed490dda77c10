"""Training tasks: one call is one forward pass including the loss, so that the loop knows nothing about distillation.

``task(images, labels, progress)`` returns ``{"loss", "output", "terms"}``: the scalar to minimise, the student's
logits, and named detached scalars for the log.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rd_deploy.common import UserError
from rd_train.losses import at_least_float32, logit_distillation, margin_relu_distance, negative_margin
from rd_train.networks import Network
from rd_train.schedules import cosine_decay

TeacherBN = Literal["eval", "batch"]


class CrossEntropy(nn.Module):
    """Ordinary training of any network, residual or plain (``ce``)."""

    def __init__(self, student: Network, *, label_smoothing: float = 0.0):
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing

    def ce(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=self.label_smoothing)

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict:
        logits = self.student(images)
        loss = self.ce(logits, labels)
        return {"loss": loss, "output": logits, "terms": {"ce": loss.detach()}}


class _Distillation(CrossEntropy):
    """A student with a teacher; a frozen teacher stays frozen and in evaluation mode, whatever `train` is told."""

    def __init__(
        self, student: Network, teacher: Network, *, train_teacher: bool = False, label_smoothing: float = 0.0
    ):
        super().__init__(student, label_smoothing=label_smoothing)
        if teacher.arch.classes != student.arch.classes or teacher.arch.in_channels != student.arch.in_channels:
            raise UserError(
                f"teacher {teacher.arch.name} has {teacher.arch.in_channels} input channels and {teacher.arch.classes} "
                f"classes, the student {student.arch.in_channels} and {student.arch.classes}; they must agree"
            )
        self.teacher = teacher.requires_grad_(train_teacher)
        self.train_teacher = train_teacher
        self.train(self.training)

    def train(self, mode: bool = True) -> "_Distillation":
        super().train(mode)
        if not self.train_teacher:
            self.teacher.eval()
        return self


class LogitDistillation(_Distillation):
    """(1 - α) · CE + α · T² KL(teacher || student) with a frozen teacher (``kd``, Hinton et al. 2015)."""

    def __init__(self, student: Network, teacher: Network, *, weight: float, temperature: float, **options):
        super().__init__(student, teacher, **options)
        self.weight, self.temperature = weight, temperature

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict:
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        ce, kd = self.ce(logits, labels), logit_distillation(logits, teacher_logits, self.temperature)
        loss = (1 - self.weight) * ce + self.weight * kd
        return {"loss": loss, "output": logits, "terms": {"ce": ce.detach(), "kd": kd.detach()}}


class ResidualDistillation(_Distillation):
    """Residual distillation (``jointrd``; Li et al., NeurIPS 2020).

    The student's pre-activation at the end of stage k = 1 .. S-1 is also fed to the teacher's stages k+1 .. S and
    classifier (splice k). With n branches (the student and the configured splices) the student's loss is

        1/n · { CE(student) + m Σ CE(splice_k) + w · [ D(student) + m Σ D(splice_k) ] }

    m falls from ``splice_weight`` to ``splice_weight_end`` along a cosine over ``splice_window`` of training. D is the
    margin-ReLU distance of a branch's final pre-activation, through a 1x1 convolution + BN of its own, to the teacher's
    final pre-activation of the same images; per image it is summed over C, H, W, or with ``feature_reduction="mean"``
    averaged, so that one weight w serves all input sizes. ``splice_weight=0`` leaves the splices out (n = 1).

    ``train_teacher``: the teacher also learns, by its own cross-entropy only. The splices run through `frozen_view`,
    so that no teacher weight ever receives a gradient from them and none is computed. ``teacher_bn``: BN of the
    spliced teacher stages in evaluation mode, or on batch statistics (running ones untouched).
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        *,
        splice_weight: float = 1.0,
        splice_weight_end: float = 0.5,
        splice_window: float = 0.5,
        feature_weight: float = 1.0,
        feature_reduction: Literal["mean", "sum"] = "mean",
        teacher_bn: TeacherBN = "eval",
        **options,
    ):
        super().__init__(student, teacher, **options)
        _check_spliceable(student, teacher)
        self.splice_weight, self.splice_weight_end, self.splice_window = splice_weight, splice_weight_end, splice_window
        self.feature_weight, self.feature_reduction = feature_weight, feature_reduction
        self.splices = range(1, student.stages) if splice_weight > 0 else range(0)
        branches = 1 + len(self.splices)
        channels = teacher.fc.in_features
        self.connectors = nn.ModuleList(_connector(channels) for _ in range(branches if feature_weight > 0 else 0))
        self.connectors.to(teacher.fc.weight.device)
        # In a list: the view aliases the teacher's tensors and must not appear in the state_dict a second time.
        self._view = [frozen_view(teacher, teacher_bn)]

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict:
        features = self.student.features(images)
        logits = self.student.head(features[-1])
        m = cosine_decay(progress, self.splice_weight, self.splice_weight_end, self.splice_window)
        target, teacher_ce = self._teacher(images, labels)

        ce = self.ce(logits, labels)
        loss, terms = ce, {"ce": ce.detach()}
        if self.feature_weight > 0:
            distance = self._distance(0, features[-1], target)
            loss = loss + self.feature_weight * distance
            terms["feature"] = distance.detach()
        for k in self.splices:
            final = self._through_teacher(k, features[k - 1])
            splice_ce = self.ce(self._view[0].head(final), labels)
            loss = loss + m * splice_ce
            terms[f"splice{k}_ce"] = splice_ce.detach()
            if self.feature_weight > 0:
                distance = self._distance(k, final, target)
                loss = loss + m * self.feature_weight * distance
                terms[f"splice{k}_feature"] = distance.detach()
        loss = loss / (1 + len(self.splices))
        if teacher_ce is not None:  # disjoint parameters: adding it changes no gradient of the student
            loss = loss + teacher_ce
            terms["teacher_ce"] = teacher_ce.detach()
        return {"loss": loss, "output": logits, "terms": terms}

    # Not compiled: with a learning teacher in BN evaluation mode, Inductor mixes up the running statistics that this
    # forward updates with those the splices read, and the student's gradient is wrong (4% seen with torch 2.14).
    @torch.compiler.disable
    def _teacher(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The clean teacher's final pre-activation (detached) and, if it learns, its cross-entropy."""
        if self.train_teacher:
            final = self.teacher.features(images)[-1]
            return final.detach(), self.ce(self.teacher.head(final), labels)
        if self.feature_weight == 0:
            return None, None
        with torch.no_grad():
            return self.teacher.features(images)[-1], None

    def _through_teacher(self, k: int, x: Tensor) -> Tensor:
        for index in range(k, self.teacher.stages):
            x = self._view[0].stage(index, x)
        return x

    def _distance(self, branch: int, final: Tensor, target: Tensor) -> Tensor:
        margin = negative_margin(self.teacher.stage_blocks(self.teacher.stages - 1)[-1].convs[-1][1])
        distance = margin_relu_distance(self.connectors[branch](final), target, margin)
        return distance / target[0].numel() if self.feature_reduction == "mean" else distance


def _connector(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _check_spliceable(student: Network, teacher: Network) -> None:
    def boundaries(network: Network) -> list[int]:
        return [network.stage_blocks(index)[-1].convs[-1][0].out_channels for index in range(network.stages)]

    if boundaries(student) != boundaries(teacher) or student.arch.stem != teacher.arch.stem:
        raise UserError(
            f"student {student.arch.name} cannot be spliced into teacher {teacher.arch.name}: stage channels "
            f"{boundaries(student)} and {boundaries(teacher)}, stems {student.arch.stem} and {teacher.arch.stem}; "
            "choose a teacher of the same family and width"
        )


def frozen_view(network: Network, bn: TeacherBN) -> Network:
    """A second module over the SAME parameters and statistics, through which gradients pass but never reach weights.

    It follows the original as that learns, because it shares its storage: place the network (device, memory format)
    before, not after. ``bn="batch"`` normalises by batch statistics and leaves the running ones alone.
    """
    view = copy.deepcopy(network).requires_grad_(False).eval()
    for mine, theirs in zip(view.parameters(), network.parameters(), strict=True):
        mine.data = theirs.data
    for mine, theirs in zip(view.modules(), network.modules(), strict=True):
        if isinstance(mine, nn.BatchNorm2d):
            shared = bn == "eval"
            mine.track_running_stats = shared
            mine.running_mean = theirs.running_mean if shared else None
            mine.running_var = theirs.running_var if shared else None
    return view
