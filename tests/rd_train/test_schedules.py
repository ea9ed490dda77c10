"""Schedules against values that can be worked out by hand."""

import pytest
import torch

from rd_train.schedules import cosine_decay, learning_rate


def rate(step, **changes):
    options = {"peak": 0.4, "kind": "cosine", "warmup": 10, "milestones": (0.5, 0.75), "gamma": 0.1}
    return learning_rate(step, 110, **(options | changes))


def test_warmup_is_linear_and_reaches_the_peak():
    assert rate(0) == pytest.approx(0.04)
    assert rate(9) == pytest.approx(0.4)
    assert rate(10) == pytest.approx(0.4)


def test_cosine_halves_in_the_middle_and_ends_near_zero():
    assert rate(60) == pytest.approx(0.2)
    assert 0 < rate(109) < 1e-3


def test_step_schedule_drops_at_its_milestones():
    assert [rate(step, kind="step") for step in (54, 55, 82, 83)] == pytest.approx([0.4, 0.04, 0.04, 0.004])


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.9, 0.5), (1.0, 0.5)])
def test_splice_weight_falls_over_its_window_and_stays(progress, expected):
    assert float(cosine_decay(torch.tensor(progress), 1.0, 0.5, 0.5)) == pytest.approx(expected, abs=1e-6)
