"""Engines: one artefact, the same numbers everywhere, and reasons instead of silent fallbacks."""

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rd_deploy.common import UserError
from rd_deploy.engines import ENGINES, Unsupported, get_engine
from rd_deploy.engines import onnxruntime as ort_engine
from rd_deploy.engines.base import image_shape, weight_elements, with_batch
from rd_deploy.export.onnx import to_onnx

ON_CPU = [name for name, engine in ENGINES.items() if engine.device == "cpu"]


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
@pytest.mark.parametrize("name", ON_CPU)
def test_fp32_equals_the_onnx_reference(name, batch):
    x = images(batch)
    session = get_engine(name).load(residual(), "fp32", threads=1, batch=batch)
    np.testing.assert_allclose(session.run(x), expected(residual(), x), atol=2e-5)


@pytest.mark.parametrize("name", ON_CPU)
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

    monkeypatch.setattr(openvino, "executed_arithmetic", lambda compiled: ["bf16", "f32"])
    with pytest.raises(Unsupported, match="f32 instead of bf16"):
        get_engine("openvino").load(residual(), "bf16", 1, 1)


def test_openvino_runs_the_threads_it_is_told_or_says_so():
    """It would take fewer in silence: more than the machine has must be refused."""
    with pytest.raises(Unsupported, match=r"OpenVINO runs \d+ threads instead of"):
        get_engine("openvino").load(residual(), "fp32", os.cpu_count() + 1, 1)
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        session = get_engine("openvino").load(residual(), "fp32", threads, 1)
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == threads


def test_openvino_without_arithmetic_is_refused():
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["g"]),
        helper.make_node("Flatten", ["g"], ["logits"]),
    ]
    with pytest.raises(Unsupported, match="no convolution and no MatMul"):
        get_engine("openvino").load(network(nodes, {}, classes=3), "bf16", 1, 1)


@pytest.mark.parametrize("name", ON_CPU)
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


@pytest.mark.parametrize("name", ON_CPU)
def test_a_graph_that_fails_at_this_batch_is_refused_with_a_reason(name):
    """Exporters that bake the batch in: Reshape to (2, 4) cannot run three images."""
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Reshape", ["g", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    model = network(nodes, random_weights(w=(4, 3, 1, 1), wf=(4, 5)) | {"shape": np.array([2, 4])})
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
    assert engine.missing().endswith("in the checkout: pip install '.[openvino]'")
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
    session = get_engine("torch").load(model, precision, 1, 2)
    tensors, allocator = session.feature_maps()
    maps = 2 * 16 * (64 * 64 + 32 * 32) * (4 if precision == "fp32" else 2)
    assert tensors.peak_bytes == maps
    # Without instructions for bf16, torch copies the second convolution's input before it multiplies; with AMX a part.
    supported, tiles = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.cpu._is_amx_tile_supported()
    copied = 0 if precision == "fp32" or (supported and not tiles) else 2 * 16 * 32 * 32 * 2
    assert maps + (0 if supported else copied) <= allocator.peak_bytes <= 1.1 * maps + copied
    assert session.weight_bytes == (16 * 3 + 256 + 80) * (4 if precision == "fp32" else 2)


@pytest.mark.parametrize(("name", "maps"), [("plain20", 2), ("resnet20", 3)])
def test_torch_keeps_the_maps_that_the_architecture_needs(name, maps):
    """In stage 1 of the CIFAR family a plain block needs input and output, a residual block its shortcut as well."""
    from rd_deploy.export.source import chain_from_name

    model = to_onnx(chain_from_name(name, size=32, classes=10))
    tensors, allocator = get_engine("torch").load(model, "fp32", 1, 2).feature_maps()
    assert tensors.peak_bytes == 2 * maps * 16 * 32 * 32 * 4
    assert allocator.peak_bytes >= tensors.peak_bytes
    assert (tensors.source, allocator.source) == ("torch tensors", "torch allocator")


def test_torch_counts_scratch_that_no_tensor_shows(monkeypatch):
    """An operator that allocates a megabyte and frees it again: the allocator saw it, the tensors afterwards do not."""
    import torch

    from rd_deploy.engines import torch as torch_engine

    def scratch_relu(node, dynamic, free):
        return lambda x: x.relu() + torch.zeros(2**18).sum()

    monkeypatch.setitem(torch_engine.TRANSLATIONS, "Relu", scratch_relu)
    tensors, allocator = get_engine("torch").load(residual(), "fp32", 1, 1).feature_maps()
    assert tensors.peak_bytes < 2**20 <= allocator.peak_bytes


def kernel(requested: tuple[int, int], in_use: tuple[int, int], peak: int) -> dict:
    """A profile's event: bytes after the kernel and their change, as requested and as the arena holds them."""
    stats = {
        "mem_bytes_requested_in_use": requested[0],
        "mem_requested_in_use_delta": requested[1],
        "mem_bytes_in_use": in_use[0],
        "mem_in_use_delta": in_use[1],
        "mem_in_use_peak": peak,
    }
    return {"cat": "Node", "args": {key: str(value) for key, value in stats.items()}}


