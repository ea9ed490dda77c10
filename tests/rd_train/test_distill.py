"""Residual distillation against an independent NumPy computation, and where its gradients go."""

import numpy as np
import pytest
import torch
from torch import nn

from rd_deploy.common import UserError
from rd_train.distill import CrossEntropy, LogitDistillation, ResidualDistillation, frozen_view
from rd_train.networks import Network, parse_arch

PROGRESS = torch.tensor(0.3, dtype=torch.float64)


def tiny(name: str, seed: int) -> Network:
    """A float64 network of 1, 2 and 4 channels with lively BN statistics."""
    torch.manual_seed(seed)
    network = Network(parse_arch(name, width=1 / 16, in_channels=1, classes=3)).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


class NumpyNetwork:
    """The same mathematics without torch: weights by name, batch statistics or running ones."""

    def __init__(self, network: Network, batch_statistics: bool):
        self.values = {name: value.numpy() for name, value in network.state_dict().items()}
        self.blocks, self.batch_statistics = network.arch.blocks, batch_statistics

    def conv(self, x, name, stride=1):
        weight = self.values[name + ".weight"]
        kernel = weight.shape[2]
        padded = np.pad(x, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
        height, width = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
        out = np.zeros((x.shape[0], weight.shape[0], height, width))
        for i in range(kernel):
            for j in range(kernel):
                window = padded[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
                out += np.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
        return out

    def bn(self, x, name):
        mean, var = self.values[name + ".running_mean"], self.values[name + ".running_var"]
        if self.batch_statistics:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        gamma, beta = self.values[name + ".weight"], self.values[name + ".bias"]
        shape = (1, -1, 1, 1)
        return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5) * gamma.reshape(shape) + beta.reshape(
            shape
        )

    def stage(self, index, x):
        for number in range(self.blocks[index]):
            name, stride = f"layer{index + 1}.{number}", 2 if index > 0 and number == 0 else 1
            x = np.maximum(x, 0)
            out = self.bn(self.conv(x, f"{name}.conv1", stride), f"{name}.bn1")
            out = self.bn(self.conv(np.maximum(out, 0), f"{name}.conv2"), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in self.values:
                out = out + self.bn(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            elif self.shortcuts:
                out = out + x
            x = out
        return x

    @property
    def shortcuts(self):
        return any("downsample" in name for name in self.values)

    def features(self, x):
        x, outputs = self.bn(self.conv(x, "conv1"), "bn1"), []
        for index in range(len(self.blocks)):
            x = self.stage(index, x)
            outputs.append(x)
        return outputs

    def head(self, x):
        return np.maximum(x, 0).mean((2, 3)) @ self.values["fc.weight"].T + self.values["fc.bias"]


def numpy_ce(logits, labels, smoothing):
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    picked = log_p[np.arange(len(labels)), labels]
    return -((1 - smoothing) * picked + smoothing * log_p.mean(1)).mean()


def numpy_distance(source, target, margin, connector):
    """Definition of the margin-ReLU distance, case by case, mean-reduced, after the 1x1 connector and its BN."""
    weight, bn = connector[0].weight.detach().numpy()[:, :, 0, 0], connector[1]
    s = np.einsum("nchw,oc->nohw", source, weight)
    s = (s - s.mean((0, 2, 3), keepdims=True)) / np.sqrt(s.var((0, 2, 3), keepdims=True) + bn.eps)
    m = margin.reshape(1, -1, 1, 1) * np.ones_like(s)
    first = (s > m) & (target <= m)
    rest = ((s > target) & (m < target) & (target <= 0)) | (target > 0)
    return (np.where(first, (s - m) ** 2, 0) + np.where(rest & ~first, (s - target) ** 2, 0)).sum() / target.size


def numpy_margin(beta, gamma):
    from scipy.stats import norm

    s = np.abs(gamma)
    trusted = norm.cdf(-beta / s) > 0.001
    return np.where(trusted, beta - s * norm.pdf(beta / s) / norm.cdf(-beta / s), -3 * s)


@pytest.mark.parametrize("teacher_bn", ["eval", "batch"])
@pytest.mark.parametrize("train_teacher", [False, True])
def test_loss_equals_numpy(teacher_bn, train_teacher):
    student, teacher = tiny("plain20", 1), tiny("resnet20", 2)
    task = ResidualDistillation(
        student,
        teacher,
        splice_weight=1.0,
        splice_weight_end=0.2,
        splice_window=0.6,
        feature_weight=0.7,
        teacher_bn=teacher_bn,
        train_teacher=train_teacher,
        label_smoothing=0.1,
    ).double()
    images, labels = batch()
    plain = NumpyNetwork(student, batch_statistics=True)
    clean = NumpyNetwork(teacher, batch_statistics=train_teacher)
    result = task.train()(images, labels, PROGRESS)
    # After the forward: the splices see a learning teacher's running statistics with this batch in them.
    splice = NumpyNetwork(teacher, batch_statistics=teacher_bn == "batch")

    x, y = images.numpy(), labels.numpy()
    features, target = plain.features(x), clean.features(x)[-1]
    margin = numpy_margin(clean.values["layer3.2.bn2.bias"], clean.values["layer3.2.bn2.weight"])
    m = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 0.3 / 0.6))
    finals = [features[2], splice.stage(2, splice.stage(1, features[0])), splice.stage(2, features[1])]
    heads = [plain.head, splice.head, splice.head]
    ces = [numpy_ce(head(final), y, 0.1) for head, final in zip(heads, finals, strict=True)]
    distances = [
        numpy_distance(final, target, margin, connector)
        for final, connector in zip(finals, task.connectors, strict=True)
    ]
    expected = (ces[0] + m * (ces[1] + ces[2]) + 0.7 * (distances[0] + m * (distances[1] + distances[2]))) / 3
    if train_teacher:
        expected += numpy_ce(clean.head(target), y, 0.1)
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-9)
    assert float(result["terms"]["splice1_ce"]) == pytest.approx(ces[1], rel=1e-9)
    np.testing.assert_allclose(result["output"].detach().numpy(), plain.head(features[2]), rtol=1e-9)


