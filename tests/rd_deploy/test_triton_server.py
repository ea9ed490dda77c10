"""Model repositories for NVIDIA's Triton Inference Server: the server's own schema, and a folder that is never half."""

import errno
import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from chains import basics

from rd_deploy.common import UserError
from rd_deploy.export.files import describe
from rd_deploy.export.onnx import to_onnx
from rd_deploy.serving import folders, triton_server
from rd_deploy.serving.folders import atomic_folder
from rd_deploy.serving.triton_config import config_text, quoted
from rd_deploy.serving.triton_server import check_engine, check_onnx, check_replaced, check_repository, write_model

HOSTILE = (
    'say "hi"',
    "back\\slash \\n \\042",
    "two\nlines\r\nand\u2028three",
    "née ü 日本",
    "a\x00b\x1b[0m",
    "'",
    "",
    "",
)
STRAY = "no utf-8: \udcff"  # a folder's name of other bytes, as Python reads it
BATCHES = (1, 8, 32)
TENSORRT = {"engine": {"flavour": "tensorrt", "version": "10.16.1"}}  # of an engine's sidecar
TYPE_FP32 = 11  # in model_config.proto
CHAIN = basics(channels=3, classes=len(HOSTILE) + 1)


@pytest.fixture(scope="module")
def content() -> bytes:
    return to_onnx(CHAIN).SerializeToString(deterministic=True)


def sidecar_of(content: bytes, classes: tuple[str, ...] = (*HOSTILE, STRAY), **particular) -> dict:
    return describe("model.onnx", content, replace(CHAIN, classes=classes), "fp32", None, particular, ["numpy"])


def write(folder: Path, name: str = "net", content: bytes = b"onnx", batches=BATCHES, **particular) -> Path:
    engine = "engine" in particular
    return write_model(folder, name, content, sidecar_of(content, **particular), engine=engine, batches=batches)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parse(text: str):
    """The text as the server's message `ModelConfig`; a field that it does not know is an error."""
    pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="the schema: pip install tritonclient[grpc]")
    from google.protobuf import text_format

    return text_format.Parse(text, pb2.ModelConfig())


def parsed(folder: Path):
    return parse((folder / "config.pbtxt").read_text(encoding="ascii"))


# --- the configuration


def test_an_onnx_model(tmp_path, content):
    target = write(tmp_path / "models", "net-1.2_x", content)
    assert target == tmp_path / "models" / "net-1.2_x"
    assert sorted(files(target)) == ["1/model.onnx", "config.pbtxt", "labels.txt", "sidecar.json"]
    assert (target / "1" / "model.onnx").read_bytes() == content
    config = parsed(target)
    assert (config.name, config.backend, config.platform) == ("net-1.2_x", "onnxruntime", "")
    assert config.max_batch_size == 32
    (images,), (logits,) = config.input, config.output
    assert (images.name, images.data_type) == ("images", TYPE_FP32)
    assert list(images.dims) == [3, 12, 12]
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", TYPE_FP32, [len(CHAIN.classes)])
    assert logits.label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    (group,) = config.instance_group
    assert (group.kind, group.count) == (group.KIND_AUTO, 1)
    assert config.parameters["cudnn_conv_algo_search"].string_value == "1"
    assert not config.HasField("optimization")


def test_a_tensorrt_plan(tmp_path):
    target = write(tmp_path, content=b"plan", **TENSORRT)
    assert sorted(files(target)) == ["1/model.plan", "config.pbtxt", "labels.txt", "sidecar.json"]
    config = parsed(target)
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "", 32)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.optimization.cuda.graphs
    specs = config.optimization.cuda.graph_spec
    assert [spec.batch_size for spec in specs] == [1, 8, 32]
    assert all(
        {name: list(shape.dim) for name, shape in spec.input.items()} == {"images": [3, 12, 12]} for spec in specs
    )
    assert not config.instance_group
    assert "cudnn_conv_algo_search" not in config.parameters
    sidecar = json.loads((target / "sidecar.json").read_text())
    assert (sidecar["model"], sidecar["engine"]) == ("1/model.plan", TENSORRT["engine"])


