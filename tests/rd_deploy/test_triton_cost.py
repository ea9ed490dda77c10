"""The model of a launch's time: its terms, worked out by hand."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import CARDS, get_card
from rd_deploy.triton_kernels.cost import BlockCost, best, dram_bytes, per_sm, predict
from rd_deploy.triton_kernels.launch import Work

H100 = replace(get_card("h100"), launch_us=1.0)
WORK = Work(
    flops=10**9,
    issued_flops=2 * 10**9,
    map_bytes=10**6,
    weight_bytes=0,
    l2_bytes=0,
    blocks=132,
    warps=8,
    shared_bytes=100_000,
    registers=128,
)
IDLE = BlockCost(fill=0.0)


def longest(work: Work, block: BlockCost) -> float:
    """Microseconds of the longest term when it is the only one."""
    return predict(work, block, H100).us - H100.launch_us


def test_arithmetic_counts_what_a_block_multiplies():
    flops = 1e9
    alone = flops / (798e12 / 132 * cost.MATRIX_SHARE) * 1e6
    # What a block multiplies is both the arithmetic and, all by itself, the latency of the only round.
    assert longest(WORK, replace(IDLE, flops=flops)) == pytest.approx(alone * (1 + cost.EXPOSED))
    slower = longest(WORK, replace(IDLE, flops=flops, asynchronous=False))
    assert slower == pytest.approx(alone * (1 + cost.EXPOSED) / cost.MMA_SHARE[9])


def test_the_fullest_multiprocessor_decides():
    block = replace(IDLE, flops=1e9)
    times = [longest(replace(WORK, blocks=blocks), block) for blocks in (1, 132, 133, 264)]
    assert times[0] == pytest.approx(times[1])
    assert times[2] == times[3]
    assert 1.8 < times[2] / times[1] <= 2


def test_one_multiprocessor_cannot_have_all_of_the_l2_cache():
    few = replace(WORK, l2_bytes=10**6, blocks=10)
    assert longest(few, IDLE) == pytest.approx(10**5 / cost.SM_L2_BYTES * 1e6 * (1 + cost.EXPOSED))
    many = replace(WORK, l2_bytes=10**8)
    assert longest(many, IDLE) == pytest.approx(10**8 / 5500e9 * 1e6 * (1 + cost.EXPOSED))


def test_shared_memory():
    block = replace(IDLE, shared_traffic=2e6)
    assert longest(WORK, block) == pytest.approx(2e6 / cost.SM_SHARED_BYTES * 1e6 * (1 + cost.EXPOSED))
    assert predict(WORK, block, H100).limit == "shared memory"


def test_waits_are_hidden_by_blocks_side_by_side_only():
    block = BlockCost(waits=5e-6, fill=1e-6)
    assert longest(WORK, block) == pytest.approx(6.0)
    assert longest(replace(WORK, blocks=264), block) == pytest.approx(6.0)  # two at a time
    assert longest(replace(WORK, blocks=265), block) == pytest.approx(12.0)
    assert predict(WORK, block, H100).limit == "latency"
    assert longest(WORK, replace(block, alone=3e-6)) == pytest.approx(9.0)


def test_maps_come_from_dram_only_when_the_cache_cannot_have_kept_them():
    assert dram_bytes(WORK, H100) == 0
    large = replace(WORK, map_bytes=10**8, weight_bytes=10**5)
    assert dram_bytes(large, H100) == 10**8 + 10**5
    prediction = predict(large, IDLE, H100)
    assert prediction.limit == "DRAM"
    assert prediction.us == pytest.approx(1 + (10**8 + 10**5) / (3000e9 * cost.DRAM_SHARE) * 1e6)


def test_a_launch_with_nothing_to_do_takes_its_launch():
    prediction = predict(WORK, IDLE, H100)
    assert prediction.limit == "launch"
    assert prediction.us == H100.launch_us


def test_blocks_on_one_multiprocessor():
    assert per_sm(WORK, H100) == 2  # by shared memory, 228 KiB; registers allow 2 too
    assert per_sm(replace(WORK, shared_bytes=0), H100) == 2  # 65536 / (128 * 256)
    assert per_sm(replace(WORK, shared_bytes=0, registers=32), H100) == 8  # by registers and by warps, 64 / 8
    assert per_sm(replace(WORK, shared_bytes=227 << 10, registers=255), H100) == 1
    assert predict(WORK, IDLE, H100).waves == pytest.approx(0.5)


def test_what_is_worth_timing():
    times = {"a1": 1.0, "a2": 1.1, "a3": 1.2, "b1": 1.3, "c1": 2.1}
    assert best(times, alike=lambda name: name[0]) == ("a1", "a2", "b1")  # two a, and c is twice as slow
    assert best(times, alike=lambda name: name[0], same=lambda name: name[1] == "1") == ("a1", "a2")
    many = {str(number): 1 + number / 100 for number in range(20)}
    assert best(many, alike=lambda name: name) == tuple(str(number) for number in range(cost.KEPT))
    assert best({}, alike=len) == ()


def test_cards_are_consistent():
    for name, card in CARDS.items():
        assert card.name == name
        assert card.shared_bytes < card.shared_sm_bytes
        assert card.dram_gb_s < card.l2_gb_s
