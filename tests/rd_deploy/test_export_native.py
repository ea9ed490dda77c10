"""``.rdp`` files: weights against an independent unpacking, bf16 against torch, what the engine says of bad files."""

import dataclasses
import hashlib
import importlib.util
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from chains import export

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, round_to_bf16, run_chain
from rd_deploy.common import UserError
from rd_deploy.export.native import assemble, checksum, make_native, to_rdp
from rd_deploy.export.source import chain_from_name
from rd_deploy.native import Network, Unsupported
from rd_deploy.preprocessing import Preprocessing

CORPUS = Path(__file__).parents[1] / "native" / "corpus"


def corpus_maker():
    spec = importlib.util.spec_from_file_location("make_corpus", CORPUS.with_name("make_corpus.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHAINS = corpus_maker().chains()


def too_late(content: bytes) -> None:
    pytest.fail("checked before the path was")


@pytest.fixture(params=sorted(CHAINS))
def chain(request) -> Chain:
    return CHAINS[request.param]


@pytest.fixture(scope="module")
def plain() -> Chain:
    return chain_from_name("plain20", 16, classes=5)


def parts(file: bytes) -> tuple[dict, bytes]:
    """The JSON and the weights of a file, by the offsets of its header."""
    json_at, json_bytes, weights_at, weight_bytes = struct.unpack_from("<4Q", file, 16)
    return json.loads(file[json_at : json_at + json_bytes]), file[weights_at : weights_at + weight_bytes]


def step_of(chain: Chain, name: str):
    return next(step for step in chain.steps if step.name == name)


# --- weights


def unpacked(entry: dict, precision: str, weights: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in, height, width) and bias of a step, element by element from docs/rdp.md."""
    outputs, inputs = entry["out"], entry["in"]
    height, width = entry.get("kernel", (1, 1))
    rows = entry["source"] == "images"
    taps, count = (height, width * inputs) if rows else (height * width, inputs)
    pitch = -(-count // 32) * 32 if rows else -(-count // 16) * 16
    found = np.zeros((outputs, inputs, height, width))
    for out, channel, y, x in np.ndindex(found.shape):
        tap, k = (y, x * inputs + channel) if rows else (y * width + x, channel)
        row = (out // 16 * taps + tap) * pitch
        if precision == "fp32":
            at = entry["weight"] + 4 * ((row + k) * 16 + out % 16)
            found[out, channel, y, x] = struct.unpack_from("<f", weights, at)[0]
        else:
            at = entry["weight"] + 2 * ((row + k // 2 * 2) * 16 + out % 16 * 2 + k % 2)
            found[out, channel, y, x] = struct.unpack("<f", b"\0\0" + weights[at : at + 2])[0]
    return found, np.frombuffer(weights, "<f4", outputs, entry["bias"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_lie_where_the_format_says(chain, precision):
    description, weights = parts(to_rdp(chain, precision))
    seen, end = 0, 0
    for entry in description["steps"]:
        if entry["op"] in ("conv", "linear"):
            weight, bias = unpacked(entry, precision, weights)
            step = step_of(chain, entry["name"])
            np.testing.assert_array_equal(weight.reshape(step.weight.shape), step.weight)
            np.testing.assert_array_equal(bias, step.bias)
            seen += np.count_nonzero(step.weight) + np.count_nonzero(step.bias)
            assert entry["weight"] == end
            end = entry["bias"] + -(-entry["out"] // 16) * 64
    assert end == len(weights)
    bias_bytes = {at for e in description["steps"] if "bias" in e for at in range(e["bias"], e["bias"] + 4 * e["out"])}
    if precision == "fp32":  # what is not a weight is zero
        assert np.count_nonzero(np.frombuffer(weights, "<f4")) == seen
    assert bias_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engine_computes_the_chain(chain, precision):
    images = np.random.default_rng(0).normal(size=(3, *chain.input_shape)).astype(np.float32)
    *_, (_, expected) = run_chain(chain, images.astype(np.float64))
    logits = Network.from_bytes(to_rdp(chain, precision)).plan(3).context().run(images)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < {"fp32": 1e-5, "bf16": 3e-2}[precision]


# --- bf16


@pytest.mark.parametrize(("precision", "value"), [("bf16", 3.4e38), ("fp32", 1e39), ("bf16", -1e300)])
@pytest.mark.parametrize("name", ["conv1", "fc"])
def test_weights_out_of_range_are_refused(chain, name, precision, value):
    weight = step_of(chain, name).weight.copy()
    weight.flat[1] = value
    with pytest.raises(UserError, match=f"{name}.weight reaches .*, more than {precision} holds"):
        to_rdp(changed(chain, name, weight=weight), precision)


def test_a_bias_keeps_float32_in_bf16(chain):
    bias = step_of(chain, "fc").bias + 2.0**-20
    assert not np.array_equal(round_to_bf16(bias), bias)
    description, weights = parts(to_rdp(changed(chain, "fc", bias=bias), "bf16"))
    np.testing.assert_array_equal(np.frombuffer(weights, "<f4", 3, description["steps"][-1]["bias"]), bias)


# --- what is in the file


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_chain_gives_the_same_bytes(plain, precision):
    assert to_rdp(plain, precision) == to_rdp(dataclasses.replace(plain), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_description_says_all_about_the_network(plain, precision):
    file = to_rdp(plain, precision)
    assert file[:16] == b"\x89RDP\r\n\x1a\n" + struct.pack("<II", 1, 0)
    json_at, json_bytes, weights_at, weight_bytes, size, _ = struct.unpack_from("<6Q", file, 16)
    assert (json_at, weights_at % 64, weights_at - 64 - json_bytes < 64) == (64, 0, True)
    assert weights_at + weight_bytes == size == len(file)
    description, _ = parts(file)
    assert description["preprocessing"] == plain.preprocessing.to_dict()
    assert description["weights_sha256"] == plain.sha256()
    assert (description["arch"], description["provenance"]) == (plain.arch, plain.provenance)
    assert [step["name"] for step in description["steps"]] == [step.name for step in plain.steps]
    network = Network.from_bytes(file)
    assert network.description == description
    assert network.classes == plain.classes
    assert network.preprocessing == plain.preprocessing
    info = network.info
    assert (info.name, info.precision, info.weight_bytes) == (plain.name, precision, weight_bytes)
    assert (info.channels, info.height, info.width, info.classes) == (*plain.input_shape, 5)
    assert info.steps == len(plain.steps)


def slow_checksum(file: bytes) -> int:
    """As docs/rdp.md words it, one word after the other."""
    factor, modulus = 0x9E3779B97F4A7C15, 2**64
    lanes = list(range(1024))
    for index, (word,) in enumerate(struct.iter_unpack("<Q", file)):
        state = (lanes[index % 1024] ^ (0 if index == 7 else word)) * factor % modulus
        lanes[index % 1024] = state ^ (state >> 32)
    total = 0
    for lane in lanes:
        total = (total ^ lane) * factor % modulus
        total ^= total >> 32
    return total


@pytest.mark.parametrize("size", [64, 72, 8184, 8192, 8200, 50_000])
def test_the_checksum_is_as_defined(size):
    content = np.random.default_rng(size).bytes(size)
    assert checksum(content) == slow_checksum(content)


def test_the_checksum_stands_in_the_header(chain):
    file = to_rdp(chain, "bf16")
    assert struct.unpack_from("<Q", file, 56)[0] == slow_checksum(file)


# --- networks that the engine does not take


def changed(chain: Chain, name: str, **changes) -> Chain:
    steps = tuple(dataclasses.replace(step, **changes) if step.name == name else step for step in chain.steps)
    return dataclasses.replace(chain, steps=steps)


def tiny(*steps, size: int = 8, channels: int = 1, last: int = 4, classes: tuple[str, ...] = ("a", "b"), **fields):
    """A chain of steps that end in a map of ``last`` channels."""
    head = (
        GlobalAveragePool("pool", steps[-1].name),
        Linear("fc", np.ones((len(classes), last)), np.ones(len(classes)), "pool"),
    )
    preprocessing = Preprocessing(size, size, channels, (0.5,) * channels, (0.5,) * channels)
    return Chain(
        (*steps, *head), (channels, size, size), **({"preprocessing": preprocessing, "classes": classes} | fields)
    )


def conv(name: str = "conv", source: str = INPUT, shape=(4, 1, 3, 3), **changes) -> Conv:
    settings = {"stride": 1, "padding": 1, "relu": True} | changes
    return Conv(name, np.ones(shape), np.zeros(shape[0]), source=source, **settings)


def pooled_images() -> Chain:
    return tiny(MaxPool("maxpool", 2, 2, 0, INPUT), conv("conv", "maxpool"))


UNFIT = {
    "kernel": (lambda: tiny(conv(shape=(4, 1, 17, 17), padding=8)), "conv .* kernels of 16"),
    "stride": (lambda: tiny(conv(stride=17)), "conv .* a stride of 16"),
    "padding": (lambda: tiny(conv(padding=16)), "a padding of 15"),
    "pool's kernel": (lambda: tiny(conv(), MaxPool("maxpool", 17, 2, 8, "conv")), "maxpool .* kernels"),
    "map": (lambda: tiny(conv(shape=(4, 1, 1, 1), padding=15), size=4090), "maps of 4096"),
    "channels": (lambda: tiny(conv(shape=(65537, 1, 1, 1), padding=0), last=65537), "65536 channels"),
    "input": (lambda: tiny(conv(shape=(4, 65, 3, 3)), channels=65), "64 channels and 4096"),
    "pooled images": (pooled_images, "images that only convolutions read"),
    "added images": (lambda: tiny(conv(shape=(1, 1, 3, 3), add=INPUT), last=1), "images that only convolutions read"),
    "class": (lambda: tiny(conv(), classes=("a", "b\0c")), "without zero characters"),
    "surrogate": (lambda: tiny(conv(), classes=("a", "b\udc80")), r"holds '\\udc80', which no UTF-8"),
    "depth": (lambda: tiny(conv(), provenance={"x": nested(62)}), "depth of 64"),
    "std": (lambda: tiny(conv(), preprocessing=Preprocessing(8, 8, 1, (0.5,), (1e-60,))), "that fit float32"),
    "mean": (lambda: tiny(conv(), preprocessing=Preprocessing(8, 8, 1, (1e60,), (0.5,))), "that fit float32"),
}


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize("which", sorted(UNFIT))
def test_networks_that_do_not_fit_are_refused(which):
    make, message = UNFIT[which]
    with pytest.raises(UserError, match=message):
        to_rdp(make(), "fp32")


def test_a_network_needs_one_linear_layer_at_its_end():
    without = Chain(
        (conv(shape=(2, 1, 3, 3)), GlobalAveragePool("pool", "conv")), (1, 8, 8), tiny(conv()).preprocessing, ("a", "b")
    )
    two = tiny(conv())
    second = Linear("second", np.ones((2, 2)), np.ones(2), "fc")
    for chain in (without, dataclasses.replace(two, steps=(*two.steps, second))):
        with pytest.raises(UserError, match="one linear layer, the last step"):
            to_rdp(chain)


def test_the_deepest_provenance_that_is_written_is_read():
    assert Network.from_bytes(to_rdp(tiny(conv(), provenance={"x": nested(61)}))).info.steps == 3


def test_an_unknown_precision_is_refused(chain):
    with pytest.raises(UserError, match=r"unknown precision 'bf61' \(did you mean 'bf16'"):
        to_rdp(chain, "bf61")


# --- files


def test_the_sidecar_describes_the_file(tmp_path, chain):
    seen = []
    path = tmp_path / "deep" / "net.rdp"
    returned = export(
        make_native, path, chain, "bf16", verify=lambda content: {"checked": seen.append(content) is None}
    )
    sidecar = json.loads((path.parent / "net.rdp.json").read_text())
    content = path.read_bytes()
    assert sidecar == returned
    assert seen == [content]
    assert sidecar["sha256"] == hashlib.sha256(content).hexdigest()
    assert (sidecar["model"], sidecar["bytes"], sidecar["precision"]) == ("net.rdp", len(content), "bf16")
    assert sidecar["weight_bytes"] == len(parts(content)[1])
    assert (sidecar["rdp_version"], sidecar["parity"]) == (1, {"checked": True})
    assert sorted(path.parent.iterdir()) == [path, path.with_name("net.rdp.json")]
    assert Network.load(path).info.name == chain.name


def test_older_files_are_replaced_and_kept_when_the_check_fails(tmp_path, chain):
    path = tmp_path / "net.rdp"
    export(make_native, path, chain)
    path.write_bytes(b"old")

    def refuse(content: bytes) -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        export(make_native, path, chain, verify=refuse)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    export(make_native, path, chain)
    assert path.read_bytes() == to_rdp(chain)


def test_unwritable_outputs_are_refused_before_the_work(tmp_path, chain, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "other.rdp.json").write_text("{}")
    for name, message in (
        ("file/net.rdp", "is not a folder"),
        ("net.onnx", r"must end in \.rdp"),
        ("other.rdp", r"other\.rdp\.json exists and is not a sidecar"),
    ):
        with pytest.raises(UserError, match=message):
            export(make_native, tmp_path / name, chain, verify=too_late)

    def full(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match="Permission denied"):
        export(make_native, tmp_path / "net.rdp", chain)
    assert len(list(tmp_path.iterdir())) == 2


# --- what the engine says of wrong files


def refused(file: bytes) -> str:
    """What the engine says of a file that it must not take."""
    with pytest.raises(UserError) as error:
        Network.from_bytes(file)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def file() -> bytes:
    return to_rdp(CHAINS["residual"], "bf16")


def test_files_cut_short_or_continued_are_refused(file):
    for size in (1, 7, 8, 63):
        assert "not a .rdp file" in refused(file[:size])
    for size in (64, 100, 1000, len(file) // 2, len(file) - 64, len(file) - 1):
        assert "truncated or damaged" in refused(file[:size])
    assert "truncated or damaged" in refused(file + bytes(64))
    assert "not a .rdp file" in refused(bytes(len(file)))


def test_every_flipped_bit_is_found(file):
    for at in [*range(64), *range(64, len(file), 97), len(file) - 1]:
        damaged = bytearray(file)
        damaged[at] ^= 1 << at % 8
        refused(bytes(damaged))


def test_swapped_words_are_found(file):
    words = np.frombuffer(file, "<u8")
    different = np.flatnonzero(words[100:] != words[100]) + 100
    for other in (101, different[-1], next(at for at in different if at % 1024 == 100)):  # that is the same lane
        swapped = words.copy()
        swapped[[100, other]] = swapped[[other, 100]]
        assert "checksum" in refused(swapped.tobytes())


def header(file: bytes, **changes) -> bytes:
    """The file with other fields in its header and the right checksum."""
    names = ("version", "zero", "json_offset", "json_bytes", "weights_offset", "weights_bytes", "file_bytes")
    values = dict(zip(names, struct.unpack_from("<IIQQQQQ", file, 8), strict=True)) | changes
    file = file[:8] + struct.pack("<IIQQQQQ", *values.values()) + file[56:]
    return file[:56] + struct.pack("<Q", checksum(file)) + file[64:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, this library reads version 1"),
        ({"zero": 1}, "sections"),
        ({"json_offset": 128}, "sections"),
        ({"json_bytes": 2**64 - 1}, "more than 256 MiB"),
        ({"json_bytes": 2**28}, "sections"),
        ({"json_bytes": 0}, "sections"),
        ({"weights_offset": 2**64 - 64}, "sections"),
        ({"weights_offset": 64}, "sections"),
        ({"weights_bytes": 2**64 - 64}, "sections"),
        ({"weights_bytes": 0}, "sections"),
        ({"file_bytes": 0}, "truncated or damaged"),
        ({"file_bytes": 2**63}, "truncated or damaged"),
    ],
)
def test_absurd_headers_are_refused(file, changes, message):
    assert message in refused(header(file, **changes))


def test_nothing_hides_between_description_and_weights(file):
    json_bytes, weights_at = struct.unpack_from("<QQ", file, 24)
    assert weights_at > 64 + json_bytes
    hidden = file[: weights_at - 1] + b"x" + file[weights_at:]
    assert "something stands between" in refused(header(hidden))


def edited(file: bytes, edit) -> bytes:
    """The file with an edited description."""
    description, weights = parts(file)
    description = edit(description) or description
    return assemble(json.dumps(description).encode(), weights)


def put(path: str, value):
    """An edit that puts a value at a path like ``steps/0/kernel``."""

    def edit(description: dict) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            description = description[key]
        description[last] = value

    return edit


def without(path: str):
    def edit(description: dict) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            description = description[key]
        del description[last]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("format", "residual-distillation-rdp/2"), "is not of format"),
        (put("format", 1), "'format' of the wrong type"),
        (put("extra", 1), "unknown entry 'extra'"),
        (without("classes"), "lacks its entry 'classes'"),
        (put("name", "a\0b"), "zero character in 'name'"),
        (put("precision", "fp16"), "unknown precision 'fp16'"),
        (put("precision", "fp32"), "for 'bias'"),
        (put("weights_sha256", "0" * 63), "weights_sha256"),
        (put("weights_sha256", "Z" * 64), "weights_sha256"),
        (put("arch", []), "'arch' of the wrong type"),
        (put("input", [1, 16]), "has 2 entries in 'input', not 3"),
        (put("input", [1, 16, 16.0]), "whole number"),
        (put("input", [1, 16, 1e300]), "whole number"),
        (put("input", [1, 16, 0]), "whole number"),
        (put("input", [1, 16, 4097]), "from 1 to 4096"),
        (put("input", [65, 16, 16]), "64 input channels"),
        (put("input", [2, 16, 16]), "cannot read a tensor of 2x16x16"),
        (put("classes", ["a", "b"]), "has 2 entries in 'classes', not 3"),
        (put("classes", ["a", "b", 3]), "'classes' of the wrong type"),
        (put("classes", ["a", "b", "\0"]), "zero character"),
        (put("preprocessing/size", 0), "whole number"),
        (put("preprocessing/size", 100), "size <= resize"),
        (put("preprocessing/channels", 3), "whole number from 1 to 1"),
        (put("preprocessing/mean", [1e39]), "fit float32"),
        (put("preprocessing/mean", [None]), "fit float32"),
        (put("preprocessing/std", [0]), "positive std"),
        (put("preprocessing/std", [1, 1]), "has 2 entries in 'std'"),
        (put("preprocessing/more", 1), "unknown entry"),
        (put("steps", []), "from 1 to 4096 steps"),
        (put("steps", [1]), "step 1 is not an object with an op"),
        (put("steps/0/op", "softmax"), "unknown op 'softmax'"),
        (put("steps/0/op", "x" * 10000), "'x{80}\\.\\.\\.'"),
        (put("steps/0/op", "a\nb"), r"'a\?b'"),
        (put("steps/0/dilation", 1), "unknown entry 'dilation'"),
        (without("steps/0/bias"), "lacks its entry 'bias'"),
        (put("steps/0/source", "later"), "reads 'later', which does not exist yet"),
        (put("steps/0/source", "block1.conv1"), "does not exist yet"),
        (put("steps/0/source", "conv1"), "does not exist yet"),
        (put("steps/2/add", "block2.conv2"), "does not exist yet"),
        (put("steps/2/add", "images"), "adds the images"),
        (put("steps/2/add", 7), "'add' of the wrong type"),
        (put("steps/5/add", "conv1"), "gives 8x8x8 and adds 4x16x16"),
        (put("steps/1/name", "conv1"), "two tensors are named 'conv1'"),
        (put("steps/0/name", "images"), "two tensors are named 'images'"),
        (put("steps/5/add", None), "no step reads the output"),
        (put("steps/0/in", 2), "needs 2048 for 'bias'|cannot read"),
        (put("steps/0/out", 0), "whole number from 1 to 65536"),
        (put("steps/0/out", 65536), "for 'bias'"),
        (put("steps/0/out", 2**31), "whole number"),
        (put("steps/0/out", -(2**63)), "whole number"),
        (put("steps/0/out", 2**70), "whole number"),
        (put("steps/0/kernel", [17, 3]), "from 1 to 16"),
        (put("steps/0/kernel", 3), "'kernel' of the wrong type"),
        (put("steps/0/stride", 0), "whole number"),
        (put("steps/0/padding", -1), "whole number"),
        (put("steps/0/relu", 1), "'relu' of the wrong type"),
        (put("steps/0/weight", 64), "needs 0 for 'weight'"),
        (put("steps/1/weight", 0), "needs .* for 'weight', where the tensor before ends"),
        (put("steps/1/weight", -64), "for 'weight'"),
        (put("steps/1/weight", 2**63), "for 'weight'"),
        (put("steps/1/bias", 1.5), "for 'bias'"),
        (put("steps/6/source", "images"), "pools the images"),
        (put("steps/7/source", "block2.conv2"), "cannot read a tensor of 8x8x8"),
        (put("steps/7/out", 17), "for 'bias'"),
        (put("steps/7/out", 16), "has 3 entries in 'classes', not 16"),
        (put("steps/7/out", 1_000_001), "from 1 to 1000000"),
        (lambda d: d["steps"].pop() and None, "the last step must be linear"),
        (lambda d: d["steps"].append(d["steps"][6]), "a linear step must be the last"),
        (lambda d: [d], "is not an object"),
        (lambda d: "text", "is not an object"),
    ],
)
def test_wrong_descriptions_are_refused(file, edit, message):
    with pytest.raises(UserError, match=message):
        Network.from_bytes(edited(file, edit))


def test_pooled_images_are_called_unsupported(file):
    with pytest.raises(Unsupported, match="only convolutions read them"):
        Network.from_bytes(edited(file, put("steps/6/source", "images")))


def test_too_many_steps_are_refused(file):
    assert "from 1 to 4096 steps" in refused(edited(file, put("steps", [{}] * 4097)))


def test_maps_that_outgrow_the_engine_are_refused():
    padded = [conv("c0")] + [conv(f"c{i}", f"c{i - 1}", (4, 4, 1, 1), padding=15) for i in range(1, 150)]
    text, weights = parts(to_rdp(tiny(*padded[:2]), "fp32"))
    with pytest.raises(UserError, match=r"maps of 4096"):
        to_rdp(tiny(*padded))
    text["input"][1:] = [4096, 4096]
    text["steps"][0]["padding"] = 15
    assert "more than 4096 pixels a side" in refused(assemble(json.dumps(text).encode(), weights))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "byte 0: expected a value"),
        (b"{", "expected a key"),
        (b"[1,]", "expected a value"),
        (b'{"a":1,}', "expected a key"),
        (b'{"a" 1}', "expected ':'"),
        (b'{"a":1 "b":2}', "expected ',' or '}'"),
        (b"[1 2]", "expected ',' or ']'"),
        (b"{} {}", "something follows"),
        (b"{}\0", "something follows"),
        (b"nul", "expected a value"),
        (b"NaN", "expected a value"),
        (b"Infinity", "expected a value"),
        (b"01", "something follows"),
        (b"1.", "expected a value"),
        (b".5", "expected a value"),
        (b"+1", "expected a value"),
        (b"1e", "expected a value"),
        (b"- 1", "expected a value"),
        (b"1e999", "out of range"),
        (b"9" * 400, "out of range"),
        (b'"', "does not end"),
        (b'"\n"', "control character"),
        (b'"\\x"', "unknown escape"),
        (b'"\\u12"', "four hexadecimal"),
        (b'"\\u12G4"', "four hexadecimal"),
        (b'"\\u-123"', "four hexadecimal"),
        (b'"\\ud800"', "half a surrogate"),
        (b'"\\udc00"', "half a surrogate"),
        (b'"\\ud800\\u0041"', "half a surrogate"),
        (b'"\x80"', "not UTF-8"),
        (b'"\xc0\x80"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xf4\x90\x80\x80"', "not UTF-8"),
        (b'"\xe2\x82', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "expected a value"),
        (b'{"a":1,"a":2}', "a key stands twice"),
        (b'{"a":1,"\\u0061":2}', "a key stands twice"),
        (b'[{"b":{"a":1,"c":2,"a":3}}]', "a key stands twice"),
        (b"[" * 65, "nested too deeply"),
        (b"[" * 10_000_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"0," * 2_100_000 + b"0]", "too many values"),
    ],
)
def test_wrong_json_is_refused(text, message):
    assert message in refused(assemble(text, b""))


def test_names_of_any_script_come_out_as_they_went_in():
    classes = ("Käfer", "蛙🐸", 'quote"\\/\b\f\n\r\t', "", "\x7f\u2028", "a" * 5000)
    steps = tiny(conv("☃/1"), classes=classes)
    network = Network.from_bytes(to_rdp(steps))
    assert network.classes == classes
    description, weights = parts(to_rdp(steps))
    escaped = json.dumps(description, ensure_ascii=True, indent=1).encode()  # surrogate pairs, white space
    assert Network.from_bytes(assemble(escaped, weights)).classes == classes


def test_a_million_classes_are_read():
    chain = tiny(conv(), classes=tuple(map(str, range(1_000_000))))
    assert Network.from_bytes(to_rdp(chain, "bf16")).info.classes == 1_000_000
    with pytest.raises(UserError, match="1000000 classes"):
        to_rdp(dataclasses.replace(tiny(conv(), classes=tuple(map(str, range(1_000_001))))))


def weights_edited(file: bytes, kind: str, at: int, value: bytes) -> bytes:
    """The file with other bytes in the ``kind`` ("weight" or "bias") of its second step."""
    description, weights = parts(file)
    start = description["steps"][1][kind] + at
    return assemble(json.dumps(description).encode(), weights[:start] + value + weights[start + len(value) :])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers_are_refused(precision, value):
    file, bits = to_rdp(CHAINS["residual"], precision), struct.pack("<f", value)
    for kind, content in (("weight", bits if precision == "fp32" else bits[2:]), ("bias", bits)):
        for at in (0, len(content)):  # both halves of what is looked at together
            said = refused(weights_edited(file, kind, at, content))
            assert "step 'block1.conv1' has weights that are NaN or infinite" in said


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_weights_are_taken(precision):
    largest = struct.pack("<f", {"fp32": np.finfo(np.float32).max, "bf16": 3.3895313892515355e38}[precision])
    content = largest if precision == "fp32" else largest[2:]
    Network.from_bytes(weights_edited(to_rdp(CHAINS["residual"], precision), "weight", 0, content))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_in_the_padding_are_refused(precision):
    """The second step has 4 inputs and 4 outputs of the 16 that are stored."""
    file = to_rdp(CHAINS["residual"], precision)
    size, one = (4, struct.pack("<f", 1)) if precision == "fp32" else (2, struct.pack("<f", 1)[2:])
    padding = "step 'block1.conv1' has values in the padding of its weights"
    for index in (4, 15, 16 + 4, 16 * 4, 16 * 15 + 15) if size == 4 else (8, 31, 32 + 8, 32 * 2, 32 * 7 + 31):
        assert padding in refused(weights_edited(file, "weight", index * size, one))
    assert padding in refused(weights_edited(file, "bias", 16, struct.pack("<f", 1)))


def test_weights_that_are_missing_or_left_over_are_refused(file):
    description, weights = parts(file)
    text = json.dumps(description).encode()
    assert "larger than the steps' weights" in refused(assemble(text, weights + bytes(64)))
    assert "end beyond the file" in refused(assemble(text, weights[:-64]))
    assert "end beyond the file" in refused(assemble(text, b""))


def test_paths_that_are_no_files(tmp_path, file):
    (tmp_path / "empty.rdp").touch()
    (tmp_path / "short.rdp").write_bytes(file[:-64])
    for name, message in (
        ("missing.rdp", "missing.rdp: No such file"),
        ("empty.rdp", "empty.rdp is empty"),
        ("short.rdp", "short.rdp: the .rdp file has"),
        (".", "is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            Network.load(tmp_path / name)


def test_the_fuzzers_seeds_are_what_the_script_makes():
    seeds = corpus_maker().seeds()
    assert {path.name: path.read_bytes() for path in CORPUS.iterdir()} == seeds
    assert sum(map(len, seeds.values())) < 300_000
