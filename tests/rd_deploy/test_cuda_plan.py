"""Plans of the cuda engine: what is fused, what memory it takes, and who decides."""

import functools
from itertools import combinations

import pytest

pytest.importorskip("triton")

from chains import ChainBuilder, basics, bottlenecks

from rd_deploy.chain import INPUT, sources
from rd_deploy.common import UserError
from rd_deploy.cuda.plan import build_plan, places
from rd_deploy.export.source import chain_from_name
from rd_deploy.triton_kernels.cards import get_card

H100 = get_card("h100")


@pytest.fixture(scope="module")
def plain50():
    return chain_from_name("plain50")


@pytest.fixture(scope="module")
def resnet50():
    return chain_from_name("resnet50")


def kinds(plan) -> list[str]:
    return [step.kernel for step in plan.steps]


def test_everything_that_can_be_fused_is(plain50):
    plan = build_plan(plain50, 32, H100, "always")
    assert kinds(plan)[:4] == ["Stem", "Bottleneck", "Bottleneck", "Bottleneck"]
    # 3 + 4 + 6 blocks of 64, 128, 256 channels; of 512 channels the kernel has none: [3x3] and [expand, reduce]
    assert kinds(plan).count("Bottleneck") == 13
    assert kinds(plan)[-7:] == ["Conv", "ExpandReduce", "Conv", "ExpandReduce", "Conv", "ExpandPool", "Conv"]
    assert len(plan.steps) == 21


def test_nothing_is_fused_on_demand(plain50, resnet50):
    for chain in (plain50, resnet50):
        plan = build_plan(chain, 1, H100, "never")
        assert [step.name for step in plan.steps] == [step.name for step in chain.steps]


def test_a_shortcut_leaves_nothing_to_fuse_but_the_stem(resnet50):
    plan = build_plan(resnet50, 1, H100, "always")
    assert set(kinds(plan)) == {"Stem", "Conv", "AveragePool"}
    assert len(plan.steps) == len(resnet50.steps) - 1


@pytest.mark.parametrize("fusion", ["auto", "always", "never"])
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_every_step_of_the_chain_runs_once_and_in_order(plain50, fusion, batch):
    plan = build_plan(plain50, batch, H100, fusion)
    assert [step for launch in plan.steps for step in launch.piece.steps] == list(plain50.steps)


@pytest.mark.parametrize("batch", [1, 32])
def test_feature_maps_are_those_of_the_analysis(plain50, resnet50, batch):
    """Elements at 224x224: the chain's peak is the entry of stage 2, 56x56x64 and 56x56x128; the ResNet's is the entry
    of its stage 2 with the sums in place, the optimum of `rd_deploy.memory`."""
    assert build_plan(plain50, batch, H100, "always").feature_map_bytes == 2 * batch * 602_112
    assert build_plan(resnet50, batch, H100, "always").feature_map_bytes == 2 * batch * 1_304_576


@pytest.mark.parametrize("fusion", ["auto", "always", "never"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chain", [bottlenecks(), bottlenecks(shortcuts=True), basics(), basics(shortcuts=True)])
def test_no_tensor_is_overwritten_before_its_last_reader(chain, batch, fusion):
    plan = build_plan(chain, batch, H100, fusion)
    sizes = {
        name: 2 * batch * shape[0] * (shape[1] * shape[2] if len(shape) > 1 else 1)
        for name, shape in chain.shapes().items()
    }
    owner: dict[int, str] = {}  # byte to the tensor it holds; checked as the launches run
    for step in plan.steps:
        for name in filter(None, (step.source, step.add)):
            if name != INPUT:
                held = {owner[byte] for byte in range(plan.offsets[name], plan.offsets[name] + sizes[name])}
                assert held == {name}, (step.name, held)
        own = {f"{step.out}/{operand}": count for operand, (_, count) in step.piece.kernel.scratch(step.config).items()}
        written = {name: (plan.offsets[name], 4 * count) for name, count in own.items()}
        if step.out in plan.offsets:
            written[step.out] = plan.offsets[step.out], sizes[step.out]
        for (one, (first, size)), (other, (second, length)) in combinations(written.items(), 2):
            assert first + size <= second or second + length <= first, (one, other)
        read = [(plan.offsets[name], sizes[name]) for name in (step.source,) if name != INPUT]
        for name, (first, size) in written.items():
            assert first + size <= plan.arena_bytes
            for second, length in read:
                assert first + size <= second or second + length <= first, (step.name, name)
            owner |= dict.fromkeys(range(first, first + size), name)


def test_a_sum_takes_the_bytes_of_its_shortcut():
    chain = bottlenecks(shortcuts=True)
    plan = build_plan(chain, 1, H100, "never")
    sums = [step for step in plan.steps if step.add]
    assert sums
    for step in sums[:-1]:
        assert plan.offsets[step.out] == plan.offsets[step.add]


def test_the_stopwatch_decides(plain50):
    def slow_when_fused(piece, config):
        return 1.0 if len(piece.steps) == 1 else 1e6

    plan = build_plan(plain50, 1, H100, stopwatch=slow_when_fused)
    assert len(plan.steps) == len(plain50.steps)
    assert all(step.measured and step.us == 1.0 for step in plan.steps)
    fused = build_plan(plain50, 1, H100, stopwatch=lambda piece, config: 1.0)
    assert len(fused.steps) == 21


def test_a_configuration_that_must_not_be_used_is_not(plain50):
    refused = []
    first = functools.cache(lambda kernel: kernel.configs(H100)[0])

    def refuse_first(piece, config):
        if config == first(piece.kernel):
            refused.append((piece.kernel, config))
            return None
        return 1.0

    plan = build_plan(plain50, 1, H100, stopwatch=refuse_first)
    used = {(step.piece.kernel, step.config) for step in plan.steps}
    assert refused
    assert not used & set(refused)
    with pytest.raises(UserError, match="no configuration"):
        build_plan(plain50, 1, H100, stopwatch=lambda piece, config: None)


def test_shapes_are_measured_once(plain50):
    asked = []
    build_plan(plain50, 1, H100, stopwatch=lambda piece, config: asked.append((piece.kernel, config)) or 1.0)
    distinct = {piece.kernel for ways in places(plain50, 1) for way in ways for piece in way}
    assert len({kernel for kernel, _ in asked}) <= len(distinct)
    assert len(asked) < 3 * len(set(asked))


def test_a_tensor_with_two_readers_is_not_fused_away():
    chain = ChainBuilder(16)
    entry = chain.conv(16)
    middle = chain.conv(16)
    wide = chain.conv(64, 1)
    chain.conv(16, 1, source=wide)
    chain.conv(64, 1, add=wide)
    network = chain.finish(8, 8, 4)
    plan = build_plan(network, 1, H100, "always")
    assert "Bottleneck" not in kinds(plan)
    assert {entry, middle, wide} <= {step.out for step in plan.steps}
    assert all(needed in {INPUT, *(s.out for s in plan.steps)} for s in network.steps for needed in sources(s))


def test_unknown_fusion_and_too_large_a_batch(resnet50):
    with pytest.raises(UserError, match="fusion 'maybe'"):
        build_plan(bottlenecks(), 1, H100, "maybe")
    with pytest.raises(UserError, match="smaller batch"):
        build_plan(resnet50, 4096, H100)
