"""The compiled engine's numbers against float64: over shapes, instruction sets, precisions, plans and threads."""

import dataclasses

import numpy as np
import pytest
from chains import ChainBuilder, basics, bottlenecks, images_for, reference

from rd_deploy.chain import Chain, Conv, Linear
from rd_deploy.engines import Unsupported, get_engine
from rd_deploy.export.native import round_to_bf16, to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.native import Flag, Network, available_isas

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16x2")
# Of the largest error, in standard deviations of the logits. float32's own rounding over these depths is some 1e-6, and
# Winograd's 4x4 form loses two to three bits more. bfloat16 rounds every map and weight at 4e-3, two of them at 8e-6.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


def precisions(isa: str) -> list[str]:
    """Those that an instruction set has kernels for."""
    return {"amx_bf16x2": ["fp32"], "amx_bf16": ["bf16"], "avx512_bf16": ["bf16"]}.get(isa, ["fp32", "bf16"])


def odd_shapes() -> Chain:
    """Channels that fill no vector, strides and kernels that leave borders, a 5x5 and a 1x1 of stride 2."""
    chain = ChainBuilder(channels=5, seed=3)
    chain.conv(7, 5)
    chain.pool(2, 2)
    chain.conv(33, 1, stride=2)
    chain.conv(20, 3, relu=False)
    chain.conv(9, 3, stride=2)
    return chain.finish(23, 17, classes=3)


CHAINS = {
    "plain bottlenecks": bottlenecks(),
    "bottlenecks with shortcuts": bottlenecks(shortcuts=True),
    "narrow bottlenecks": bottlenecks(width=5, size=(19, 26), channels=1),
    "plain basic blocks": basics(blocks=2),
    "basic blocks with shortcuts": basics(shortcuts=True, blocks=2, channels=3),
    "wide maps": basics(widths=(40, 24), size=(31, 9), classes=1001),
    "odd shapes": odd_shapes(),
}
CASES = [(isa, precision) for isa in ISAS for precision in precisions(isa)]


def planned(chain: Chain, precision: str, isa: str, batch: int, threads: int = 1, flags: Flag = Flag.NONE):
    if isa not in available_isas():
        pytest.skip(f"this CPU or compiler has no {isa}")
    return Network.from_bytes(to_rdp(chain, precision)).plan(batch, threads, isa, flags)


def error(chain: Chain, logits: np.ndarray, images: np.ndarray) -> float:
    expected = reference(chain, images)
    return float(np.abs(logits - expected).max() / expected.std())


def rounded(chain: Chain) -> Chain:
    """With bfloat16 weights, so that the reference is of the network that bf16 runs."""
    steps = [
        dataclasses.replace(step, weight=round_to_bf16(step.weight).astype(np.float64))
        if isinstance(step, Conv | Linear)
        else step
        for step in chain.steps
    ]
    return dataclasses.replace(chain, steps=tuple(steps))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("isa", "precision"), CASES)
def test_logits_agree_with_float64(isa, precision, name, batch):
    chain = CHAINS[name]
    plan, images = planned(chain, precision, isa, batch, threads=2), images_for(chain, batch)
    assert plan.info.isa == isa
    against = rounded(chain) if precision == "bf16" else chain
    assert error(against, plan.context().run(images), images) < TOLERANCE[precision]


@pytest.mark.parametrize("flags", [Flag.UNFUSED, Flag.NO_WINOGRAD, Flag.SMALL, Flag.UNFUSED | Flag.NO_WINOGRAD])
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_every_way_to_plan_agrees(precision, name, flags):
    chain = CHAINS[name]
    images = images_for(chain, 2)
    network = Network.from_bytes(to_rdp(chain, precision))
    against = rounded(chain) if precision == "bf16" else chain
    assert error(against, network.plan(2, 2, flags=flags).context().run(images), images) < TOLERANCE[precision]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("isa", "precision"), CASES)
