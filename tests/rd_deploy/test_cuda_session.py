"""Whole networks on the cuda engine, in Triton's interpreter, against the NumPy reference in float64."""

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from chains import basics, bottlenecks, images_for, reference

from rd_deploy.chain import Conv, Linear
from rd_deploy.common import UserError
from rd_deploy.cuda.plan import places
from rd_deploy.cuda.session import pack
from rd_deploy.engines import Unsupported, get_engine
from rd_deploy.engines.cuda import CudaSession
from rd_deploy.export.onnx import to_onnx
from rd_deploy.triton_kernels.cards import get_card

# Largest error / standard deviation of the logits: each of about ten layers rounds once, to 2^-11 or 2^-8 of a value.
TOLERANCE = {"fp16": 0.02, "bf16": 0.15}
CHAINS = {
    "bottleneck": bottlenecks(stages=(2, 1)),
    "bottleneck with shortcuts": bottlenecks(stages=(2, 1), shortcuts=True),
    "basic": basics(size=(7, 9)),
    "basic with shortcuts": basics(size=(7, 9), shortcuts=True),
}


def load(chain, precision="fp16", batch=2) -> CudaSession:
    return get_engine("cuda").load(to_onnx(chain), precision, threads=1, batch=batch)


def error(chain, session) -> float:
    images = images_for(chain, session.batch)
    expected = reference(chain, images)
    return float(np.abs(session.run(images) - expected).max() / expected.std())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", CHAINS)
def test_logits_are_those_of_the_network(name, precision):
    session = load(CHAINS[name], precision)
    assert error(CHAINS[name], session) < TOLERANCE[precision]


@pytest.mark.parametrize("fusion", ["always", "never"])
def test_fused_or_layer_by_layer_the_logits_agree(monkeypatch, fusion):
    monkeypatch.setenv("RD_FUSION", fusion)
    chain = CHAINS["bottleneck"]
    session = load(chain)
    assert ("Bottleneck" in {step.kernel for step in session.plan.steps}) == (fusion == "always")
    assert error(chain, session) < TOLERANCE["fp16"]


def test_the_second_run_gives_the_same_bits():
    """Counters are back at zero, and nothing is left of the run before."""
    chain = CHAINS["bottleneck"]
    session = load(chain, batch=1)
    images = images_for(chain, 1)
    first = session.run(images)
    session.run(-images)
    np.testing.assert_array_equal(session.run(images), first)


def test_memory_that_was_never_written_is_never_read():
    """The arena full of NaN, but for the counters, gives the same logits."""
    chain = CHAINS["bottleneck with shortcuts"]
    session = load(chain, batch=1)
    images = images_for(chain, 1)
    expected = session.run(images)
    program = session.program
    counters = [
        bound.operands[name]
        for bound in program.launches
        for name, kind in bound.launch.tensors.items()
        if kind == "i32"
    ]
    program.arena.view(torch.float16).fill_(float("nan"))
    for counter in counters:
        counter.zero_()
    np.testing.assert_array_equal(session.run(images), expected)


def test_resident_images_and_logits():
    chain = CHAINS["basic"]
    session = load(chain)
    images = images_for(chain, 2)
    expected = session.run(images)
    session.images.copy_(torch.from_numpy(images[::-1].copy()))
    session.enqueue()
    np.testing.assert_array_equal(session.logits.numpy(), expected[::-1])


def test_accounts_and_profile():
    session = load(CHAINS["bottleneck"], batch=1)
    figures = {figure.source: figure.peak_bytes for figure in session.feature_maps()}
    assert figures["cuda maps"] == session.plan.feature_map_bytes
    assert figures["cuda arena"] == session.program.arena.nbytes
    assert len(session.profile()) == len(session.plan.steps)
    assert session.variant == "interpreter"


@pytest.mark.parametrize(("precision", "step"), [("fp16", 2.0**-10), ("bf16", 2.0**-7)])
def test_float64_weights_are_rounded_once(precision, step):
    """Just above a tie: float32 would round to the tie, and the tie then to even. Biases stay float32."""
    chain = bottlenecks(stages=(2, 1))
    for layer in chain.steps:
        if isinstance(layer, Conv | Linear):
            layer.weight[:] = 1 + step / 2 + 2.0**-40
            layer.bias[:] = 1 + 2.0**-20
    pieces = [piece for ways in places(chain, 1) for way in ways for piece in way]
    assert len({type(piece.kernel) for piece in pieces}) > 4
    for piece in pieces:
        launch = piece.kernel.launch(piece.kernel.configs(get_card("h100"))[0], False)
        for name, values in pack(piece, precision, launch).items():
            assert values.dtype == np.float32
            assert set(np.unique(values)) <= ({0, 1 + step} if name.startswith("w") else {0, np.float32(1 + 2.0**-20)})


def test_weights_beyond_fp16_are_refused():
    chain = bottlenecks(stages=(1,))
    chain.steps[3].bias[:] = 0
    chain.steps[3].weight[0, 0, 0, 0] = 1e5
    with pytest.raises(Unsupported, match="more than fp16 holds"):
        load(chain)
    load(chain, "bf16")


def test_a_network_that_is_no_chain_is_refused():
    """As what the engine cannot do, so that a benchmark goes on with the others."""
    model = to_onnx(CHAINS["basic"])
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
    with pytest.raises(Unsupported, match="a chain has no Sigmoid"):
        get_engine("cuda").load(model, "fp16", threads=1, batch=1)


def test_precisions_and_settings(monkeypatch):
    with pytest.raises(Unsupported, match="fp16 and bf16, not fp32"):
        load(CHAINS["basic"], "fp32")
    monkeypatch.setenv("RD_FUSION", "yes")
    with pytest.raises(UserError, match="RD_FUSION=yes: give auto or always or never"):
        load(CHAINS["basic"])
    monkeypatch.setenv("RD_FUSION", "auto")
    monkeypatch.setenv("RD_PDL", "1")
    with pytest.raises(Unsupported, match="sm_90"):
        load(CHAINS["basic"])