class Rerouted(Network):
    """A student whose stage-1 output can be detached on its way to stage 2 or to the teacher."""

    cut = None

    def features(self, x):
        first = self.stage(0, self.stem(x))
        x, outputs = (first.detach() if self.cut == "plain" else first), []
        for index in range(1, self.stages):
            x = self.stage(index, x)
            outputs.append(x)
        return [first.detach() if self.cut == "teacher" else first, *outputs]


def stage1_gradient(cut: str | None) -> torch.Tensor:
    student, teacher = tiny("plain20", 1), tiny("resnet20", 2)
    student.__class__ = Rerouted
    student.cut = cut
    task = ResidualDistillation(student, teacher, feature_weight=0.0)
    images, labels = batch()
    task.train()(images, labels, PROGRESS)["loss"].backward()
    return student.layer1[0].conv1.weight.grad


def test_stage_1_learns_through_both_paths_and_each_is_exactly_its_part():
    whole, plain_only, teacher_only = (stage1_gradient(cut) for cut in (None, "teacher", "plain"))
    assert teacher_only.norm() > 1e-3 * whole.norm()
    assert plain_only.norm() > 1e-3 * whole.norm()
    torch.testing.assert_close(plain_only + teacher_only, whole, rtol=1e-9, atol=1e-12)


def test_without_splices_and_features_it_is_cross_entropy():
    images, labels = batch()
    gradients = []
    for make in (
        lambda s: ResidualDistillation(s, tiny("resnet20", 2), splice_weight=0, splice_weight_end=0, feature_weight=0),
        CrossEntropy,
    ):
        student = tiny("plain20", 1)
        loss = make(student).train()(images, labels, PROGRESS)["loss"]
        loss.backward()
        gradients.append((loss.detach(), [parameter.grad for parameter in student.parameters()]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert all(torch.equal(a, b) for a, b in zip(gradients[0][1], gradients[1][1], strict=True))


def test_a_splice_weight_of_0_leaves_the_splices_out_whatever_its_end():
    options = {"splice_weight": 0.0, "splice_weight_end": 0.5, "feature_weight": 0.0, "weights_sum_to_one": True}
    images, labels = batch()
    ordinary = CrossEntropy(tiny("plain20", 1)).train()
    ordinary(images, labels, PROGRESS)["loss"].backward()
    for probability in (1.0, None):
        task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), splice_probability=probability, **options)
        assert task.kinds() == [{"splices": ()}]
        for mine, other in zip(gradients_of(task, {}), ordinary.student.parameters(), strict=True):
            torch.testing.assert_close(mine, other.grad)


