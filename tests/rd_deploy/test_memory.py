"""The feature-map ledger against hand counts, a brute-force simulation and hostile files."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rd_deploy.common import UserError
from rd_deploy.memory import Ledger, ledger, load_model

DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


class Builder:
    """Writes ONNX graphs by hand. Weights are ConstantOfShape nodes: full-size shapes, files of a few kilobytes."""

    def __init__(self, unfused: bool = False, data_type: int = TensorProto.FLOAT):
        self.nodes, self.initializers, self.unfused, self.data_type = [], [], unfused, data_type
        self.count = itertools.count()

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes) -> str:
        names = [f"t{next(self.count)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names[0]

    def weight(self, *shape: int) -> str:
        name = f"w{next(self.count)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))
        return self.op("ConstantOfShape", name, value=helper.make_tensor("v", self.data_type, [1], [0]))

    def conv(self, x: str, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, name: str = "") -> str:
        weights = [self.weight(c_out, c_in, kernel, kernel)]
        weights += [] if self.unfused else [self.weight(c_out)]
        x = self.op("Conv", x, *weights, name=name, strides=[stride] * 2, pads=[kernel // 2] * 4)
        return self.op("BatchNormalization", x, *(self.weight(c_out) for _ in range(4))) if self.unfused else x

    def model(self, shape: Sequence, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("image", self.data_type, shape)],
            [helper.make_tensor_value_info(name, self.data_type, ["N"]) for name in outputs],
            self.initializers,
        )
        for value in graph.output:  # of unknown rank is not valid ONNX; of unknown dimensions is
            del value.type.tensor_type.shape.dim[:]
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network(depth: int, shortcuts: bool, unfused: bool = False, batch: int | str = "N", swap: bool = False, **options):
    """A ResNet v1.5 of 224x224 images, or its plain counterpart. ``swap``: the projection comes first in the file."""
    block, counts = DEPTHS[depth]
    builder = Builder(unfused, **options)
    x = builder.op("Relu", builder.conv("image", 3, 64, 7, 2, name="stem"))
    x = builder.op("MaxPool", x, name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    c_in = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        c_out = width * (4 if block == "bottleneck" else 1)
        for number in range(count):
            stride, name = 2 if number == 0 and stage else 1, f"layer{stage + 1}.{number}"
            project = shortcuts and (stride > 1 or c_in != c_out)
            shortcut = builder.conv(x, c_in, c_out, 1, stride, f"{name}.downsample") if project and swap else x
            if block == "bottleneck":
                y = builder.op("Relu", builder.conv(x, c_in, width, name=f"{name}.reduce"))
                y = builder.op("Relu", builder.conv(y, width, width, 3, stride, name=f"{name}.conv3x3"))
                y = builder.conv(y, width, c_out, name=f"{name}.expand")
            else:
                y = builder.op("Relu", builder.conv(x, c_in, width, 3, stride, name=f"{name}.conv1"))
                y = builder.conv(y, width, c_out, 3, name=f"{name}.conv2")
            if project and not swap:
                shortcut = builder.conv(x, c_in, c_out, 1, stride, f"{name}.downsample")
            x = builder.op("Relu", builder.op("Add", y, shortcut) if shortcuts else y)
            c_in = c_out
    x = builder.op("Flatten", builder.op("GlobalAveragePool", x))
    x = builder.op("Gemm", x, builder.weight(1000, c_in), builder.weight(1000), transB=1)
    return builder.model([batch, 3, 224, 224], x)


def elements(depth: int, shortcuts: bool, policy: str, **options) -> Ledger:
    """A ledger that counts elements: one byte each."""
    return ledger(network(depth, shortcuts, **options), element_bytes=1, policy=policy)


# Hand counts at 224x224, in units of one 64x56x56 map: u = 64 * 56 * 56 = 200,704 elements.
# Stem: image 3x224x224 = 0.75 u, its output 64x112x112 = 4 u, pooled 1 u. So stem 4.75 u, pool 4 + 1 = 5 u.
# Stage 1 of a bottleneck net, inner maps 64x56x56 = 1 u, wide ones 256x56x56 = 4 u.
#   separate: the last convolution of blocks 2, 3 reads 1 u, adds the shortcut, 4 u, and writes 4 u: 9 u, the peak.
#   in-place: it writes over the shortcut: 1 + 4 = 5 u; while the 3x3 runs, 4 u wait: 4 + 1 + 1 = 6 u.
# Entry of stage 2: reduce writes 128x56x56 = 2 u, the 3x3 of stride 2 128x28x28 = 0.5 u, expand 512x28x28 = 2 u.
#   in-place, projection last: reduce 4 + 2 = 6 u; 3x3 4 + 2 + 0.5 = 6.5 u, the peak; expand 4 + 0.5 + 2 = 6.5 u;
#   projection, onto expand's result: 4 + 2 = 6 u. (Projection first needs 4 + 2 + 2 = 8 u during reduce.)
#   plain: reduce 4 + 2 = 6 u, the peak, since stage 1 needs 4 + 1 = 5 u at most.
# Stage 1 of a basic net: three maps of 1 u at most: 3 u. So the pool's 5 u are the peak with and without shortcuts.
UNIT = 64 * 56 * 56
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


def test_first_identity_block_by_hand():
    """(live, held by the shortcut) of layer1.1, in units: the wide input waits during the 3x3 only for the addition."""
    expected = {
        "separate": [(4 + 1, 0), (4 + 1 + 1, 4), (4 + 1 + 4, 4)],
        "in-place": [(4 + 1, 0), (4 + 1 + 1, 4), (1 + 4, 0)],  # the shortcut's buffer is the sum's
    }
    for policy, counts in expected.items():
        steps = [step for step in elements(50, True, policy).steps if step.name.startswith("layer1.1.")]
        assert [(step.live_bytes / UNIT, step.shortcut_bytes / UNIT) for step in steps] == counts
        assert [step.op for step in steps] == ["Conv+Relu", "Conv+Relu", "Conv+Add+Relu"]
        assert [(step.read_bytes / UNIT, step.written_bytes / UNIT) for step in steps] == [(4, 1), (1, 1), (1 + 4, 4)]


def test_projection_block_by_hand():
    """(live, held by the shortcut) of layer2.0 in units: 4 u in, 2 u out, the branches in their best order."""
    expected = {
        # The projection accumulates onto the main path's 2 u; its input is all that the shortcut holds.
        "in-place": {
            "reduce": (4 + 2, 0),
            "conv3x3": (4 + 2 + 0.5, 4),
            "expand": (4 + 0.5 + 2, 4),
            "downsample": (4 + 2, 4),
        },
        # Projection before expand: then the 4 u are gone before there are three maps of the block's size (else 8 u).
        "separate": {
            "reduce": (4 + 2, 0),
            "conv3x3": (4 + 2 + 0.5, 4),
            "downsample": (4 + 0.5 + 2, 4 + 2),
            "expand": (0.5 + 2 + 2, 2),
        },
    }
    for policy, counts in expected.items():
        steps = [step for step in elements(50, True, policy).steps if step.name.startswith("layer2.0.")]
        found = {step.name.split(".")[-1]: (step.live_bytes / UNIT, step.shortcut_bytes / UNIT) for step in steps}
        assert list(found.items()) == list(counts.items()), policy


def test_what_a_projection_adds_counts_as_held_when_it_runs_last():
    """layer1.0, separate, where the order of the branches does not matter (9 u either way): in + main path + sum."""
    (last,) = (step for step in elements(50, True, "separate").steps if step.name == "layer1.0.downsample")
    assert (last.op, last.live_bytes / UNIT, last.shortcut_bytes / UNIT) == ("Conv+Add+Relu", 1 + 4 + 4, 1 + 4)


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


def test_shortcut_share_is_about_the_papers_40_percent_when_sums_are_new_tensors():
    assert elements(50, True, "separate").shortcut_share == pytest.approx(0.397, abs=5e-4)
    assert elements(50, True, "in-place").shortcut_share == pytest.approx(0.293, abs=5e-4)
    assert elements(50, False, "separate").shortcut_share == 0


def test_batch_and_element_size_scale_everything():
    one = elements(18, True, "separate")
    for batch in ("N", 2, 1):  # dynamic, and two fixed batches that are changed
        model = network(18, True, batch=batch, data_type=TensorProto.FLOAT16)
        big = ledger(model, batch=3, element_bytes=2)
        assert [step.live_bytes for step in big.steps] == [6 * step.live_bytes for step in one.steps]
    assert (big.batch, big.element_bytes, big.policy) == (3, 2, "separate")


def test_views_cost_nothing_and_pointwise_operators_overwrite_what_dies():
    builder = Builder()
    pooled = builder.op("MaxPool", "image", kernel_shape=[1, 1])
    view = builder.op("Identity", builder.op("Dropout", pooled, outputs=2))
    activated = builder.op("Sigmoid", view)  # overwrites the pooled map: nothing else reads it
    branch = builder.op("Tanh", activated)  # cannot: the product reads it too
    model = builder.model(["N", 4, 2, 2], builder.op("Mul", activated, branch))
    for policy, product in (("separate", 48), ("in-place", 32)):
        found = ledger(model, element_bytes=1, policy=policy)
        assert [step.op for step in found.steps] == ["MaxPool", "Sigmoid", "Tanh", "Mul"]
        assert [step.live_bytes for step in found.steps] == [32, 16, 32, product]


def test_integers_keep_their_size_and_shapes_computed_from_shapes_are_constants():
    builder = Builder()
    top = builder.op("ArgMax", "image", axis=1, keepdims=1)  # int64
    shape = builder.op(
        "Concat", builder.op("Shape", "image", start=0, end=1), builder.op("Constant", value_ints=[-1]), axis=0
    )
    model = builder.model(["N", 4, 3, 3], builder.op("Reshape", top, shape))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    found = ledger(model, batch=2, element_bytes=2)
    assert [(step.op, step.live_bytes) for step in found.steps] == [("ArgMax", 2 * (4 * 9 * 2 + 9 * 8))]


def test_shapes_computed_by_arithmetic_that_onnx_does_not_infer_are_folded():
    """Reshape to (N, 2, C / 2, 3, 3), as a traced channel shuffle writes it; ONNX infers no division."""
    builder = Builder()
    shape = builder.op("Shape", builder.op("Relu", "image"))
    batch, channels = (builder.op("Gather", shape, builder.op("Constant", value_ints=[axis])) for axis in (0, 1))
    half = builder.op("Div", channels, builder.op("Constant", value_ints=[2]))
    size = builder.op("Constant", value_ints=[3, 3])
    target = builder.op("Concat", batch, builder.op("Constant", value_ints=[2]), half, size, axis=0)
    x = builder.op("Transpose", builder.op("Reshape", "t0", target), perm=[0, 2, 1, 3, 4])
    found = ledger(builder.model(["N", 6, 3, 3], x), batch=2, element_bytes=1)
    assert [(step.op, step.live_bytes) for step in found.steps] == [("Relu", 216), ("Transpose", 216)]


def test_an_operator_of_another_domain_is_a_step_with_the_shape_that_the_file_gives():
    builder = Builder()
    model = builder.model(["N", 4], builder.op("Relu", "y"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.insert(0, helper.make_node("Relu", ["image"], ["y"], domain="com.example"))
    with pytest.raises(UserError, match="shape of tensor 'y' cannot be known"):
        ledger(model)
    for batch, fits in (("N", True), (1, False), ("M", False)):
        value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])
        del model.graph.value_info[:]
        model.graph.value_info.append(value)
        if fits:
            steps = ledger(model, batch=2, element_bytes=1).steps
            assert [(step.op, step.live_bytes) for step in steps] == [("com.example.Relu", 16), ("Relu", 8)]
        else:
            with pytest.raises(UserError, match="shape of tensor 'y' cannot be known"):
                ledger(model, batch=2)


def test_a_part_too_wide_to_search_keeps_the_files_order_and_says_so(monkeypatch):
    monkeypatch.setattr("rd_deploy.memory.MAX_SEARCH", 10)
    found = elements(50, True, "in-place", swap=True)
    assert not found.best_order
    assert found.peak_bytes == 8 * UNIT  # the projection before reduce, as the file has it


# A brute force of its own: random fused programs, every order of their steps, births and deaths of tensors.


@dataclass(frozen=True)
class Planned:
    """A step of a random program. Tensor 0 is the image, tensor n is what step n makes. ``addend``: a tensor."""

    kind: str
    sources: tuple[int, ...]
    addend: int | None = None


@dataclass(frozen=True)
class Program:
    steps: dict[int, Planned]
    channels: list[int]  # of each tensor, the image first; all have one pixel

    @property
    def outputs(self) -> set[int]:
        """Every tensor that no step reads."""
        return set(self.steps) - {name for step in self.steps.values() for name in (*step.sources, step.addend)}

    def model(self) -> onnx.ModelProto:
        builder, names = Builder(), ["image"]
        for number, step in self.steps.items():
            sources = [names[source] for source in step.sources]
            if step.kind == "conv":
                name = builder.conv(sources[0], self.channels[step.sources[0]], self.channels[number])
                names.append(name if step.addend is None else builder.op("Add", name, names[step.addend]))
            else:
                attributes = {"MaxPool": {"kernel_shape": [1, 1]}, "Concat": {"axis": 1}}.get(step.kind, {})
                names.append(builder.op(step.kind, *sources, **attributes))
        return builder.model(["N", self.channels[0], 1, 1], *(names[number] for number in sorted(self.outputs)))

    def partners(self) -> dict[int, int]:
        """Pairs of convolutions whose results are only added to each other: whichever runs last adds."""
        readers = [name for step in self.steps.values() for name in (*set(step.sources), step.addend)]
        pairs = {}
        for number, step in self.steps.items():
            other = self.steps.get(step.addend)
            if other and other.kind == "conv" and other.addend is None and readers.count(step.addend) == 1:
                pairs |= {number: step.addend, step.addend: number}
        return pairs

    def orders(self) -> Iterator[tuple[int, ...]]:
        """Every order in which each step comes after the makers of what it reads."""
        pairs = self.partners()
        needs = {
            number: {*step.sources, step.addend} - {None, 0, pairs.get(number)} for number, step in self.steps.items()
        }
        needs = {number: read | {pairs[name] for name in read if name in pairs} for number, read in needs.items()}
        for order in itertools.permutations(self.steps):
            if all(needs[number] <= set(order[:place]) for place, number in enumerate(order)):
                yield order

    def peak(self, order: tuple[int, ...], policy: str) -> int:
        """The most elements that are live in this order."""
        pairs, births, deaths, saved = self.partners(), {0: 0}, {}, []
        for time, number in enumerate(order):
            step, added, result = self.steps[number], self.steps[number].addend, number
            if number in pairs:
                is_last = pairs[number] in order[:time]
                adds, total = step.addend is not None, max(number, pairs[number])  # the later one names the sum
                added = (min(number, pairs[number]) if adds else -total) if is_last else None
                result = total if is_last else (-total if adds else number)  # -total: what the later one makes alone
            births[result] = time
            deaths |= dict.fromkeys((*step.sources, *([] if added is None else [added])), time)
            may = step.sources if step.kind == "Sigmoid" else () if added in (None, *step.sources) else (added,)
            saved += [(time, name) for name in may if step.kind == "Sigmoid" or policy == "in-place"]
        deaths |= dict.fromkeys(self.outputs, len(order))
        overwritten = {(time, name) for time, name in saved if deaths[name] == time and name != 0}
        return max(
            sum(
                self.channels[abs(name)]
                for name, birth in births.items()
                if birth <= time <= deaths[name] and (time, name) not in overwritten
            )
            for time in range(len(order))
        )


@st.composite
def programs(draw) -> Program:
    steps, channels = {}, [draw(st.integers(1, 3))]
    for number in range(1, draw(st.integers(2, 6)) + 1):
        tensor = st.integers(max(0, number - 4), number - 1)
        kind = draw(st.sampled_from(["conv", "conv", "sum", "sum", "MaxPool", "Sigmoid", "Concat"]))
        source, other = draw(tensor), draw(tensor)
        if kind == "sum":
            steps[number] = Planned("conv", (source,), other)
        elif kind == "Concat":
            steps[number] = Planned(kind, (source, other))
        elif kind == "Sigmoid" and source and steps[source].kind == "conv":
            steps[number] = Planned("MaxPool", (source,))  # a pointwise operator would be fused into the convolution
        else:
            steps[number] = Planned(kind, (source,))
        sizes = {"conv": draw(st.integers(1, 4)), "sum": channels[other], "Concat": channels[source] + channels[other]}
        channels.append(sizes.get(kind, channels[source]))
    return Program(steps, channels)


@settings(max_examples=150, deadline=None)
@given(programs())
def test_peak_is_the_lowest_over_all_orders(program):
    for policy in ("separate", "in-place"):
        best = min(program.peak(order, policy) for order in program.orders())
        found = ledger(program.model(), element_bytes=1, policy=policy)
        assert (found.peak_bytes, found.best_order) == (best, True)
        assert len(found.steps) == len(program.steps)


# Files ---------------------------------------------------------------------------------------------------------------


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_load_model_gives_what_was_saved(tmp_path):
    model = network(18, True)
    assert load_model(save(model, tmp_path / "net.onnx")) == model


def test_weights_in_a_file_beside_the_model_are_found_and_not_read(tmp_path):
    model = with_external_weight("weights.bin", length=8 * 3 * 4)
    path = save(model, tmp_path / "net.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(8 * 3 * 4))
    assert ledger(load_model(path), element_bytes=1).peak_bytes == 3 * 4 + 8 * 4


def with_external_weight(location: str, **entries: int) -> onnx.ModelProto:
    """A 1x1 convolution from 3 to 8 channels on 2x2 images, its weight in another file."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight"], ["y"])],
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 2, 2])],
    )
    weight = graph.initializer.add(name="weight", data_type=TensorProto.FLOAT, dims=[8, 3, 1, 1])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("../secret.bin", {}, "outside its folder"),
        ("/etc/passwd", {}, "outside its folder"),
        ("link.bin", {}, "outside its folder"),
        ("", {}, "names no usable weight file"),
        ("missing.bin", {}, "does not exist"),
        ("here.bin", {"length": 1000}, "shorter"),
        ("here.bin", {"offset": -1}, "shorter"),
        ("here.bin", {"offset": "many"}, "bad offset"),
    ],
)
def test_external_weights_are_confined_to_the_models_folder(tmp_path, location, entries, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    (folder / "here.bin").write_bytes(bytes(96))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = save(with_external_weight(location, **entries), folder / "net.onnx")
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_files_that_are_no_onnx_network_are_refused(tmp_path):
    good = network(18, True).SerializeToString()
    files = {
        "is empty": b"",
        "not an ONNX file": b"PK\x03\x04 something else",
        "not an ONNX file, or it is truncated": good[:-7],
        "has no": onnx.ModelProto(ir_version=8).SerializeToString(),
    }
    for message, content in files.items():
        path = tmp_path / "net.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_model(path)
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="not a file"):
        load_model(tmp_path)
    with (tmp_path / "huge.onnx").open("wb") as huge:
        huge.truncate(3 << 30)  # sparse: takes no space
    with pytest.raises(UserError, match="more than"):
        load_model(tmp_path / "huge.onnx")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_raise_nothing_but_user_errors(tmp_path, data):
    content = bytearray(with_external_weight("w.bin").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "w.bin").write_bytes(bytes(96))
    (tmp_path / "net.onnx").write_bytes(content)
    with contextlib.suppress(UserError):  # any other exception would be a traceback for the user
        ledger(load_model(tmp_path / "net.onnx"))