def test_arena_figures_are_above_what_lived_before_the_run():
    first = kernel((1500, 500), (1600, 512), 1600)
    events = [first, kernel((1900, 400), (2048, 448), 2300), kernel((1200, -700), (1300, -748), 2300)]
    requested, arena = ort_engine.arena_figures(events)
    assert (requested.peak_bytes, arena.peak_bytes) == (900, 2300 - 1088)
    assert "patterns off" in requested.how


def test_an_arena_peak_from_loading_the_network_is_not_given():
    """The peak was there before the first kernel ended and never grew: it may be that of packing weights."""
    events = [kernel((1500, 500), (1600, 512), 5000), kernel((1900, 400), (2048, 448), 5000)]
    requested, arena = ort_engine.arena_figures(events)
    assert requested.peak_bytes == 900
    assert arena.peak_bytes is None
    assert "loading" in arena.how


def test_a_profile_without_memory_statistics_is_a_reason():
    (figure,) = ort_engine.arena_figures([{"cat": "Node", "args": {"op_name": "Conv"}}])
    assert figure.peak_bytes is None
    assert "no memory statistics" in figure.how


@pytest.mark.parametrize("name", ON_CPU)
def test_accounts_have_a_figure_or_a_reason(name):
    figures = get_engine(name).load(residual(), "fp32", 1, 3).feature_maps()
    assert len({figure.source for figure in figures}) == len(figures) == {"openvino": 1, "native": 3}.get(name, 2)
    for figure in figures:
        assert figure.source.startswith(name)
        assert figure.how
        if name == "openvino":
            assert figure.peak_bytes is None
        else:
            assert figure.peak_bytes >= 3 * 8 * 4 * 4 * 4  # at least the pooled map, from which the shortcut starts


def test_an_account_that_fails_is_a_reason(monkeypatch):
    from rd_deploy.engines.torch import TorchSession

    def failing(self, x):
        raise AttributeError("no kineto_results")

    monkeypatch.setattr(TorchSession, "_allocator", failing)
    (figure,) = get_engine("torch").load(residual(), "fp32", 1, 1).feature_maps()
    assert figure.peak_bytes is None
    assert "no kineto_results" in figure.how


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_that_are_not_float32_are_refused(kind):
    model = residual()
    first = model.graph.initializer[0]
    first.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(first).astype(kind), first.name))
    with pytest.raises(UserError, match="give the fp32 export"):
        get_engine("onnxruntime").load(model, "fp32", 1, 1)


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """One weight in int8 with a float32 scale, as Q/DQ exports have it; all the rest stays float32."""
    first = model.graph.initializer[0]
    name = first.name
    first.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(first) * 50).astype(np.int8), "stored"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "scale8"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["stored", "scale8"], [name]))
    onnx.checker.check_model(model)
    return model


def test_quantised_files_are_refused():
    """Their times would pass for float32's; so would those of a file with int8 weights and nodes of its own kind."""
    model = quantised(residual())
    with pytest.raises(UserError, match=r"is quantised \(it has DequantizeLinear\); give the fp32 export"):
        get_engine("onnxruntime").load(model, "fp32", 1, 1)
    model.graph.node[0].op_type = "Cast"
    with pytest.raises(UserError, match=r"holds int8 weights \('stored'\); give the fp32 export"):
        get_engine("onnxruntime").load(model, "fp32", 1, 1)


def test_torch_refuses_a_sum_of_constants():
    nodes = [
        helper.make_node("Add", ["one", "two"], ["three"]),
        helper.make_node("Add", ["images", "three"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    model = network(nodes, random_weights(one=(1, 3, 1, 1), two=(1, 3, 1, 1), wf=(3, 5)))
    with pytest.raises(Unsupported, match="Add of constants"):
        get_engine("torch").load(model, "fp32", 1, 1)


@pytest.mark.parametrize("method", ["_load", "_run"])
def test_whatever_an_engine_raises_is_a_reason(method, monkeypatch):
    from rd_deploy.engines.torch import Torch, TorchSession

    def failing(*arguments):
        raise IndexError("list index out of range\nand more")

    monkeypatch.setattr(Torch if method == "_load" else TorchSession, method, failing)
    with pytest.raises(Unsupported, match=r"^torch cannot run the model: list index out of range$"):
        get_engine("torch").load(residual(), "fp32", 1, 1)


def test_a_broken_installation_is_a_reason(monkeypatch, tmp_path):
    """A package that is there, but whose import fails, as binaries for another machine do."""
    (tmp_path / "broken_engine.py").write_text("raise OSError('libwhatever.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = get_engine("openvino")
    monkeypatch.setattr(engine, "package", "broken_engine")
    assert "libwhatever.so.1" in engine.missing()
    (tmp_path / "half_engine.py").write_text("import no_such_dependency")
    monkeypatch.setattr(engine, "package", "half_engine")
    assert "No module named 'no_such_dependency'" in engine.missing()
