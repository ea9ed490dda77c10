"""Verdicts and gates."""

import pytest

from rd_deploy.bench.claims import at_least, not_measured, parse_requirements, share_claim, unmet
from rd_deploy.common import UserError


@pytest.mark.parametrize(
    ("value", "low", "high", "holds", "text"),
    [
        (1.5, 1.42, 1.58, True, "holds (1.50x, 95% interval 1.42 to 1.58)"),
        (1.10, 1.08, 1.12, False, "does not hold here (1.10x, 95% interval 1.08 to 1.12)"),
        (1.01, 0.99, 1.03, False, "does not hold here: no difference (1.01x, 95% interval 0.99 to 1.03)"),
        (0.9, 0.36, 1.39, False, "does not hold here: no difference shown (0.90x, 95% interval 0.36 to 1.39)"),
        (1.42, 1.35, 1.50, None, "not decided (1.42x, the 95% interval 1.35 to 1.50 includes 1.4)"),
        (1.4, 1.4, 1.4, True, "holds (1.40x)"),
        (1.0, 1.0, 1.0, False, "does not hold here: no difference (1.00x)"),
        (0.8, 0.8, 0.8, False, "does not hold here (0.80x)"),
    ],
)
def test_at_least(value, low, high, holds, text):
    claim = at_least("speed/torch/fp32/batch-1", 1.4, value, low, high)
    assert claim.holds is holds
    assert claim.text == text


@pytest.mark.parametrize(("share", "holds"), [(0.40, True), (0.35, True), (0.45, True), (0.34, False), (0.0, False)])
def test_share_means_about_forty_percent(share, holds):
    assert share_claim("share/separate", share).holds is holds


def test_requirements_are_parsed():
    assert parse_requirements(["speed=1.4", "memory=1.25"]) == {"speed": 1.4, "memory": 1.25}
    assert parse_requirements([]) == {}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["speed"], "write NAME=NUMBER"),
        (["sped=1.4"], "did you mean 'speed'"),
        (["speed=fast"], "not a number"),
        (["speed=nan"], "not a number"),
        (["speed=inf"], "not a number"),
        (["speed=-1"], "not a number"),
        (["speed=1.4", "speed=1.5"], "given twice"),
    ],
)
def test_malformed_requirements(texts, said):
    with pytest.raises(UserError, match=said):
        parse_requirements(texts)


def test_the_speed_gate_wants_every_best_ratio_at_its_lower_end():
    good = at_least("speed/best/fp32/batch-1", 1.4, 1.6, 1.5, 1.7).to_dict()
    unsure = at_least("speed/best/fp32/batch-8", 1.4, 1.45, 1.35, 1.55).to_dict()
    one_engine = at_least("speed/torch/fp32/batch-1", 1.4, 1.0, 0.9, 1.1).to_dict()
    assert unmet({"speed": 1.4}, [good, one_engine]) == []
    assert unmet({"speed": 1.4}, [good, unsure]) == [
        "speed=1.4 is not met: speed/best/fp32/batch-8 is 1.45x (95% interval 1.35 to 1.55)"
    ]
    assert unmet({"speed": 1.3}, [good, unsure]) == []  # the gate's own number counts, not the claim's


def test_the_memory_gate_is_the_strict_policy():
    separate = at_least("memory/separate", 1.25, 1.5, 1.5, 1.5).to_dict()
    in_place = at_least("memory/in-place", 1.25, 1.08, 1.08, 1.08).to_dict()
    assert unmet({"memory": 1.25}, [separate, in_place]) == ["memory=1.25 is not met: memory/in-place is 1.08x"]


def test_what_was_not_measured_does_not_pass():
    claim = not_measured("speed/best/bf16/batch-1", 1.4, "no engine could").to_dict()
    assert claim["holds"] is None
    assert unmet({"speed": 1.4}, [claim]) == [
        "speed=1.4 is not met: speed/best/bf16/batch-1 not measured: no engine could"
    ]
    assert unmet({"speed": 1.4}, []) == ["speed=1.4 is not met: nothing was measured"]
