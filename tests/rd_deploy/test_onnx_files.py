"""ONNX files that are sound, damaged or hostile."""

import contextlib

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_builder import network, save

from rd_deploy.common import UserError
from rd_deploy.memory import ledger
from rd_deploy.onnx_files import fixed_batch, load_model


def test_load_model_gives_what_was_saved(tmp_path):
    model = network(18, True)
    assert load_model(save(model, tmp_path / "net.onnx")) == model


@pytest.mark.parametrize(("written", "fixed"), [(4, 4), ("N", None), (None, None), (-1, None), (0, None)])
def test_a_batch_is_fixed_where_the_file_gives_a_number(written, fixed):
    """Some exporters write -1 for a free dimension."""
    model = with_external_weight("w.bin")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [written, 3, 2, 2]))
    assert fixed_batch(model) == fixed
    assert ledger(model, batch=4, element_bytes=1).peak_bytes == 4 * (3 * 4 + 8 * 4)


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


def test_weights_in_a_file_beside_the_model_are_found_and_not_read(tmp_path):
    model = with_external_weight("weights.bin", length=8 * 3 * 4)
    path = save(model, tmp_path / "net.onnx")
    (tmp_path / "weights.bin").write_bytes(bytes(8 * 3 * 4))
    assert ledger(load_model(path), element_bytes=1).peak_bytes == 3 * 4 + 8 * 4


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("../secret.bin", {}, "outside its folder"),
        ("/etc/passwd", {}, "outside its folder"),
        ("link.bin", {}, "outside its folder"),
        ("", {}, "names no usable weight file"),
        ("missing.bin", {}, "does not exist"),
        ("here.bin", {"length": 1000}, "shorter"),
        ("here.bin", {"length": 92}, "tensor 'weight' needs 96 bytes and has 92 in"),
        ("here.bin", {"offset": 4}, "shorter"),
        ("long.bin", {}, "tensor 'weight' needs 96 bytes and has 1,000 in"),
        ("long.bin", {"offset": 8}, "tensor 'weight' needs 96 bytes and has 992 in"),
        ("here.bin", {"offset": -1}, "shorter"),
        ("here.bin", {"offset": "many"}, "bad offset"),
    ],
)
def test_external_weights_are_confined_to_the_models_folder(tmp_path, location, entries, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    (folder / "here.bin").write_bytes(bytes(96))
    (folder / "long.bin").write_bytes(bytes(1000))  # all of which would be read where no length is given
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = save(with_external_weight(location, **entries), folder / "net.onnx")
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_external_weights_of_packed_types_have_a_bound_too(tmp_path):
    model = with_external_weight("w.bin")
    model.graph.initializer[0].data_type = TensorProto.COMPLEX128
    (tmp_path / "w.bin").write_bytes(bytes(24 * 16 + 1))
    with pytest.raises(UserError, match="needs at most 384 bytes and has 385 in"):
        load_model(save(model, tmp_path / "net.onnx"))


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
