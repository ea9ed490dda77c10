"""Training tasks: one call is one forward pass including the loss, so that the loop knows nothing about distillation.

``task(images, labels, progress)`` returns ``{"loss", "output", "terms"}``: the scalar to minimise, the student's
logits, and named detached scalars for the log. Labels are classes (N,), or probabilities (N, classes) of mixed images.
A task may have steps of several kinds: ``outcomes(progress)`` says which, and a step is told its own by keywords.
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
MOMENTS = 100  # of training, at which it is asked what kinds of step there are


class CrossEntropy(nn.Module):
    """Ordinary training of any network, residual or plain (``ce``)."""

    def __init__(self, student: Network, *, label_smoothing: float = 0.0):
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing

    def ce(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=self.label_smoothing)

    def outcomes(self, progress: float) -> list[tuple[float, dict]]:
        """The kinds of step there can be at ``progress`` in [0, 1]: (probability, keywords of `forward`)."""
        return [(1.0, {})]

    def kinds(self) -> list[dict]:
        """Every kind of step that a training may have."""
        found = [kind for moment in range(MOMENTS + 1) for _, kind in self.outcomes(moment / MOMENTS)]
        return [kind for number, kind in enumerate(found) if kind not in found[:number]]

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict:
        logits = self.student(images)
        loss = self.ce(logits, labels)
        return {"loss": loss, "output": logits, "terms": {"ce": loss.detach()}}


class _Distillation(CrossEntropy):
    """A student with a teacher; a frozen teacher stays frozen and in evaluation mode, whatever `train` is told.

    ``kd_weight`` α > 0: in a step that distils, the student's own CE becomes (1 - α) CE + α T² KL(teacher || student)
    on the same images (Hinton et al. 2015), T being ``kd_temperature``. From ``kd_start`` (in [0, 1], of training) on a
    step distils with ``kd_probability``, before that none does; only those that do run the clean teacher for it.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        *,
        train_teacher: bool = False,
        kd_weight: float = 0.0,
        kd_temperature: float = 4.0,
        kd_start: float = 0.0,
        kd_probability: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(student, label_smoothing=label_smoothing)
        self.kd_weight, self.kd_temperature = kd_weight, kd_temperature
        self.kd_start, self.kd_probability = kd_start, kd_probability
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

    def outcomes(self, progress: float) -> list[tuple[float, dict]]:
        """Each kind of step with logit distillation and without, as far as there is one at ``progress``."""
        kinds = super().outcomes(progress)
        if self.kd_weight == 0:
            return kinds
        share = self.kd_probability if progress >= self.kd_start else 0.0
        shares = [(probability, distils) for probability, distils in ((share, True), (1 - share, False)) if probability]
        return [(p * share, kind | {"distils": distils}) for p, kind in kinds for share, distils in shares]

    def label_loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, dict]:
        """The student's own cross-entropy, distilled where there are logits of the teacher; and its terms."""
        loss = ce = self.ce(logits, labels)
        terms = {"ce": ce.detach()}
        if teacher_logits is not None:
            kd = logit_distillation(logits, teacher_logits, self.kd_temperature)
            loss = (1 - self.kd_weight) * ce + self.kd_weight * kd
            terms["kd"] = kd.detach()
        return loss, terms


class LogitDistillation(_Distillation):
    """Logit distillation from a frozen teacher, of any architecture (``kd``)."""

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor, distils: bool = True) -> dict:
        teacher_logits = None
        if distils and self.kd_weight > 0:
            with torch.no_grad():
                teacher_logits = self.teacher(images)
        logits = self.student(images)
        loss, terms = self.label_loss(logits, labels, teacher_logits)
        return {"loss": loss, "output": logits, "terms": terms}


