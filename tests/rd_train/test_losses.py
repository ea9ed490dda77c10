"""Loss terms against their definitions, written element by element."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rd_train.losses import logit_distillation, margin_relu_distance, negative_margin

values = st.floats(-4, 4, allow_nan=False, width=32)


@settings(max_examples=200, deadline=None)
@given(s=values, t=values, margin=st.floats(-3, -0.0078125, width=32))
def test_margin_relu_distance_by_cases(s, t, margin):
    # The four cases of the definition, as they stand in the design.
    if t > 0 or (margin < t and s > t):
        expected = (s - t) ** 2
    elif t <= margin and s > margin:
        expected = (s - margin) ** 2
    else:
        expected = 0.0
    actual = margin_relu_distance(*(torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (s, t, margin)))
    assert float(actual) == pytest.approx(expected, abs=1e-12)


def test_margin_relu_distance_sums_over_an_image_and_averages_over_the_batch():
    source, target = torch.ones(3, 2, 4, 5), torch.full((3, 2, 4, 5), 3.0)
    assert float(margin_relu_distance(source, target, torch.full((1, 2, 1, 1), -1.0))) == 4 * 2 * 4 * 5


def test_negative_margin_is_the_mean_of_the_negative_half():
    bn = nn.BatchNorm2d(5)
    bn.bias.data = torch.tensor([0.0, 0.5, -0.7, 1.0, 9.0])
    bn.weight.data = torch.tensor([1.0, -0.8, 0.5, 2.0, 1.0])
    draws = np.random.default_rng(0).standard_normal(2_000_000)
    margins = negative_margin(bn).flatten().tolist()
    for beta, gamma, margin in zip(bn.bias.tolist(), bn.weight.tolist(), margins, strict=True):
        x = beta + abs(gamma) * draws
        expected = x[x < 0].mean() if beta < 3 * abs(gamma) else -3 * abs(gamma)
        assert margin == pytest.approx(expected, rel=5e-3)
    assert all(margin < 0 for margin in margins)


def test_negative_margin_of_a_dead_channel_is_finite():
    bn = nn.BatchNorm2d(3)
    bn.weight.data.zero_()
    bn.bias.data = torch.tensor([0.0, 1.0, -1.0])
    assert torch.isfinite(negative_margin(bn)).all()


def test_logit_distillation_is_scaled_kl():
    rng = np.random.default_rng(1)
    student, teacher = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))

    def softmax(x):
        e = np.exp(x / 3.0)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = 9.0 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    actual = logit_distillation(torch.tensor(student), torch.tensor(teacher, requires_grad=True), 3.0)
    assert float(actual) == pytest.approx(expected, rel=1e-10)
    assert not actual.requires_grad  # nothing flows to the teacher


def test_gradient_of_logit_distillation_does_not_grow_with_temperature():
    # d/dz of T² KL tends to (z - v)/N for large T (Hinton et al. 2015, section 2).
    torch.manual_seed(0)
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64)
    logit_distillation(student, teacher, 1e4).backward()
    centred = [x - x.mean(1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 5 / 2, rtol=1e-2, atol=1e-5)
    assert math.isfinite(float(student.grad.sum()))