def test_threads_and_neighbours_do_not_change_a_bit(isa, precision, name):
    """An image's logits do not depend on how many threads work, nor on what shares its batch."""
    chain = CHAINS[name]
    images = images_for(chain, 4)
    expected = planned(chain, precision, isa, 4, threads=1).context().run(images)
    for threads in (2, 3, 5):
        logits = planned(chain, precision, isa, 4, threads).context().run(images)
        np.testing.assert_array_equal(logits, expected)
    others = np.concatenate([-images[:1], images[:3]])
    np.testing.assert_array_equal(planned(chain, precision, isa, 4, 2).context().run(others)[1:], expected[:3])


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("isa", "precision"), CASES)
def test_without_winograd_the_batch_does_not_change_a_bit(isa, precision, name):
    """Which of Winograd's forms pays depends on the batch; nothing else does."""
    chain = CHAINS[name]
    images = images_for(chain, 3)
    whole, one = (planned(chain, precision, isa, batch, 2, Flag.NO_WINOGRAD).context() for batch in (3, 1))
    np.testing.assert_array_equal(np.concatenate([one.run(image[None]) for image in images]), whole.run(images))


def test_more_threads_than_work():
    chain = basics(widths=(16,), size=(2, 2))
    images = images_for(chain, 1)
    for threads in (1, 64):
        logits = Network.from_bytes(to_rdp(chain)).plan(1, threads).context().run(images)
        assert error(chain, logits, images) < TOLERANCE["fp32"]


# --- as an engine of rd-bench


@pytest.mark.parametrize("name", CHAINS)
def test_the_engine_agrees_with_onnx_runtime(name):
    model, images = to_onnx(CHAINS[name]), images_for(CHAINS[name], 2)
    expected = get_engine("onnxruntime").load(model, "fp32", 1, 2).run(images)
    logits = get_engine("native").load(model, "fp32", 1, 2).run(images)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE["fp32"] * expected.std())


def test_the_engine_names_its_instruction_set(monkeypatch):
    model = to_onnx(CHAINS["plain bottlenecks"])
    monkeypatch.setenv("RD_ISA", "portable")
    session = get_engine("native").load(model, "bf16", 1, 1)
    assert (session.engine.name, session.variant) == ("native", "portable")
    assert get_engine("onnxruntime").load(model, "fp32", 1, 1).variant is None
    monkeypatch.setenv("RD_ISA", "sse9")
    with pytest.raises(Unsupported, match="unknown instruction set 'sse9'"):
        get_engine("native").load(model, "fp32", 1, 1)


def test_the_engine_says_why_it_cannot(monkeypatch):
    chain = CHAINS["plain bottlenecks"]
    large = dataclasses.replace(chain, steps=(dataclasses.replace(chain.steps[0], stride=17), *chain.steps[1:]))
    large = dataclasses.replace(large, input_shape=(3, 400, 400))
    with pytest.raises(Unsupported, match="does not fit the native engine"):
        get_engine("native").load(to_onnx(large), "fp32", 1, 1)
    with pytest.raises(Unsupported, match="threads"):
        get_engine("native").load(to_onnx(chain), "fp32", 1025, 1)


def test_a_missing_library_is_a_reason(monkeypatch):
    from rd_deploy.common import UserError
    from rd_deploy.engines import native

    def missing():
        raise UserError("the compiled engine is not built")

    monkeypatch.setattr(native, "library", missing)
    assert get_engine("native").missing() == "the compiled engine is not built"


def test_the_engines_accounts_are_the_plans():
    session = get_engine("native").load(to_onnx(CHAINS["plain bottlenecks"]), "bf16", 2, 3)
    info = session.plan.info
    maps, arena, small = session.feature_maps()
    assert (maps.source, maps.peak_bytes) == ("native maps", info.feature_map_bytes)
    assert (arena.source, arena.peak_bytes) == ("native arena", info.arena_bytes)
    assert small.source == "native small arena"
    assert 0 < small.peak_bytes <= arena.peak_bytes
    assert f"{info.weight_bytes:,} bytes of weights in the file" in maps.how


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF])
def test_images_that_are_not_numbers_give_logits_that_are_not(precision, payload):
    """Somebody whose normalisation divides by zero must see it."""
    chain = CHAINS["plain bottlenecks"]
    network = Network.from_bytes(to_rdp(chain, precision))
    images = np.full((1, *chain.input_shape), payload, np.uint32).view(np.float32)
    for isa in available_isas():
        if precision not in precisions(isa):
            continue
        assert np.isnan(network.plan(1, 1, isa=isa).context().run(images)).all(), isa