@pytest.mark.parametrize("teacher_bn", ["eval", "batch"])
def test_a_frozen_teacher_gets_no_gradient_and_keeps_its_statistics(teacher_bn):
    student, teacher = tiny("plain20", 1), tiny("resnet20", 2)
    task = ResidualDistillation(student, teacher, teacher_bn=teacher_bn).double().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images, labels = batch()
    task(images, labels, PROGRESS)["loss"].backward()
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in task._view[0].parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_learning_teacher_learns_by_its_own_loss_only():
    images, labels = batch()
    student, teacher, alone = tiny("plain20", 1), tiny("resnet20", 2), tiny("resnet20", 2)
    ResidualDistillation(student, teacher, train_teacher=True).double().train()(images, labels, PROGRESS)[
        "loss"
    ].backward()
    CrossEntropy(alone).train()(images, labels, PROGRESS)["loss"].backward()
    for mine, other in zip(teacher.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_the_view_follows_a_learning_teacher():
    teacher = tiny("resnet20", 2)
    view = frozen_view(teacher, "eval")
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    images, labels = batch()
    CrossEntropy(teacher).train()(images, labels, PROGRESS)["loss"].backward()
    optimizer.step()
    teacher.eval()
    assert torch.equal(view(images), teacher(images))
    teacher.load_state_dict(tiny("resnet20", 5).state_dict())
    assert torch.equal(view(images), teacher(images))


def test_no_part_of_the_teacher_is_saved_twice():
    task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2))
    assert {name.split(".")[0] for name in task.state_dict()} == {"student", "teacher", "connectors"}


def test_kd_mixes_its_terms_and_leaves_the_teacher_alone():
    student, teacher = tiny("plain20", 1), tiny("resnet20", 2)
    result = LogitDistillation(student, teacher, kd_weight=0.3, kd_temperature=2.0).train()(*batch(), PROGRESS)
    terms = result["terms"]
    assert float(result["loss"].detach()) == pytest.approx(0.7 * float(terms["ce"]) + 0.3 * float(terms["kd"]))
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teachers_that_do_not_fit_are_refused():
    student = tiny("plain20", 1)
    with pytest.raises(UserError, match="same family and width"):
        ResidualDistillation(student, Network(parse_arch("resnet20", width=1 / 8, in_channels=1, classes=3)))
    with pytest.raises(UserError, match="must agree"):
        LogitDistillation(student, Network(parse_arch("resnet20", classes=3)), kd_weight=0.5, kd_temperature=1.0)
    deeper = Network(parse_arch("resnet56", width=1 / 16, in_channels=1, classes=3))
    ResidualDistillation(student, deeper)  # a better teacher of the same shape is welcome


def gradients_of(task, outcome: dict, progress=PROGRESS) -> list[torch.Tensor]:
    images, labels = batch()
    task.zero_grad()
    task.train()(images, labels, progress, **outcome)["loss"].backward()
    return [parameter.grad.clone() for parameter in task.student.parameters()]


def expected_gradients(task, progress: float) -> list[torch.Tensor]:
    """The mean over every kind of step, each counted by its probability."""
    outcomes = task.outcomes(progress)
    assert sum(probability for probability, _ in outcomes) == pytest.approx(1)
    parts = [
        [p * gradient for gradient in gradients_of(task, outcome, torch.tensor(progress, dtype=torch.float64))]
        for p, outcome in outcomes
    ]
    return [sum(values) for values in zip(*parts, strict=True)]


@pytest.mark.parametrize(("probability", "progress"), [(1.0, 0.0), (0.5, 0.0), (0.7, 0.2), (None, 0.2)])
def test_one_random_splice_has_the_expected_gradient_of_the_joint_loss(probability, progress):
    options = {"splice_weight": 1.0, "splice_weight_end": 0.0, "feature_weight": 0.0}
    ours = ResidualDistillation(
        tiny("plain20", 1), tiny("resnet20", 2), splice_probability=probability, weights_sum_to_one=True, **options
    )
    joint = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), **options)
    m = 0.5 * (1 + np.cos(np.pi * progress / 0.5))
    scale = 3 / (1 + 2 * m)  # the joint loss is divided by n = 3, ours by the sum of the weights; the same at m = 1
    whole = gradients_of(joint, {}, torch.tensor(progress, dtype=torch.float64))
    for mine, other in zip(expected_gradients(ours, progress), whole, strict=True):
        torch.testing.assert_close(mine, scale * other, rtol=1e-9, atol=1e-12)