@pytest.mark.parametrize(
    ("batches", "preferred", "graphs"),
    [((1, 1, 1), [], [1]), ((1, 1, 4), [4], [1, 4]), ((1, 4, 4), [4], [1, 4]), ((1, 2, 4), [2, 4], [1, 2, 4])],
)
def test_batch_sizes(batches, preferred, graphs):
    config = parse(config_text("net", sidecar_of(b""), engine=True, batches=batches))
    assert config.max_batch_size == batches[2]
    assert config.HasField("dynamic_batching") == bool(preferred)
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == graphs


@pytest.mark.parametrize("engine", [False, True])
def test_a_client_reads_preprocessing_and_hostile_class_names_exactly(engine):
    config = parse(config_text("net", sidecar_of(b"x"), engine=engine, batches=BATCHES))
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert json.loads(parameters["classes"]) == [*HOSTILE, STRAY]
    assert json.loads(parameters["preprocessing"]) == CHAIN.preprocessing.to_dict()
    assert parameters["sha256"] == hashlib.sha256(b"x").hexdigest()


def test_every_class_has_one_line_of_the_label_file(tmp_path):
    lines = (write(tmp_path) / "labels.txt").read_bytes().decode("utf-8").split("\n")  # as the server splits it
    assert lines.pop() == ""
    assert lines == [*HOSTILE[:2], "two lines and three", *HOSTILE[3:], "no utf-8: ?"]


@pytest.mark.parametrize("text", [*HOSTILE, "\x7f\x80\xff", "x" * 10_000, "?", "\\'", "1\x002"])
def test_strings_round_trip(text):
    assert parse(f"name: {quoted(text)}").name == text
    assert quoted(text).isascii()
    assert quoted(text).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("max_batch_size", "max_batch"),
        lambda text: text.replace("TYPE_FP32", "TYPE_FLOAT"),
        lambda text: text.replace("graph_spec", "graph_specs"),
        lambda text: text.replace("dims: [ 3", "dims: [ three"),
        lambda text: text.replace('\\"', '"'),
        lambda text: text + '\nbackend: "onnxruntime"\nbackend: "onnxruntime"',
    ],
)
def test_the_schema_would_notice(change):
    text = config_text("net", sidecar_of(b""), engine=True, batches=BATCHES)
    parse(text)
    from google.protobuf import text_format

    with pytest.raises(text_format.ParseError):
        parse(change(text))


# --- what the server cannot use


def test_engines_that_the_server_cannot_use(tmp_path):
    with pytest.raises(UserError, match="cannot load TensorRT-RTX engines; use --trt-flavour tensorrt, or leave --trt"):
        write(tmp_path, engine={"flavour": "rtx"})
    with pytest.raises(
        UserError, match="any batch from 1 to 8, but the engine's smallest is 2; build it with --batch 1:4:8"
    ):
        write(tmp_path, **TENSORRT, batches=(2, 4, 8))
    assert list(tmp_path.iterdir()) == []
    check_engine("tensorrt", (1, 4, 8))


@pytest.mark.parametrize(
    ("precision", "reason"), [("bf16", "no bf16 convolution on a CPU"), ("fp8", "drops the ReLU before a float8 Q")]
)
def test_onnx_files_that_the_server_cannot_run(tmp_path, precision, reason):
    for refused in (
        lambda: check_onnx(precision),
        lambda: write_model(
            tmp_path, "net", b"", {**sidecar_of(b""), "precision": precision}, engine=False, batches=BATCHES
        ),
    ):
        with pytest.raises(UserError, match=f"{reason}.*; add --trt to serve a TensorRT engine, or export in fp32"):
            refused()
    assert list(tmp_path.iterdir()) == []
    write_model(
        tmp_path, "plan", b"", {**sidecar_of(b"", **TENSORRT), "precision": precision}, engine=True, batches=BATCHES
    )
    for other in ("fp32", "fp16", "int8"):
        check_onnx(other)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/a",
        ".a",
        "-a",
        "a b",
        'a"b',
        "a\\b",
        "a\n",
        "\na",
        "ü",
        "a%20b",
        "a:b",
        "x" * 129,
        "a\x00",
    ],
)
def test_names_that_a_url_cannot_hold(tmp_path, name):
    for refused in (lambda: check_repository(tmp_path, name), lambda: write(tmp_path, name)):
        with pytest.raises(UserError, match="cannot name a model of the server") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "plain20-projection", "model-fp16", "7", "_", "a.b", "x" * 128])