def test_networks_that_cannot_be_counted_are_refused(tmp_path):
    def refused(model: onnx.ModelProto, message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_model(save(model, tmp_path / "net.onnx"))
        assert "\n" not in str(error.value)

    model = network(18, True)
    del model.graph.output[:]
    refused(model, "no outputs")
    model = network(18, True)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    refused(model, "dynamic dimension .'height'.; only the batch may be dynamic")
    model = network(18, True)
    model.graph.node[-1].op_type = "NoSuchOperator"
    refused(model, "is not valid")
    model = network(18, True)
    model.graph.node[-1].input[0] = "nothing"
    refused(model, "is not valid")
    model = network(18, True)
    del model.graph.input[:]
    refused(model, "no inputs|not valid")


def test_a_batch_fixed_inside_the_network_is_refused():
    for shape in ([1, 36], [1, -1]):
        builder = Builder()
        builder.initializers.append(helper.make_tensor("shape", TensorProto.INT64, [2], shape))
        x = builder.op("Reshape", builder.op("Relu", "image"), "shape")
        model = builder.model([1, 4, 3, 3], builder.op("Gemm", x, builder.weight(36, 5)))
        assert ledger(model, element_bytes=1).peak_bytes == 2 * 36
        with pytest.raises(UserError, match="dynamic"):
            ledger(model, batch=2)


def test_control_flow_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, [1, 4])]
    )
    builder = Builder()
    builder.op("Constant", value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    y = builder.op("If", "t0", then_branch=branch, else_branch=branch)
    with pytest.raises(UserError, match="control flow"):
        ledger(builder.model(["N", 4], y))


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"element_bytes": 3}, {"policy": "best"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError, match=r"need|unknown"):
        ledger(Builder().model(["N", 4], "image"), **arguments)


def test_a_network_that_computes_nothing_is_refused():
    with pytest.raises(UserError, match="computes nothing"):
        ledger((builder := Builder()).model(["N", 4], builder.op("Identity", "image")))
