"""Q/DQ graphs in ONNX Runtime against float64 NumPy, against onnxruntime's own quantizer, and numbers by hand."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from chains import basics, bottlenecks, images_for, reference
from onnx import numpy_helper

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, run_step
from rd_deploy.common import UserError
from rd_deploy.export.onnx import read_metadata, to_onnx
from rd_deploy.parity import onnx_runner
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.quantize import KINDS, calibrate, qdq_counts, quantizable, stored_bytes, to_qdq
from rd_deploy.quantize.qdq import quantized_tensors, scales, stored, stored_weight

# Every number of E4M3 by its definition (Micikevicius et al. 2022): 4 bits of exponent with bias 7, 3 of mantissa, no
# infinity, and all ones is NaN.
SUBNORMAL = [m / 8 * 2.0**-6 for m in range(8)]
NORMAL = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
E4M3 = np.array(SUBNORMAL + NORMAL)
LARGEST = {"int8": 127, "fp8": 448}


def rounded(values: np.ndarray, scale: np.ndarray | float, kind: str) -> np.ndarray:
    """Q then DQ in float64, from the definitions."""
    quotient = np.asarray(values, np.float64) / scale
    if kind == "int8":
        return np.clip(np.rint(quotient), -128, 127) * scale
    at = np.searchsorted(E4M3, np.abs(quotient).clip(max=448)).clip(1, len(E4M3) - 1)
    below, above = E4M3[at - 1], E4M3[at]
    low, high = np.abs(quotient) - below, above - np.abs(quotient)
    nearest = np.where((low < high) | ((low == high) & (at % 2 == 1)), below, above)  # ties: the even mantissa
    return np.sign(quotient) * nearest * scale


def fake_quantised(chain: Chain, images: np.ndarray, ranges: dict, kind: str, keep=()) -> np.ndarray:
    """Logits in float64: what quantised layers read is rounded, and their weights."""
    tensors, layers = {INPUT: images.astype(np.float64)}, set(quantizable(chain, KINDS[kind])) - set(keep)
    for step in chain.steps:
        read = dict(tensors)
        if step.name in layers:
            largest = np.abs(step.weight).reshape(len(step.weight), -1).max(axis=1)
            per_channel = np.float64(np.float32(largest / LARGEST[kind])).reshape(-1, *[1] * (step.weight.ndim - 1))
            step = dataclasses.replace(step, weight=rounded(step.weight, per_channel, kind))
            for name in {step.source, getattr(step, "add", None)} - {None}:
                read[name] = rounded(tensors[name], float(np.float32(ranges[name] / LARGEST[kind])), kind)
        tensors[step.name] = run_step(step, read)
    return tensors[chain.steps[-1].name]


def exact_chain(rng: np.random.Generator, kind: str, shortcut: bool) -> Chain:
    """Weights whose scales are powers of two and whose products and sums float32 holds exactly, in any order."""

    def weight(*shape: int) -> np.ndarray:
        values = rng.integers(-8, 9, shape).astype(np.float64)
        values.reshape(shape[0], -1)[:, 0] = LARGEST[kind] * rng.choice([-1, 1], shape[0])
        return values / 64

    def bias(count: int) -> np.ndarray:
        return rng.integers(-64, 65, count) / 16

    steps = (
        Conv("a", weight(16, 16, 3, 3), bias(16), 1, 1, True, INPUT),
        MaxPool("pool", 3, 2, 1, "a"),
        Conv("b", weight(16, 16, 1, 1), bias(16), 1, 0, True, "pool"),
        Conv("c", weight(16, 16, 3, 3), bias(16), 1, 1, True, "b", add="pool" if shortcut else None),
        GlobalAveragePool("mean", "c"),
        Linear("fc", weight(6, 16), bias(6), "mean"),
    )
    return Chain(steps, (16, 8, 8), Preprocessing(8, 8, 16, (0,) * 16, (1,) * 16), tuple("uvwxyz"))


EXACT_RANGES = {"images": 1 / 16, "pool": 1, "b": 2, "mean": 4}  # times 127 or 448: scales are powers of two


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("keep", [(), ("a", "fc"), ("b", "c")])
def test_every_value_is_rounded_as_float64_rounds_it(kind, shortcut, keep):
    rng = np.random.default_rng(3)
    chain, images = exact_chain(rng, kind, shortcut), rng.integers(-127, 128, (5, 16, 8, 8)).astype(np.float32) / 8
    ranges = {name: value * LARGEST[kind] for name, value in EXACT_RANGES.items()}
    model = to_qdq(chain, ranges, kind, keep)
    expected = fake_quantised(chain, images, ranges, kind, keep)
    logits = onnx_runner(model.SerializeToString(), 1, literal=True)(images)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)  # exact but for the sums of a kept classifier
    # controls: another range, and a network without a ReLU, are seen
    other = to_qdq(chain, ranges | {"b": 1.5 * ranges["b"]}, kind, ())
    assert not np.allclose(onnx_runner(other.SerializeToString(), 1, literal=True)(images), expected, rtol=1e-4)
    steps = tuple(dataclasses.replace(step, relu=False) if step.name == "b" else step for step in chain.steps)
    assert not np.allclose(
        fake_quantised(dataclasses.replace(chain, steps=steps), images, ranges, kind, keep), expected, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [basics, bottlenecks])
@pytest.mark.parametrize("shortcuts", [False, True])
def test_real_valued_networks_are_near_float64(kind, make, shortcuts):
    chain = make(shortcuts=shortcuts)
    images = images_for(chain, 8)
    ranges = calibrate(chain, kind, "minmax", [images])
    run = onnx_runner(to_qdq(chain, ranges, kind).SerializeToString(), 1, literal=True)
    expected, original = fake_quantised(chain, images, ranges, kind), reference(chain, images)
    # float32 sums fall on another side of a rounding step here and there
    assert np.abs(run(images) - expected).mean() < 0.02 * original.std()
    assert 0.001 < np.abs(expected - original).mean() / original.std() < 0.2


def test_onnxruntime_1_32_drops_the_relu_before_a_float8_q():
    """Should it not do so any more, `parity.WRONG_OPTIMIZERS` can go."""
    rng = np.random.default_rng(3)
    chain, images = exact_chain(rng, "fp8", False), rng.integers(-127, 128, (5, 16, 8, 8)).astype(np.float32) / 8
    content = to_qdq(chain, {name: value * 448 for name, value in EXACT_RANGES.items()}, "fp8").SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert not np.array_equal(session.run(None, {"images": images})[0], onnx_runner(content, 1)(images))


@pytest.mark.parametrize("make", [basics, bottlenecks])
def test_the_graph_is_that_of_onnxruntimes_own_quantizer(make, tmp_path):
    """int8, per channel, min-max, Q/DQ on inputs of Conv and Gemm: the same nodes, scales, weights and logits."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    chain = make()
    images = images_for(chain, 8)

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{"images": images}])

        def get_next(self):
            return next(self.batches, None)

    onnx.save(to_onnx(chain), tmp_path / "float.onnx")
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Gemm"]
    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "static.onnx",
        Reader(),
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        extra_options=options | {"CalibTensorRangeSymmetric": True},
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    theirs = onnx.load(tmp_path / "static.onnx")
    ours = to_qdq(chain, calibrate(chain, "int8", "minmax", [images]), "int8")
    assert Counter(node.op_type for node in ours.graph.node) == Counter(node.op_type for node in theirs.graph.node)
    logits = [onnx_runner(model.SerializeToString(), 1, literal=True)(images) for model in (ours, theirs)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    assert np.abs(logits[0] - reference(chain, images)).max() > 1e-3  # that tolerance is tight


# --- numbers


def test_weights_are_scaled_per_output_channel_by_hand():
    weight = np.array([[254.0, -1.0, 3.0], [0.0, 0.0, 0.0], [0.5, -0.635, 0.1], [-127e30, 1e30, 0.5]])
    values, scale = stored_weight(weight, KINDS["int8"])
    np.testing.assert_array_equal(scale, np.float32([2, 1, 0.005, 1e30]))
    np.testing.assert_array_equal(values, [[127, 0, 2], [0, 0, 0], [100, -127, 20], [-127, 1, 0]])  # -0.5 is even at 0


def test_fp8_rounds_to_the_nearest_number_of_the_type():
    values = np.random.default_rng(0).standard_normal(20_000) * np.geomspace(1e-4, 600, 20_000)
    halves = (E4M3[1:] + E4M3[:-1]) / 2
    values = np.concatenate([values, halves, -halves, E4M3, [1e30, -1e30]])
    result = stored(values, np.ones(1, np.float32), KINDS["fp8"]).astype(np.float64)
    np.testing.assert_array_equal(result, rounded(values, 1.0, "fp8"))
    assert np.abs(result).max() == 448


def test_fp8_of_float64_values_is_rounded_once():
    """A little beside each tie: float32 would round to the tie, and the tie then to even."""
    halves = (E4M3[1:] + E4M3[:-1]) / 2
    values = np.concatenate([halves * (1 + 2.0**-40), halves * (1 - 2.0**-40)])
    result = stored(values, np.ones(1, np.float32), KINDS["fp8"]).astype(np.float64)
    np.testing.assert_array_equal(result, np.concatenate([E4M3[1:], E4M3[:-1]]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_scales_of_degenerate_ranges_are_usable(kind):
    result = scales(np.array([0.0, 1e-44, 1e-300, 3.4e38]), kind)
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert (result >= np.finfo(np.float32).tiny).all()
    assert (stored(np.array([0.0, 1e-44, 1e-300, 3.4e38]), result, kind).astype(np.float64) <= kind.largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_and_an_outlier_stay_in_their_channels(kind):
    chain = basics()
    step = chain.steps[1]
    weight = step.weight.copy()
    weight[0], weight[1, 0, 0, 0] = 0, 1e4
    chain = dataclasses.replace(
        chain, steps=(chain.steps[0], dataclasses.replace(step, weight=weight), *chain.steps[2:])
    )
    images = images_for(chain, 8)
    ranges = calibrate(chain, kind, "minmax", [images])
    logits = onnx_runner(to_qdq(chain, ranges, kind).SerializeToString(), 1, literal=True)(images)
    original = reference(chain, images)
    assert np.abs(logits - original).mean() < 0.2 * original.std()


# --- placement


def nodes_reading(model: onnx.ModelProto, operator: str, index: int) -> list[str]:
    """The types of the nodes that make an operand of all nodes of a type."""
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return [made.get(node.input[index], "") for node in model.graph.node if node.op_type == operator]


def ones(chain: Chain, kind: str) -> dict[str, float]:
    return dict.fromkeys(quantized_tensors(chain, KINDS[kind]), 1.0)


def test_a_plain_network_has_pairs_where_weights_are_read_and_nowhere_else():
    plain, resnet = (bottlenecks(shortcuts=shortcuts) for shortcuts in (False, True))
    ours = to_qdq(plain, ones(plain, "int8"), "int8")
    layers = len(quantizable(plain, KINDS["int8"]))
    assert layers == 14
    assert qdq_counts(ours) == {
        "quantize_nodes": layers,
        "dequantize_nodes": 2 * layers,
        "weights": layers,
        "feature_maps": layers,
        "added_operands": 0,
        "feature_maps_only_added": 0,
    }
    for operator in ("Conv", "Gemm"):
        assert set(nodes_reading(ours, operator, 0) + nodes_reading(ours, operator, 1)) == {"DequantizeLinear"}
        assert set(nodes_reading(ours, operator, 2)) == {""}  # biases are float
    # 4 blocks; 2 begin with a projection, whose result only the addition reads and whose source is quantised anyway
    counts = qdq_counts(to_qdq(resnet, ones(resnet, "int8"), "int8"))
    assert counts == {
        "quantize_nodes": layers + 2,
        "dequantize_nodes": 2 * layers + 4,
        "weights": layers + 2,
        "feature_maps": layers + 2,
        "added_operands": 4,
        "feature_maps_only_added": 2,
    }


def test_a_shortcut_is_quantised_on_one_side_of_the_addition():
    chain = bottlenecks(shortcuts=True)
    model = to_qdq(chain, ones(chain, "int8"), "int8")
    assert set(nodes_reading(model, "Add", 1)) == {"DequantizeLinear"}
    assert set(nodes_reading(model, "Add", 0)) == {"Conv"}  # so that the addition is part of its kernel


def test_a_kept_layer_reads_and_holds_float():
    chain = bottlenecks(shortcuts=True)
    kept = next(step for step in chain.steps if isinstance(step, Conv) and step.add)
    model = to_qdq(chain, ones(chain, "int8"), "int8", keep=[kept.name])
    (node,) = (node for node in model.graph.node if node.name == f"{kept.name}/conv")
    assert list(node.input) == [kept.source, f"{kept.name}.weight", f"{kept.name}.bias"]
    (add,) = (node for node in model.graph.node if node.name == f"{kept.name}/add")
    assert add.input[1] == kept.add
    floats = [tensor for tensor in model.graph.initializer if tensor.name == f"{kept.name}.weight"]
    np.testing.assert_array_equal(numpy_helper.to_array(floats[0]), np.float32(kept.weight))


def test_fp8_leaves_convolutions_with_odd_channels_in_float():
    assert quantizable(basics(widths=(16, 24, 32)), KINDS["fp8"]) == ("conv1", "conv2", "conv6", "fc")
    assert "images" not in quantized_tensors(basics(), KINDS["fp8"])
    assert quantized_tensors(basics(), KINDS["int8"])[0] == "images"


# --- files


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_a_quarter_checked_deterministic_and_say_what_they_are(kind):
    chain = bottlenecks(width=32)
    ranges = calibrate(chain, kind, "minmax", [images_for(chain, 2)])
    first, second = (to_qdq(chain, dict(ranges), kind).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    model = onnx.load_from_string(first)
    onnx.checker.check_model(model, full_check=True)
    metadata = read_metadata(model)
    assert (metadata.precision, metadata.classes) == (kind, chain.classes)
    assert metadata.weights_sha256 == chain.sha256()
    assert 0.25 < stored_bytes(model) / (4 * chain.parameters()) < 0.35
    assert len(first) < 0.4 * len(to_onnx(chain).SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_are_those_of_the_file(kind, monkeypatch):
    """Counted by hand, whatever an older onnx makes of float8 (it gives float32)."""
    monkeypatch.setattr(numpy_helper, "to_array", lambda tensor: np.zeros(tuple(tensor.dims), np.float32))
    chain = bottlenecks()
    names, layers = quantized_tensors(chain, KINDS[kind]), quantizable(chain, KINDS[kind])
    expected = 1 + 4 * len(names)  # the maps' zero point, and their scales
    for step in (step for step in chain.steps if isinstance(step, Conv | Linear)):
        outputs, weights = len(step.bias), step.weight.size
        expected += 4 * outputs + (weights + 5 * outputs if step.name in layers else 4 * weights)
    assert stored_bytes(to_qdq(chain, ones(chain, kind), kind)) == expected


def test_what_cannot_be_kept_is_refused():
    chain = basics()
    with pytest.raises(UserError, match=r"--keep conv11: .*did you mean 'conv1'"):
        to_qdq(chain, ones(chain, "int8"), "int8", keep=["conv11"])
    with pytest.raises(UserError, match="names every layer"):
        to_qdq(chain, ones(chain, "int8"), "int8", keep=quantizable(chain, KINDS["int8"]))
    first = dataclasses.replace(chain.steps[0], bias=chain.steps[0].bias + 1e39)
    loud = dataclasses.replace(chain, steps=(first, *chain.steps[1:]))
    with pytest.raises(UserError, match=r"conv0\.bias is beyond float32"):
        to_qdq(loud, ones(chain, "int8"), "int8")
