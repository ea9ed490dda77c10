"""From ONNX back to a chain: exactly what was exported, the same function for others' files, and what is refused."""

import numpy as np
import onnx
import pytest
from chains import basics, bottlenecks, reference
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError
from rd_deploy.export.onnx import to_onnx


def model_of(*nodes, classes=5, opset=17, batch="N", **weights) -> onnx.ModelProto:
    """Nodes from ``x`` (N, 4, 6, 6) to ``features``, then a global pool and a classifier to ``logits``."""
    weights.setdefault("wf", values(classes, 4))
    tail = [
        op("GlobalAveragePool", ["features"], ["g"]),
        op("Flatten", ["g"], ["f"]),
        op("Gemm", ["f", "wf"], ["logits"], transB=1),
    ]
    return checked([*nodes, *tail], weights, classes, opset, batch)


def checked(nodes, weights, classes=5, opset=17, batch="N") -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def op(kind: str, inputs: list[str], outputs: list[str], name: str | None = None, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, name, **attributes)


def values(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv(source: str, output: str, weight="w", **attributes):
    return op("Conv", [source, weight], [output], **{"kernel_shape": [1, 1], **attributes})


def relu(source: str, output: str):
    return op("Relu", [source], [output])


def assert_same_function(model: onnx.ModelProto) -> None:
    x = values(3, 4, 6, 6, seed=5)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(reference(chain_from_onnx(model), x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("make", [basics, bottlenecks])
def test_an_export_comes_back_as_it_was(make, shortcuts):
    """All but the provenance, which the sidecar has."""
    chain = make(shortcuts=shortcuts)
    back = chain_from_onnx(to_onnx(chain))
    assert [type(step) for step in back.steps] == [type(step) for step in chain.steps]
    assert [step.name for step in back.steps] == [step.name for step in chain.steps]
    assert (back.sha256(), back.classes, back.preprocessing) == (chain.sha256(), chain.classes, chain.preprocessing)
    assert to_onnx(back).SerializeToString(deterministic=True) == to_onnx(chain).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", ["plain20", "resnet20", "resnet50"])
def test_the_exports_of_our_networks_come_back(name):
    from rd_deploy.export.source import chain_from_name

    model = to_onnx(chain_from_name(name, size=32, classes=10))
    again = to_onnx(chain_from_onnx(model))
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_batch_normalisation_is_folded():
    nodes = [
        conv("x", "c", pads=[1] * 4, kernel_shape=[3, 3]),
        op("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"], epsilon=1e-3),
        relu("n", "features"),
    ]
    parts = {name: values(4, seed=index) for index, name in enumerate(("scale", "shift", "mean"))}
    model = model_of(*nodes, w=values(4, 4, 3, 3), variance=np.linspace(0.5, 2, 4, dtype=np.float32), **parts)
    assert_same_function(model)
    assert len(chain_from_onnx(model).steps) == 3


@pytest.mark.parametrize("operands", [["a", "b"], ["b", "a"]])
def test_of_two_convolutions_the_later_one_adds(operands):
    nodes = [
        conv("x", "a"),
        conv("x", "b", "v"),
        op("Add", operands, ["s"]),
        relu("s", "features"),
    ]
    model = model_of(*nodes, w=values(4, 4, 1, 1), v=values(4, 4, 1, 1, seed=1))
    assert_same_function(model)
    assert [step.name for step in chain_from_onnx(model).steps][:2] == ["a", "b"]
    assert chain_from_onnx(model).steps[1].add == "a"


def test_a_convolution_waits_for_what_it_adds():
    nodes = [
        conv("x", "stem"),
        conv("stem", "a", "v"),
        op("MaxPool", ["stem"], ["p"], kernel_shape=[3, 3], pads=[1] * 4),
        op("Add", ["a", "p"], ["features"]),
    ]
    model = model_of(*nodes, w=values(4, 4, 1, 1), v=values(4, 4, 1, 1, seed=1))
    assert_same_function(model)
    assert [step.name for step in chain_from_onnx(model).steps][:3] == ["stem", "p", "a"]


def test_a_sum_that_others_read_too():
    nodes = [
        conv("x", "c1"),
        relu("c1", "r1"),
        conv("r1", "c2", "v"),
        op("Add", ["r1", "c2"], ["s"]),
        relu("s", "r2"),
        conv("r2", "c3", "v"),
        op("Add", ["c3", "r2"], ["features"]),
    ]
    assert_same_function(model_of(*nodes, w=values(4, 4, 1, 1), v=values(4, 4, 1, 1, seed=1)))


def test_names_that_are_the_same_tensor():
    """An Identity of a weight, and one of a map, behind which another reader must not be forgotten."""
    nodes = [
        op("Identity", ["w"], ["w2"]),
        conv("x", "c1", "w2"),
        op("Identity", ["c1"], ["view"]),
        conv("view", "c2", "v"),
        op("Add", ["c2", "c1"], ["features"]),
    ]
    weights = {"w": values(4, 4, 1, 1), "v": values(4, 4, 1, 1, seed=1)}
    assert_same_function(model_of(*nodes, **weights))
    nodes[-1:] = [relu("view", "r"), op("Add", ["c2", "c1"], ["s"]), conv("s", "features", "v")]
    with pytest.raises(UserError, match="no Relu but right after a convolution"):
        chain_from_onnx(model_of(*nodes, **weights))


POOL = op("GlobalAveragePool", ["c"], ["g"])


@pytest.mark.parametrize(
    ("tail", "opset", "batch"),
    [
        ([op("ReduceMean", ["c"], ["f"], axes=[2, 3], keepdims=0)], 17, "N"),
        ([op("ReduceMean", ["c", "axes"], ["g"]), op("Flatten", ["g"], ["f"])], 18, "N"),
        ([POOL, op("Reshape", ["g", "free"], ["f"])], 17, "N"),
        ([POOL, op("Reshape", ["g", "fixed"], ["f"])], 17, 3),
        (
            [
                POOL,
                op("Constant", [], ["k"], value=numpy_helper.from_array(np.array([-1, 4]))),
                op("Reshape", ["g", "k"], ["f"]),
            ],
            17,
            "N",
        ),
    ],
)
def test_ways_to_write_the_global_pool(tail, opset, batch):
    weights = {"w": values(4, 4, 1, 1), "wf": values(4, 5), "bf": values(1, 5, seed=2)}
    weights |= {"axes": np.array([-1, -2]), "free": np.array([0, -1]), "fixed": np.array([3, 4])}
    used = {name for node in tail for name in node.input} | {"w", "wf", "bf"}
    nodes = [conv("x", "c"), *tail, op("Gemm", ["f", "wf", "bf"], ["logits"])]
    model = checked(nodes, {name: array for name, array in weights.items() if name in used}, opset=opset, batch=batch)
    assert_same_function(model)


def test_a_foreign_file_has_no_preprocessing_and_numbered_classes():
    chain = chain_from_onnx(model_of(conv("x", "features"), w=values(4, 4, 1, 1)))
    assert chain.classes == ("0", "1", "2", "3", "4")
    assert (set(chain.preprocessing.mean), set(chain.preprocessing.std)) == ({0.0}, {1.0})
    assert chain.name == "foreign"


W, V = {"w": values(4, 4, 1, 1)}, {"v": values(4, 4, 1, 1, seed=1)}


SUM = op("Add", ["c", "d"], ["features"])


@pytest.mark.parametrize(
    ("said", "nodes", "weights"),
    [
        ("no Sigmoid", [op("Sigmoid", ["x"], ["features"], "act")], {}),
        ("group=2", [conv("x", "features", group=2)], {"w": values(4, 2, 1, 1)}),
        ("dilations=", [conv("x", "features", dilations=[2, 2], kernel_shape=[3, 3])], {"w": values(4, 4, 3, 3)}),
        ("auto_pad=", [conv("x", "features", auto_pad="SAME_UPPER")], W),
        ("pads=", [conv("x", "features", pads=[1, 1, 0, 0])], W),
        ("strides=", [conv("x", "features", strides=[1, 2])], W),
        ("no Relu but", [relu("x", "r"), conv("r", "features")], W),
        ("no Relu but", [conv("x", "c"), relu("c", "r"), relu("r", "features")], W),
        ("no Add of anything but", [op("Add", ["x", "x"], ["s"]), conv("s", "features")], W),
        ("'d', which is no feature map", [conv("x", "c"), SUM], W | {"d": values(4, 1, 1)}),
        ("cannot add", [conv("x", "c"), conv("x", "d", "v", strides=[6, 6]), SUM], W | V),
        ("ceil_mode=1", [conv("x", "c"), op("MaxPool", ["c"], ["features"], kernel_shape=[2, 2], ceil_mode=1)], W),
        ("nothing reads unused", [conv("x", "unused"), conv("x", "features", "v")], W | V),
        ("no Flatten but", [conv("x", "c"), op("Flatten", ["c"], ["f2"]), op("Identity", ["c"], ["features"])], W),
    ],
)
def test_what_is_refused(said, nodes, weights):
    with pytest.raises(UserError, match=said) as error:
        chain_from_onnx(model_of(*nodes, **weights))
    assert "\n" not in str(error.value)


def test_a_weight_that_is_computed_is_refused():
    nodes = [conv("x", "c"), conv("x", "features", "c", kernel_shape=[6, 6])]
    with pytest.raises(UserError, match="whose 'c' is computed"):
        chain_from_onnx(model_of(*nodes, batch=4, **W))


def test_a_reshape_for_another_batch_is_refused():
    nodes = [conv("x", "c"), POOL, op("Reshape", ["g", "shape"], ["f"]), op("Gemm", ["f", "wf"], ["logits"])]
    model = checked(nodes, W | {"wf": values(4, 5), "shape": np.array([2, 4])}, batch="N")
    with pytest.raises(UserError, match=r"no Reshape to \[2, 4\]"):
        chain_from_onnx(model)


def test_a_network_that_ends_elsewhere_is_refused():
    nodes = [conv("x", "c"), op("ReduceMean", ["c"], ["logits"], axes=[2, 3], keepdims=0)]
    with pytest.raises(UserError, match=r"ends in a linear layer, this network in a GlobalAveragePool \(logits\)"):
        chain_from_onnx(checked(nodes, {"w": values(5, 4, 1, 1)}))


def short_weight() -> onnx.ModelProto:
    """A weight with fewer bytes than its shape says."""
    model = model_of(conv("x", "features"), **W)
    model.graph.initializer[0].raw_data = bytes(8)
    return model


def wide_bias() -> onnx.ModelProto:
    """A bias for each of three images, which ONNX allows at that batch."""
    nodes = [conv("x", "c"), POOL, op("Flatten", ["g"], ["f"]), op("Gemm", ["f", "wf", "bf"], ["logits"])]
    return checked(nodes, W | {"wf": values(4, 5), "bf": values(3, 5)}, batch=3)


def all_axes() -> onnx.ModelProto:
    """A mean whose axes are left out, which are all of them then."""
    nodes = [conv("x", "c"), op("ReduceMean", ["c", ""], ["m"]), op("Flatten", ["m"], ["f"])]
    return checked([*nodes, op("Gemm", ["f", "wf"], ["logits"])], W | {"wf": values(1, 5)}, opset=18, batch=1)


@pytest.mark.parametrize("make", [short_weight, wide_bias, all_axes])
def test_a_damaged_or_odd_file_is_one_line(make):
    with pytest.raises(UserError, match=r"the ONNX file is damaged, or not a chain \(.+\); export it again") as error:
        chain_from_onnx(make())
    assert "\n" not in str(error.value)