def test_names(tmp_path, name):
    check_repository(tmp_path, name)
    assert parsed(write(tmp_path, name)).name == name


# --- the folder


def test_checking_leaves_nothing_behind(tmp_path):
    check_repository(tmp_path / "deep" / "models", "net")
    check_repository(str(tmp_path), "net")
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_no_repository(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="is not a folder"):
        check_repository(tmp_path / "file", "net")
    with pytest.raises(UserError, match="is not a folder"):
        check_repository(tmp_path / "file" / "deeper", "net")
    with pytest.raises(UserError, match="taken exists and is no model of rd-export; move it away"):
        check_repository(tmp_path, "taken")
    write(tmp_path / "models")
    with pytest.raises(UserError, match="is the folder of one model; name the repository"):
        check_repository(tmp_path / "models" / "net", "net")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EACCES, "Permission denied", dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="models: Permission denied; choose another folder"):
        check_repository(tmp_path / "models", "net")


@pytest.mark.parametrize("sidecar", [None, "", "[]", "{", '{"format": "other"}', "[" * 100_000])
def test_a_model_of_others_stays(tmp_path, sidecar):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.pbtxt").write_text("theirs")
    if sidecar is not None:
        (tmp_path / "net" / "sidecar.json").write_text(sidecar)
    before = files(tmp_path)
    for refused in (lambda: check_repository(tmp_path, "net"), lambda: write(tmp_path)):
        with pytest.raises(UserError, match="net exists and is no model of rd-export; move it away, or"):
            refused()
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("config.pbtxt", "config.pbtxt was edited; move it away"),
        ("2/model.onnx", "holds 2, which rd-export did not write"),
        ("1/engine.cache", "holds 1/engine.cache, which"),
        ("configs/h100.pbtxt", "holds configs, which"),
    ],
)
def test_what_users_changed_stays(tmp_path, path, pattern):
    target = write(tmp_path)
    (target / path).parent.mkdir(exist_ok=True)
    with (target / path).open("a") as file:
        file.write("# theirs\n")
    before = files(tmp_path)
    with pytest.raises(UserError, match=pattern):
        write(tmp_path)
    assert files(tmp_path) == before


def test_a_link_is_not_replaced(tmp_path):
    write(tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net").symlink_to(tmp_path / "elsewhere" / "net")
    with pytest.raises(UserError, match="no model of rd-export"):
        check_repository(tmp_path / "models", "net")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # the repository itself may be one
    assert (write(tmp_path / "link", content=b"new") / "1/model.onnx").read_bytes() == b"new"


def test_a_network_for_other_images_or_classes_is_not_replaced(tmp_path):
    write(tmp_path)
    values = sidecar_of(b"onnx")
    check_replaced(tmp_path, "net", values | {"weights_sha256": "0"})  # trained again
    check_replaced(tmp_path, "other", values | {"classes": ["x"]})
    other = {**values["input"], "shape": ["batch", 1, 3, 3]}
    for change in ({"classes": values["classes"][::-1]}, {"input": other}):
        with pytest.raises(UserError, match="net is a network for other images or classes; export under another name"):
            check_replaced(tmp_path, "net", values | change)


def test_a_new_export_replaces_the_old_one_and_no_other(tmp_path):
    other, target = write(tmp_path / "models", "other"), write(tmp_path / "models")
    before, inode = files(other), target.stat().st_ino
    write(tmp_path / "models", content=b"plan", **TENSORRT)
    assert sorted(files(target)) == ["1/model.plan", "config.pbtxt", "labels.txt", "sidecar.json"]
    assert target.stat().st_ino != inode
    assert files(other) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["net", "other"]
    fresh = write(tmp_path / "fresh", content=b"plan", **TENSORRT)
    assert files(fresh) == files(target)


def test_files_follow_the_umask(tmp_path):
    umask = os.umask(0o022)
    try:
        target = write(tmp_path)
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (target, target / "1")}
    assert modes == {0o755}
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_file()} == {0o644}


