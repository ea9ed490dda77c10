"""The feature-map ledger of ResNets against hand counts."""

from dataclasses import replace
from functools import cache

import onnx
import pytest
from onnx import TensorProto
from onnx_builder import UNIT, Builder, elements, network

from rd_deploy.common import UserError
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import source_from_name
from rd_deploy.memory import ledger

# Hand counts at 224x224, in units of one 64x56x56 map: u = 64 * 56 * 56 = 200,704 elements.
# Stem: image 3x224x224 = 0.75 u, its output 64x112x112 = 4 u, pooled 1 u. So stem 4.75 u, pool 4 + 1 = 5 u.
# Stage 1 of a bottleneck net, inner maps 64x56x56 = 1 u, wide ones 256x56x56 = 4 u.
#   separate: the last convolution of blocks 2, 3 reads 1 u, adds the shortcut, 4 u, and writes 4 u: 9 u, the peak.
#   in-place: it writes over the shortcut: 1 + 4 = 5 u; while the 3x3 runs, 4 u wait: 4 + 1 + 1 = 6 u.
# Entry of stage 2: reduce writes 128x56x56 = 2 u, the 3x3 of stride 2 128x28x28 = 0.5 u, expand 512x28x28 = 2 u.
#   in-place: reduce 4 + 2 = 6 u; 3x3 4 + 2 + 0.5 = 6.5 u, the peak; projection 4 + 0.5 + 2 = 6.5 u; expand, onto the
#   projection: 0.5 + 2 = 2.5 u. (Projection first needs 4 + 2 + 2 = 8 u during reduce; projection last needs 6.5 and
#   6 u, a larger sum.)
#   plain: reduce 4 + 2 = 6 u, the peak, since stage 1 needs 4 + 1 = 5 u at most.
# Stage 1 of a basic net: three maps of 1 u at most: 3 u. So the pool's 5 u are the peak with and without shortcuts.
PEAKS = [
    (50, True, "separate", 9 * UNIT, 4 * UNIT, 1_806_336),
    (50, True, "in-place", 13 * UNIT // 2, 4 * UNIT, 1_304_576),
    (101, True, "separate", 9 * UNIT, 4 * UNIT, 1_806_336),
    (50, False, "separate", 6 * UNIT, 0, 1_204_224),
    (50, False, "in-place", 6 * UNIT, 0, 1_204_224),
    *(
        (18, shortcuts, policy, 5 * UNIT, 0, 1_003_520)
        for shortcuts in (True, False)
        for policy in ("separate", "in-place")
    ),
    (34, True, "in-place", 5 * UNIT, 0, 1_003_520),
]


@pytest.mark.parametrize(("depth", "shortcuts", "policy", "peak", "held", "published"), PEAKS)
def test_peaks_match_hand_counts(depth, shortcuts, policy, peak, held, published):
    assert peak == published
    for options in ({}, {"unfused": True}, {"swap": True}):
        found = elements(depth, shortcuts, policy, **options)
        assert (found.peak_bytes, found.shortcut_peak_bytes, found.best_order) == (peak, held, True), options


def test_peak_names_the_step():
    assert elements(50, True, "in-place").peak_step == "layer2.0.conv3x3"
    assert elements(50, False, "in-place").peak_step == "layer2.0.reduce"
    assert elements(18, True, "separate").peak_step == "pool"


def test_traffic_is_the_sum_over_layers():
    """Every convolution's input and output once; each addition reads one operand more."""
    image, classes = 3 * 224 * 224, 1000
    plain = image + 4 * UNIT + 4 * UNIT + UNIT  # stem, pool
    residual, wide_in = 0, UNIT
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = UNIT >> stage  # w channels at the stage's resolution
        for number in range(count):
            entry = inner * (4 if number == 0 and stage else 1)  # reduce still has the input's resolution
            plain += wide_in + entry + entry + inner + inner + 4 * inner
            residual += 4 * inner + (wide_in + 4 * inner if number == 0 else 0)
            wide_in = 4 * inner
    plain += wide_in + 2048 + 2048 + classes
    for policy in ("separate", "in-place"):
        assert elements(50, False, policy).traffic_bytes == plain
        assert elements(50, True, policy).traffic_bytes == plain + residual


SHARES = [
    (50, True, "separate", 0.397),  # about the paper's 40%
    (50, True, "in-place", 0.281),
    (50, False, "separate", 0),
    (50, False, "in-place", 0),
]


@pytest.mark.parametrize(("depth", "shortcuts", "policy", "share"), SHARES)
def test_shortcut_shares_do_not_depend_on_the_file(depth, shortcuts, policy, share):
    for options in ({}, {"unfused": True}, {"swap": True}):
        assert elements(depth, shortcuts, policy, **options).shortcut_share == pytest.approx(share, abs=5e-4), options


@pytest.mark.parametrize("policy", ["separate", "in-place"])
@pytest.mark.parametrize(("depth", "shortcuts"), [(50, True), (50, False), (18, True)])
def test_our_exports_have_the_same_ledger_as_hand_built_files(depth, shortcuts, policy):
    """Of a quarter of the width, which is quicker to make."""
    hand_built = elements(depth, shortcuts, policy, base=16)
    found = ledger(export(f"{'resnet' if shortcuts else 'plain'}{depth}"), element_bytes=1, policy=policy)
    one, other = ([(s.live_bytes, s.shortcut_bytes, s.read_bytes) for s in each.steps] for each in (hand_built, found))
    assert one == other


@cache
def export(name: str) -> onnx.ModelProto:
    """A network as rd-export writes it, with random weights that were calibrated on small images."""
    chain = source_from_name(name, 32, width=0.25).chain
    return to_onnx(replace(chain, input_shape=(3, 224, 224)))


def test_batch_and_element_size_scale_everything():
    one = elements(18, True, "separate")
    for batch in ("N", 2, 1):  # dynamic, and two fixed batches that are changed
        model = network(18, True, batch=batch, data_type=TensorProto.FLOAT16)
        big = ledger(model, batch=3, element_bytes=2)
        assert [step.live_bytes for step in big.steps] == [6 * step.live_bytes for step in one.steps]
    assert (big.batch, big.element_bytes, big.policy) == (3, 2, "separate")


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"element_bytes": 3}, {"policy": "best"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError, match=r"need|unknown"):
        ledger(Builder().model(["N", 4], "image"), **arguments)