class ResidualDistillation(_Distillation):
    """Residual distillation, the paper's (``jointrd``; Li et al., NeurIPS 2020) and ours (``rd``).

    The student's pre-activation at the end of stage k = 1 .. S-1 is also fed to the teacher's stages k+1 .. S and
    classifier. Together with the student itself these are n = S branches (4 in the ImageNet family), and the
    student's loss is

        1/n · { CE(student) + m(t) Σ_k CE(splice_k) + w · [ D(student) + m(t) Σ_k D(splice_k) ] }

    m falls from ``splice_weight`` to ``splice_weight_end`` along a cosine over ``splice_window`` of training. D is the
    margin-ReLU distance of a branch's final pre-activation, through a 1x1 convolution + BN of its own, to the teacher's
    final pre-activation of the same images; per image it is summed over C, H, W, or with ``feature_reduction="mean"``
    averaged, so that one weight w serves all input sizes. ``splice_weight=0`` leaves the splices out (n = 1).

    With ``splice_probability`` p a step has ONE splice, drawn uniformly from the K = S-1, with probability
    p · m(t) / m(0), and otherwise none. Its weight is K · m(0) / p, so that the expectation is the joint sum.
    ``weights_sum_to_one`` divides by the (expected) sum of weights 1 + K m(t) instead of n: equal to n at m = 1, and
    the loss of the student alone where m has fallen to 0.

    CE(student) is distilled by the teacher's logits where ``kd_weight`` says so.

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
        splice_probability: float | None = None,
        weights_sum_to_one: bool = False,
        feature_weight: float = 1.0,
        feature_reduction: Literal["mean", "sum"] = "mean",
        teacher_bn: TeacherBN = "eval",
        **options,
    ):
        super().__init__(student, teacher, **options)
        _check_spliceable(student, teacher)
        self.splice_weight, self.splice_weight_end, self.splice_window = splice_weight, splice_weight_end, splice_window
        self.splice_probability, self.weights_sum_to_one = splice_probability, weights_sum_to_one
        self.feature_weight, self.feature_reduction = feature_weight, feature_reduction
        self.splices = tuple(range(1, student.stages)) if splice_weight > 0 else ()
        branches = 1 + len(self.splices)
        channels = teacher.fc.in_features
        self.connectors = nn.ModuleList(_connector(channels) for _ in range(branches if feature_weight > 0 else 0))
        self.connectors.to(teacher.fc.weight.device)
        # In a list: the view aliases the teacher's tensors and must not appear in the state_dict a second time.
        self._view = [frozen_view(teacher, teacher_bn)]

    def splice_decay(self, progress: Tensor) -> Tensor:
        """m(t)."""
        return cosine_decay(progress, self.splice_weight, self.splice_weight_end, self.splice_window)

    def outcomes(self, progress: float) -> list[tuple[float, dict]]:
        """All splices in every step, or one of them or none; none where they weigh nothing; distilled or not."""
        own = super().outcomes(progress)
        return [(p * share, splices | kind) for p, splices in self._splice_outcomes(progress) for share, kind in own]

    def _splice_outcomes(self, progress: float) -> list[tuple[float, dict]]:
        m = float(self.splice_decay(torch.tensor(progress, dtype=torch.float64)))
        if self.splice_probability is None or m == 0 or not self.splices:  # without a start, m may yet have an end
            return [(1.0, {"splices": self.splices if m else ()})]
        one = min(1.0, self.splice_probability * m / self.splice_weight)  # m may be an ulp above its start
        each = [(one / len(self.splices), {"splices": (k,)}) for k in self.splices]
        return [(1 - one, {"splices": ()}), *each] if one > 0 else [(1.0, {"splices": ()})]

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        progress: Tensor,
        splices: tuple[int, ...] | None = None,
        distils: bool = True,
    ) -> dict:
        features = self.student.features(images)
        logits = self.student.head(features[-1])
        clean = self._teacher(images, labels, distils)
        loss, terms = self._own_loss(logits, features[-1], labels, clean)
        weight, whole = self._splice_weights(progress)
        for k in self.splices if splices is None else splices:
            spliced, more = self._splice_loss(k, features[k - 1], labels, clean)
            loss, terms = loss + weight * spliced, terms | more
        loss = loss / whole
        if clean.get("ce") is not None:  # disjoint parameters: adding it changes no gradient of the student
            loss = loss + clean["ce"]
            terms["teacher_ce"] = clean["ce"].detach()
        return {"loss": loss, "output": logits, "terms": terms}

    def _splice_weights(self, progress: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The weight of a splice in a step that has it, and the sum that all weights are divided by."""
        m, count = self.splice_decay(progress), len(self.splices)
        drawn = self.splice_probability is not None
        weight = count * self.splice_weight / self.splice_probability if drawn else m
        return weight, 1 + count * (m if self.weights_sum_to_one else 1)

    def _own_loss(self, logits: Tensor, final: Tensor, labels: Tensor, clean: dict) -> tuple[Tensor, dict]:
        """The loss of the student alone, and its terms."""
        loss, terms = self.label_loss(logits, labels, clean.get("logits"))
        if self.feature_weight > 0:
            distance = self._distance(0, final, clean["final"])
            loss = loss + self.feature_weight * distance
            terms["feature"] = distance.detach()
        return loss, terms

    def _splice_loss(self, k: int, x: Tensor, labels: Tensor, clean: dict) -> tuple[Tensor, dict]:
        """The loss of the student's first k stages, of output ``x``, followed by the rest of the teacher."""
        final = self._through_teacher(k, x)
        loss = self.ce(self._view[0].head(final), labels)
        terms = {f"splice{k}_ce": loss.detach()}
        if self.feature_weight > 0:
            distance = self._distance(k, final, clean["final"])
            loss = loss + self.feature_weight * distance
            terms[f"splice{k}_feature"] = distance.detach()
        return loss, terms

    # Not compiled: with a learning teacher in BN evaluation mode, Inductor mixes up the running statistics that this
    # forward updates with those the splices read, and the student's gradient is wrong (4% seen with torch 2.14).
    @torch.compiler.disable
    def _teacher(self, images: Tensor, labels: Tensor, distils: bool = True) -> dict:
        """What is needed of the clean teacher: final pre-activation, logits to distil from; its loss if it learns."""
        distils = distils and self.kd_weight > 0
        if self.feature_weight == 0 and not distils and not self.train_teacher:
            return {}
        with torch.set_grad_enabled(self.train_teacher):
            final = self.teacher.features(images)[-1]
            logits = self.teacher.head(final) if self.train_teacher or distils else None
        ce = self.ce(logits, labels) if self.train_teacher else None
        return {"final": final.detach(), "logits": logits if distils else None, "ce": ce}

    def gradient_paths(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """CE(student) and Σ_k CE(splice_k) of one forward pass, and nothing else of the loss: for an audit."""
        features = self.student.features(images)
        finals = [self._through_teacher(k, features[k - 1]) for k in self.splices]
        spliced = sum(self.ce(self._view[0].head(final), labels) for final in finals)
        return self.ce(self.student.head(features[-1]), labels), spliced

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