class Watcher:
    """Notes what a server that looks at this moment would see of the model, whenever a function is called."""

    def __init__(self, repository: Path):
        self.repository, self.seen = repository, []

    def look(self, function):
        def wrapped(*arguments, **keywords):
            self.note()
            result = function(*arguments, **keywords)
            self.note()
            return result

        return wrapped

    def note(self) -> None:
        models = sorted(path.name for path in self.repository.iterdir()) if self.repository.exists() else []
        self.seen.append((models, files(self.repository) if models else {}))


@pytest.mark.parametrize("exchange", [True, False])
def test_who_looks_sees_the_old_model_or_the_new_one(tmp_path, monkeypatch, exchange):
    if exchange and not can_exchange(tmp_path / "probe"):
        pytest.skip("this system cannot exchange two folders")
    repository = tmp_path / "models"
    watcher = Watcher(repository)
    for name in ("write_bytes", "write_text", "mkdir", "rename"):
        monkeypatch.setattr(Path, name, watcher.look(getattr(Path, name)))
    swap = folders._exchange if exchange else lambda one, other: False
    monkeypatch.setattr(folders, "_exchange", watcher.look(swap))
    old, expected = {}, [[], ["net"]]
    for content in (b"first", b"second"):
        watcher.seen.clear()
        write(repository, content=content)
        new = files(repository)
        assert len(watcher.seen) > 10
        assert all(models in expected and seen in (old, new, {}) for models, seen in watcher.seen)
        old = new
    # The second time the model is there throughout; in two steps there is a moment without.
    assert any(models == [] for models, _ in watcher.seen) == (not exchange)


def can_exchange(folder: Path) -> bool:
    one, other = folder / "one", folder / "other"
    one.mkdir(parents=True)
    other.mkdir()
    return folders._exchange(one, other)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("content", [None, b"old"])
def test_a_failure_changes_nothing(tmp_path, monkeypatch, exchange, content):
    if content is not None:
        write(tmp_path / "models", content=content)
    before = files(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(UserError, match="No space left on device; choose another folder"):
        write(tmp_path / "models", content=b"new")
    monkeypatch.undo()
    rename = Path.rename
    monkeypatch.setattr(folders, "_exchange", full if exchange else lambda one, other: False)
    monkeypatch.setattr(Path, "rename", lambda path, to: full() if path.name == "new" else rename(path, to))
    with pytest.raises(UserError, match="No space left on device; choose another folder"):
        write(tmp_path / "models", content=b"new")
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_an_interruption_leaves_the_old_model(tmp_path):
    target = write(tmp_path / "models")
    before = files(tmp_path)

    def fill() -> None:
        with atomic_folder(target, tmp_path) as new:
            (new / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert files(tmp_path) == before


def test_a_mount_is_worked_on_from_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_server.os, "access", lambda path, mode: path != tmp_path.parent)
    assert triton_server._workplace(tmp_path) == tmp_path
    assert triton_server._workplace(tmp_path / "..") != tmp_path / ".."
    write(tmp_path)
    write(tmp_path, content=b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_model_that_was_put_together_on_another_mount_is_copied(tmp_path, monkeypatch, exchange):
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other mount to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        other = Path(name)
        monkeypatch.setattr(triton_server, "_workplace", lambda folder: other)
        if not exchange:
            monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
        write(tmp_path)
        write(tmp_path, content=b"new")
        assert (tmp_path / "net" / "1" / "model.onnx").read_bytes() == b"new"
        assert [path.name for path in tmp_path.iterdir()] == ["net"]
        assert [*other.iterdir()] == []
