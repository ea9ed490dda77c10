"""The compiled engine's memory plan against the analytic ledger, and against formulas written down here."""

import dataclasses
import math
from functools import cache

import pytest
from chains import ChainBuilder, basics, bottlenecks, images_for

from rd_deploy.chain import Chain, sources
from rd_deploy.export.native import to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import source_from_name
from rd_deploy.memory import ledger
from rd_deploy.native import Flag, Network, Plan, aligned_empty

ELEMENT = {"fp32": 4, "bf16": 2}
# ImageNet's networks with a quarter of the channels: multiples of 16, so that nothing is padded. One channel of images,
# so that they do not make the ledger's peak, which counts them: the engine does not.
QUARTER = 16 * 56 * 56  # elements of a map of the first stage at 224x224
NAMES = ("plain18", "resnet18", "plain50", "resnet50")


@cache
def quarter(name: str) -> Chain:
    chain = source_from_name(name, 32, classes=16, width=0.25, in_channels=1).chain
    return dataclasses.replace(chain, input_shape=(1, 224, 224))  # its random weights do for any size


def planned(chain: Chain, precision="fp32", batch=1, threads=1, flags=Flag.NONE) -> Plan:
    return Network.from_bytes(to_rdp(chain, precision)).plan(batch, threads, flags=flags)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ELEMENT)
@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_the_plan_is_the_ledgers_peak(name, precision, batch):
    """The strictest policy: the engine adds into the shortcut's buffer too."""
    counted = ledger(to_onnx(quarter(name)), batch, ELEMENT[precision], "in-place")
    info = planned(quarter(name), precision, batch, flags=Flag.UNFUSED | Flag.NO_WINOGRAD).info
    assert info.feature_map_bytes == counted.peak_bytes
    assert info.arena_bytes == info.feature_map_bytes + info.scratch_bytes  # nothing is lost to gaps


@pytest.mark.parametrize("flags", [Flag.NONE, Flag.UNFUSED])
@pytest.mark.parametrize("shortcuts", [False, True])
def test_channels_are_padded_to_16(shortcuts, flags):
    padded, whole = (
        planned(basics(widths, shortcuts=shortcuts), flags=flags | Flag.NO_WINOGRAD).info
        for widths in ((24, 40, 1), (32, 48, 16))
    )
    assert padded.feature_map_bytes == whole.feature_map_bytes
    assert padded.weight_bytes == whole.weight_bytes


def live_maps(chain: Chain, plan: Plan, precision: str) -> list[int]:
    """Bytes of maps that live at each fused step, from nothing but the steps' names and the chain.

    A tensor needs memory when a step reads it that is fused with another one than its maker, from its maker's step to
    its last reader's. Images and logits are the caller's. A sum takes the place of what is added, when no later step
    reads that and it is not what the step's convolutions read.
    """
    groups = [step.name.split("+") for step in plan.steps]
    place = {name: index for index, group in enumerate(groups) for name in group}
    shapes, logits = chain.shapes(), chain.steps[-1].name
    last = {name: place[step.name] for step in chain.steps for name in sources(step)}
    size = {
        name: math.prod(shapes[name][1:]) * -(-shapes[name][0] // 16) * 16 * ELEMENT[precision] * plan.info.batch
        for name in place
        if name != logits and last[name] > place[name]
    }
    live = [sum(size[name] for name in size if place[name] <= at <= last[name]) for at in range(len(groups))]
    for step in chain.steps:
        added, at = getattr(step, "add", None), place[step.name]
        first = next(other for other in chain.steps if other.name == groups[at][0])
        if added and step.name in size and last[added] == at and added != first.source:
            live[at] -= size[added]
    return live


FLAGS = [Flag.NONE, Flag.UNFUSED, Flag.NO_WINOGRAD, Flag.SMALL]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ELEMENT)
@pytest.mark.parametrize("name", NAMES)
def test_the_plans_figures_are_those_of_the_maps_between_its_steps(name, precision, batch, flags):
    plan = planned(quarter(name), precision, batch, threads=2, flags=flags)
    maps, live = live_maps(quarter(name), plan, precision), [step.live_bytes for step in plan.steps]
    assert all(total >= size for total, size in zip(live, maps, strict=True))  # the rest is scratch
    peak = live.index(max(live))
    info = plan.info
    assert (info.feature_map_bytes, info.scratch_bytes) == (maps[peak], live[peak] - maps[peak])
    assert info.arena_bytes == info.feature_map_bytes + info.scratch_bytes + info.alignment_bytes


# What a fused chain keeps at most, in units of a first stage's map: between two fused steps there are only narrow maps,
# and the step that enters a stage runs row by row with the one before it. Depth 18: the stem's map, 4 of these,
# never exists, and a shortcut's sum goes into its buffer. resnet50 has its shortcut, 4 of these, beside 1 and 2.
FUSED = {"plain18": 2, "resnet18": 2, "plain50": 2, "resnet50": 7}


@pytest.mark.parametrize("precision", ELEMENT)
@pytest.mark.parametrize("name", NAMES)
def test_fused_only_narrow_maps_exist(name, precision):
    maps = live_maps(quarter(name), planned(quarter(name), precision), precision)
    assert max(maps) == FUSED[name] * QUARTER * ELEMENT[precision]


def test_scratch_grows_with_the_threads_and_maps_do_not():
    one, two = (planned(quarter("plain50"), batch=8, threads=threads).info for threads in (1, 2))
    assert two.feature_map_bytes == one.feature_map_bytes
    assert one.scratch_bytes < two.scratch_bytes <= 2 * one.scratch_bytes


def test_a_run_writes_no_byte_beyond_its_arena():
    chain = bottlenecks(shortcuts=True)
    for flags in (Flag.NONE, Flag.UNFUSED):
        plan = Network.from_bytes(to_rdp(chain)).plan(2, 2, flags=flags)
        size = plan.info.arena_bytes
        memory = aligned_empty(size + 8192)
        memory[:] = 0xA5
        plan.context(memory[4096 // 64 * 64 : 4096 + size]).run(images_for(chain, 2))
        assert (memory[:4096] == 0xA5).all()
        assert (memory[4096 + size :] == 0xA5).all()


def test_wide_rows_of_many_channels_are_counted_whole():
    """16 rows of 4096 pixels of 65,536 channels: 2^32 elements, which 32 bits would count as none."""
    builder = ChainBuilder(1)
    builder.conv(65536, kernel=1)
    builder.pool(kernel=16, stride=16)
    info = planned(builder.finish(7, 4096, 1), "bf16").info
    assert info.scratch_bytes > 2 * 2**32