def test_splices_become_rarer_and_end():
    options = {"splice_weight_end": 0.0, "feature_weight": 0.0, "weights_sum_to_one": True}
    task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), splice_probability=0.6, **options)

    def share(progress):
        return 1 - sum(p for p, outcome in task.outcomes(progress) if not outcome["splices"])

    assert [share(0.0), share(0.25), share(0.5), share(0.9)] == pytest.approx([0.6, 0.3, 0.0, 0.0])
    joint = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), **options)
    assert [joint.outcomes(moment)[0][1]["splices"] for moment in (0.49, 0.5, 0.9)] == [(1, 2), (), ()]
    alone = gradients_of(task, {"splices": ()}, torch.tensor(0.9, dtype=torch.float64))
    images, labels = batch()
    ordinary = CrossEntropy(tiny("plain20", 1)).train()
    ordinary(images, labels, PROGRESS)["loss"].backward()
    for mine, other in zip(alone, ordinary.student.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad)


def test_the_clean_teacher_runs_only_when_it_is_needed():
    for kd_weight, runs in ((0.0, 0), (0.5, 1)):
        task = ResidualDistillation(
            tiny("plain20", 1), tiny("resnet20", 2), splice_probability=1.0, kd_weight=kd_weight, feature_weight=0.0
        )
        calls = []
        task.teacher.conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients_of(task, {"splices": (1,)})
        assert len(calls) == runs


def test_logit_distillation_joins_the_students_own_loss():
    options = {"splice_weight": 0.0, "splice_weight_end": 0.0, "feature_weight": 0.0, "kd_weight": 0.3}
    ours = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), kd_temperature=2.0, **options)
    kd = LogitDistillation(tiny("plain20", 1), tiny("resnet20", 2), kd_weight=0.3, kd_temperature=2.0)
    for mine, other in zip(gradients_of(ours, {}), gradients_of(kd, {}), strict=True):
        torch.testing.assert_close(mine, other)


def test_probabilities_of_one_class_are_that_class():
    images, labels = batch()
    task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), feature_weight=0.0, kd_weight=0.5).train()
    losses = [
        float(task(images, targets, PROGRESS)["loss"].detach())
        for targets in (labels, nn.functional.one_hot(labels, 3).double())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("method", ["kd", "rd"])
def test_logit_distillation_begins_at_its_start_and_is_drawn_by_its_probability(method):
    options = {"kd_weight": 0.5, "kd_start": 0.4, "kd_probability": 0.3}
    if method == "kd":
        task = LogitDistillation(tiny("plain20", 1), tiny("resnet20", 2), **options)
    else:
        own = {"splice_probability": 0.6, "splice_weight_end": 0.0, "feature_weight": 0.0}
        task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), **own, **options)

    def share(progress):
        return sum(p for p, outcome in task.outcomes(progress) if outcome["distils"])

    assert [share(0.0), share(0.39), share(0.4), share(1.0)] == pytest.approx([0.0, 0.0, 0.3, 0.3])
    assert sum(p for p, _ in task.outcomes(0.45)) == pytest.approx(1)
    assert len(task.kinds()) == (2 if method == "kd" else 6)  # none or either of two splices, distilled or not
    calls = []
    task.teacher.conv1.register_forward_hook(lambda *_: calls.append(1))
    without = gradients_of(task, task.kinds()[0])
    assert not calls
    ordinary = CrossEntropy(tiny("plain20", 1))
    if method == "kd":
        for mine, other in zip(without, gradients_of(ordinary, {}), strict=True):
            torch.testing.assert_close(mine, other)
    assert not task.kinds()[0]["distils"]
    gradients_of(task, {"distils": True})
    assert len(calls) == 1


def test_probabilities_are_probabilities_for_all_weights():
    task = ResidualDistillation(tiny("plain20", 1), tiny("resnet20", 2), splice_probability=1.0, feature_weight=0.0)
    for start, end in ((0.9, 0.3), (0.3, 0.03), (1.8, 0.6)):  # where the cosine begins an ulp above its start
        task.splice_weight, task.splice_weight_end = start, end
        assert all(probability >= 0 for probability, _ in task.outcomes(0.0))
