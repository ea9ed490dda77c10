"""Verdicts on memory: every account of either network has one, and what is missing says why."""

import pytest

from rd_deploy.bench.feature_maps import figure_row, judge_memory
from rd_deploy.engines import Figure

TENSORS, ALLOCATOR = Figure("torch tensors", 400, "counted"), Figure("torch allocator", 600, "profiled")
FAILED = Figure("torch", None, "its account failed: no kineto_results")


def judged(ours: list[Figure], theirs: list[Figure]) -> dict[str, str]:
    """Claims' names, without their setting, to their texts."""
    sides = (("plain", ours), ("resnet", theirs))
    rows = [figure_row(name, "fp32", 2, "torch", 8, figure) for name, figures in sides for figure in figures]
    claims = judge_memory("plain", "resnet", rows)
    assert len({claim.name for claim in claims}) == len(claims)
    return {claim.name.removesuffix("/fp32/batch-2"): claim.text for claim in claims}


def test_each_account_has_its_own_verdict():
    assert judged([TENSORS, ALLOCATOR], [TENSORS, Figure("torch allocator", 900, "profiled")]) == {
        "memory/torch-tensors": "does not hold here: no difference (1.00x): counted",
        "memory/torch-allocator": "holds (1.50x): profiled",
    }


@pytest.mark.parametrize("side", ["plain", "resnet"])
def test_an_account_that_fails_for_one_network_is_a_verdict_that_says_why(side):
    whole, failed = [TENSORS, ALLOCATOR], [FAILED]
    found = judged(failed, whole) if side == "plain" else judged(whole, failed)
    reason = f"not measured: {side}: its account failed: no kineto_results"
    assert found == {"memory/torch-tensors": reason, "memory/torch-allocator": reason}


def test_an_account_that_fails_for_both_is_one_verdict():
    assert judged([FAILED], [FAILED]) == {"memory/torch": "not measured: plain: its account failed: no kineto_results"}


def test_an_account_that_only_one_network_has_takes_the_others_reason():
    nothing = Figure("torch tensors", None, "no statistics")
    assert judged([TENSORS, ALLOCATOR], [nothing]) == dict.fromkeys(
        ("memory/torch-tensors", "memory/torch-allocator"), "not measured: resnet: no statistics"
    )
