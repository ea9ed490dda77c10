"""Engines: one artefact, the same numbers everywhere, and reasons instead of silent fallbacks."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rd_deploy.common import UserError
from rd_deploy.engines import ENGINES, Unsupported, get_engine
from rd_deploy.engines import onnxruntime as ort_engine
from rd_deploy.engines.base import image_shape, weight_elements, with_batch
from rd_deploy.export.onnx import to_onnx


def network(nodes, weights, shape=(3, 8, 8), batch="N", classes=5) -> onnx.ModelProto:
    """A checked ONNX model from ``images`` to ``logits``."""
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])
    graph = helper.make_graph(nodes, "test", [images], [logits], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def random_weights(**shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def residual(batch="N") -> onnx.ModelProto:
    """A network with everything ours have: stem, max-pool, BN, a shortcut, global pool, classifier."""
    weights = random_weights(w1=(8, 3, 3, 3), b1=(8,), w2=(8, 8, 3, 3), w3=(8, 8, 1, 1), wf=(5, 8), bf=(5,))
    weights |= random_weights(scale=(8,), shift=(8,), mean=(8,)) | {"var": np.linspace(0.5, 2, 8, dtype=np.float32)}
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["images", "w1", "b1"], ["c1"], strides=[1, 1], **same),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], strides=[2, 2], **same),
        helper.make_node("Conv", ["p1", "w2"], ["c2"], **same),
        helper.make_node("BatchNormalization", ["c2", "scale", "shift", "mean", "var"], ["n2"], epsilon=1e-3),
        helper.make_node("Relu", ["n2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], kernel_shape=[1, 1]),
        helper.make_node("Add", ["c3", "p1"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "wf", "bf"], ["logits"], transB=1),
    ]
    return network(nodes, weights, batch=batch)


def images(batch: int, shape=(3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, *shape)).astype(np.float32)


def expected(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"images": x})[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ENGINES)
def test_fp32_equals_the_onnx_reference(name, batch):
    x = images(batch)
    session = get_engine(name).load(residual(), "fp32", threads=1, batch=batch)
    np.testing.assert_allclose(session.run(x), expected(residual(), x), atol=2e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_is_close_but_rounded(name):
    x = images(2)
    try:
        logits = get_engine(name).load(residual(), "bf16", threads=1, batch=2).run(x)
    except Unsupported as reason:
        pytest.skip(str(reason))
    error = np.abs(logits - expected(residual(), x)).max()
    assert 1e-4 < error < 0.05  # computed in bfloat16: neither wrong nor secretly float32


def test_onnxruntime_refuses_bf16():
    with pytest.raises(Unsupported, match="no bf16"):
        get_engine("onnxruntime").load(residual(), "bf16", 1, 1)


def test_openvino_falling_back_to_float32_is_refused(monkeypatch):
    from rd_deploy.engines import openvino

    monkeypatch.setattr(openvino, "executed_convolutions", lambda compiled: ["bf16", "f32"])
    with pytest.raises(Unsupported, match="f32 instead of bf16"):
        get_engine("openvino").load(residual(), "bf16", 1, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_runs_leave_input_and_earlier_output_alone(name):
    session = get_engine(name).load(residual(), "fp32", 1, 2)
    x = images(2)
    before, first = x.copy(), session.run(x)
    kept = first.copy()
    session.run(-x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(first, kept)


def test_single_channel_input_is_not_overwritten_in_place():
    """One channel is channels-last already, so torch may see the caller's own memory."""
    nodes = [
        helper.make_node("Relu", ["images"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["logits"], transB=1),
    ]
    model = network(nodes, random_weights(w=(5, 16)), shape=(1, 4, 4))
    x = images(2, (1, 4, 4))
    before = x.copy()
    logits = get_engine("torch").load(model, "fp32", 1, 2).run(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_allclose(logits, expected(model, x), atol=1e-5)


def test_torch_never_overwrites_what_is_read_later():
    """Each Relu and Add here has an operand that something else still needs, partly through a view."""
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("Identity", ["c"], ["view"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Add", ["r", "view"], ["s"]),
        helper.make_node("Relu", ["s"], ["t"]),
        helper.make_node("Add", ["t", "s"], ["u"]),
        helper.make_node("ReduceMean", ["u"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "wf"], ["logits"]),
    ]
    model = network(nodes, random_weights(w=(4, 3, 1, 1), wf=(4, 5)))
    x = images(2)
    np.testing.assert_allclose(get_engine("torch").load(model, "fp32", 1, 2).run(x), expected(model, x), atol=1e-5)


@pytest.mark.parametrize(
    ("node", "extra"),
    [
        (helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), {}),
        (helper.make_node("Conv", ["images", "wd"], ["c"], kernel_shape=[3, 3], dilations=[2, 2], pads=[2] * 4), {}),
        (helper.make_node("Conv", ["images", "wg"], ["c"], kernel_shape=[3, 3], group=3, pads=[1] * 4), {}),
        (helper.make_node("MaxPool", ["images"], ["c"], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4), {}),
        (helper.make_node("AveragePool", ["images"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), {}),
        (helper.make_node("Add", ["images", "constant"], ["c"]), {"constant": np.ones((1, 3, 1, 1), np.float32)}),
    ],
)
def test_torch_translates_attributes(node, extra):
    shapes = {"w": (3, 3, 3, 3), "wd": (3, 3, 3, 3), "wg": (3, 1, 3, 3)}
    weights = random_weights(**{name: shape for name, shape in shapes.items() if name in node.input}, wf=(3, 5))
    tail = [
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Reshape", ["g", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    model = network([node, *tail], weights | extra | {"shape": np.array([0, -1])})
    x = images(2)
    np.testing.assert_allclose(get_engine("torch").load(model, "fp32", 1, 2).run(x), expected(model, x), atol=1e-5)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (helper.make_node("Softplus", ["images"], ["c"]), "operator Softplus"),
        (
            helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[3, 3], pads=[0, 0, 1, 1]),
            "asymmetric padding",
        ),
        (helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[3, 3], auto_pad="SAME_UPPER"), "auto_pad"),
        (helper.make_node("MaxPool", ["images"], ["c"], kernel_shape=[3, 3], ceil_mode=1), "ceil_mode=1"),
    ],
)
def test_torch_refuses_what_it_does_not_translate(node, said):
    weights = random_weights(wf=(3, 5)) | (random_weights(w=(3, 3, 3, 3)) if "w" in node.input else {})
    tail = [
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    with pytest.raises(Unsupported, match=said):
        get_engine("torch").load(network([node, *tail], weights), "fp32", 1, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_that_fails_at_this_batch_is_refused_with_a_reason(name):
    """Exporters that bake the batch in: Reshape to (2, -1) cannot run three images."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["g"]),
        helper.make_node("Reshape", ["g", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    model = network(nodes, random_weights(wf=(3, 5)) | {"shape": np.array([2, 3])})
    assert get_engine(name).load(model, "fp32", 1, 2).run(images(2)).shape == (2, 5)
    with pytest.raises((Unsupported, UserError)) as error:
        get_engine(name).load(model, "fp32", 1, 3)
    assert "\n" not in str(error.value)


def test_what_the_interface_refuses():
    engine = get_engine("onnxruntime")
    with pytest.raises(UserError, match="did you mean 'openvino'"):
        get_engine("openvin")
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        engine.load(residual(), "fp8", 1, 1)
    with pytest.raises(UserError, match="at least 1"):
        engine.load(residual(), "fp32", 0, 1)
    with pytest.raises(Unsupported, match="fixed to batch 4"):
        engine.load(residual(batch=4), "fp32", 1, 1)
    with pytest.raises(UserError, match=r"takes float32 \(1, 3, 8, 8\)"):
        engine.load(residual(), "fp32", 1, 1).run(images(2))


def test_a_missing_package_names_the_extra(monkeypatch):
    engine = get_engine("openvino")
    monkeypatch.setattr(engine, "package", "no_such_package")
    assert engine.missing().endswith("pip install 'residual-distillation[openvino]'")
    with pytest.raises(UserError, match="not installed"):
        engine.load(residual(), "fp32", 1, 1)


def test_shapes_weights_and_a_fixed_batch_of_a_copy():
    model = residual()
    assert image_shape(model) == (3, 8, 8)
    assert weight_elements(model) == 8 * 27 + 8 + 8 * 72 + 64 + 45 + 4 * 8
    assert image_shape(with_batch(model, 7)) == (3, 8, 8)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_memory_is_the_peak_of_its_allocations(precision):
    """Two 1x1 convolutions on 3 -> 16 -> 16 channels, the second strided: both maps are live at the peak."""
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], kernel_shape=[1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["b"], kernel_shape=[1, 1], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["b"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    model = network(nodes, random_weights(w1=(16, 3, 1, 1), w2=(16, 16, 1, 1), wf=(16, 5)), shape=(3, 64, 64))
    info = get_engine("torch").load(model, precision, 1, 2).info()
    maps = 2 * 16 * (64 * 64 + 32 * 32) * (4 if precision == "fp32" else 2)
    assert maps <= info.feature_map_bytes <= 1.1 * maps
    assert info.weight_bytes == (16 * 3 + 256 + 80) * (4 if precision == "fp32" else 2)


@pytest.mark.parametrize(("name", "maps"), [("plain20", 2), ("resnet20", 3)])
def test_torch_keeps_the_maps_that_the_architecture_needs(name, maps):
    """In stage 1 of the CIFAR family a plain block needs input and output, a residual block its shortcut as well."""
    from rd_deploy.export.source import chain_from_name

    model = to_onnx(chain_from_name(name, size=32, classes=10))
    info = get_engine("torch").load(model, "fp32", 1, 2).info()
    assert info.feature_map_bytes == 2 * maps * 16 * 32 * 32 * 4


def test_arena_peak_is_above_what_lived_before_the_run():
    def event(live, change):
        stats = {"mem_bytes_requested_in_use": str(live), "mem_requested_in_use_delta": str(change)}
        return {"cat": "Node", "args": stats}

    assert ort_engine.arena_peak([event(1500, 500), event(1900, 400), event(1200, 100)])[0] == 900
    figure, reason = ort_engine.arena_peak([{"cat": "Node", "args": {"op_name": "Conv"}}])
    assert figure is None
    assert "no memory statistics" in reason


@pytest.mark.parametrize("name", ENGINES)
def test_info_has_a_figure_or_a_reason(name):
    info = get_engine(name).load(residual(), "fp32", 1, 3).info()
    assert (info.name, info.precision, info.batch, info.threads) == (name, "fp32", 3, 1)
    assert info.version[0].isdigit()
    assert info.feature_map_how
    if info.feature_map_bytes is not None:
        assert info.feature_map_bytes >= 3 * 8 * 8 * 8 * 4  # at least the stem's output
