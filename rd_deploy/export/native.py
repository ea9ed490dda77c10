"""``.rdp`` files for the compiled engine: the chain as JSON, and its weights as the engine's kernels read them.

docs/rdp.md is the format's specification. NumPy only; the same chain gives the same bytes.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear, MaxPool, Step, round_to_bf16, sources
from rd_deploy.common import UserError, nearest
from rd_deploy.export import files
from rd_deploy.export.files import Artefact, make_artefact

FORMAT = "residual-distillation-rdp/1"
MAGIC, VERSION = b"\x89RDP\r\n\x1a\n", 1
SUFFIX = ".rdp"
PRECISIONS = ("fp32", "bf16")
PACKAGES = ("residual-distillation", "numpy", "torch")
HEADER = struct.Struct("<8sIIQQQQQQ")  # magic, version, 0, JSON's and weights' offset and bytes, file's bytes, checksum
ALIGNMENT = 64
LANES = 16  # outputs of a block
IMAGE_PITCH = 32  # to a multiple of this many inputs a row of the images' kernels is padded
CHECKSUM_LANES, CHECKSUM_FACTOR = 1024, np.uint64(0x9E3779B97F4A7C15)
CHECKSUM_WORD = 7  # of the header

# What the engine reads (see `_check_limits`).
MAX_JSON_BYTES, MAX_JSON_DEPTH = 256 << 20, 64
MAX_INPUT_CHANNELS, MAX_CHANNELS, MAX_SIDE, MAX_CLASSES, MAX_STEPS = 64, 65536, 4096, 1_000_000, 4096
MAX_KERNEL, MAX_STRIDE, MAX_PADDING, MAX_MAP_VALUES = 16, 16, 15, (1 << 31) - 1


# --- the file


def to_rdp(chain: Chain, precision: str = "fp32") -> bytes:
    """The ``.rdp`` file of a chain.

    ``precision``: of the weights, "fp32" or "bf16"; biases are float32 either way. Raises `UserError` when a value is
    out of the precision's range, or the engine does not take such a network.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
    chain.check()
    _check_limits(chain)
    tensors: list[bytes] = []
    steps = [_describe_step(step, precision, tensors) for step in chain.steps]
    description = {
        "format": FORMAT,
        "name": chain.name,
        "precision": precision,
        "input": list(chain.input_shape),
        "steps": steps,
        "preprocessing": chain.preprocessing.to_dict(),
        "classes": list(chain.classes),
        "arch": chain.arch,
        "provenance": chain.provenance,
        "weights_sha256": chain.sha256(),
    }
    return assemble(_json(description), b"".join(tensors))


def assemble(text: bytes, weights: bytes) -> bytes:
    """Header, JSON, zeros up to a multiple of 64 bytes, weights."""
    weights_at = _round_up(HEADER.size + len(text), ALIGNMENT)
    total = weights_at + len(weights)
    values = (MAGIC, VERSION, 0, HEADER.size, len(text), weights_at, len(weights), total)
    body = text.ljust(weights_at - HEADER.size, b"\0") + weights
    return HEADER.pack(*values, checksum(HEADER.pack(*values, 0) + body)) + body


def checksum(content: bytes) -> int:
    """Of a whole file, a multiple of 8 bytes, whose checksum field is taken as zero.

    Word i goes to lane i mod 1024, whose state x becomes (x ^ word) * factor, then x ^ (x >> 32), modulo 2^64; lane l
    starts at l. The lanes' states go the same way, in their order, to a last lane that starts at 0 and is the result.
    """
    words = np.frombuffer(content, "<u8")
    lanes, high = np.arange(CHECKSUM_LANES, dtype=np.uint64), np.empty(CHECKSUM_LANES, np.uint64)
    first = words[:CHECKSUM_LANES].copy()
    first[CHECKSUM_WORD] = 0
    for row in (first, *np.split(words[CHECKSUM_LANES:], range(CHECKSUM_LANES, len(words), CHECKSUM_LANES))):
        state, shifted = lanes[: len(row)], high[: len(row)]
        np.bitwise_xor(state, row, out=state)
        np.multiply(state, CHECKSUM_FACTOR, out=state)
        np.bitwise_xor(state, np.right_shift(state, np.uint64(32), out=shifted), out=state)
    result = 0
    for lane in lanes.tolist():
        result = (result ^ lane) * int(CHECKSUM_FACTOR) % 2**64
        result ^= result >> 32
    return result


def _json(description: dict) -> bytes:
    try:
        text = json.dumps(description, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start : error.end])
        raise UserError(f"a name holds {bad}, which no UTF-8 text can hold; rename the class or file") from error
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"{len(text) / 2**20:.0f} MiB of class names and provenance exceed the 256 MiB of a .rdp file")
    return text


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# --- steps and weights


def _describe_step(step: Step, precision: str, tensors: list[bytes]) -> dict:
    """A step as JSON; its weights are appended to ``tensors``."""
    if isinstance(step, GlobalAveragePool):
        return {"op": "avgpool", "name": step.name, "source": step.source}
    if isinstance(step, MaxPool):
        window = {"kernel": step.kernel, "stride": step.stride, "padding": step.padding}
        return {"op": "maxpool", "name": step.name, "source": step.source, **window}
    shape = {"in": step.weight.shape[1], "out": step.weight.shape[0]}
    offsets = {}
    for part, content in (("weight", packed_weight(step, precision)), ("bias", packed_bias(step))):
        offsets[part] = sum(map(len, tensors))
        tensors.append(content)
    if isinstance(step, Linear):
        return {"op": "linear", "name": step.name, "source": step.source, **shape, **offsets}
    window = {"kernel": list(step.weight.shape[2:]), "stride": step.stride, "padding": step.padding}
    entry = {"op": "conv", "name": step.name, "source": step.source, "add": step.add}
    return {**entry, **shape, **window, "relu": step.relu, **offsets}


def packed_weight(step: Conv | Linear, precision: str) -> bytes:
    """Weights in blocks of 16 outputs: [block][tap][k][16], or in bf16 [block][tap][k / 2][16][2]; padded with zeros.

    A convolution of the images has a tap per row of its kernel, whose k runs over the row's interleaved pixels, any
    other one has a tap per position of its kernel; a linear layer has one tap.
    """
    matrix, pitch = _taps(step)
    taps, inputs, outputs = matrix.shape
    blocks = -(-outputs // LANES)
    padded = np.zeros((taps, pitch, blocks * LANES), "<f4" if precision == "fp32" else "<u2")
    padded[:, :inputs, :outputs] = _rounded(matrix, step, "weight", precision)
    packed = padded.reshape(taps, pitch, blocks, LANES).transpose(2, 0, 1, 3)
    if precision == "bf16":
        packed = packed.reshape(blocks, taps, pitch // 2, 2, LANES).swapaxes(3, 4)
    return packed.tobytes()


def _taps(step: Conv | Linear) -> tuple[np.ndarray, int]:
    """The weights as (taps, k, out), and k after padding."""
    if isinstance(step, Linear):
        return step.weight.T[None], _round_up(step.weight.shape[1], LANES)
    out, channels, height, width = step.weight.shape
    by_position = step.weight.transpose(2, 3, 1, 0)
    if step.source == INPUT:
        return by_position.reshape(height, width * channels, out), _round_up(width * channels, IMAGE_PITCH)
    return by_position.reshape(height * width, channels, out), _round_up(channels, LANES)


def packed_bias(step: Conv | Linear) -> bytes:
    """The bias in float32, padded with zeros to a multiple of 16."""
    bias = np.zeros(_round_up(len(step.bias), LANES), "<f4")
    bias[: len(step.bias)] = _rounded(step.bias, step, "bias", "fp32")
    return bias.tobytes()


def _rounded(values: np.ndarray, step: Step, part: str, precision: str) -> np.ndarray:
    """float32, or the bits of bf16 (uint16); a value that becomes infinite is a `UserError`."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32) if precision == "fp32" else round_to_bf16(values)
    if not np.isfinite(rounded).all():
        raise UserError(
            f"{step.name}.{part} reaches {np.abs(values).max():.3g}, more than {precision} holds; train again"
        )
    return rounded if precision == "fp32" else (rounded.view(np.uint32) >> 16).astype(np.uint16)


# --- limits


def _check_limits(chain: Chain) -> None:
    """Raise `UserError` for what the engine would refuse to read."""
    shapes = chain.shapes()
    channels, *sides = chain.input_shape
    _check(channels <= MAX_INPUT_CHANNELS and max(sides) <= MAX_SIDE, "images of up to 64 channels and 4096 pixels")
    _check(len(chain.steps) <= MAX_STEPS, f"{MAX_STEPS} steps")
    _check(len(chain.classes) <= MAX_CLASSES, f"{MAX_CLASSES} classes")
    linear = [isinstance(step, Linear) for step in chain.steps]
    _check(linear[-1] and sum(linear) == 1, "one linear layer, the last step")
    _check(_nests((chain.arch, chain.provenance), MAX_JSON_DEPTH), f"JSON of a depth of {MAX_JSON_DEPTH}")
    _check(not any("\0" in name for name in (chain.name, *shapes, *chain.classes)), "names without zero characters")
    mean, std = np.array([chain.preprocessing.mean, chain.preprocessing.std])
    largest = np.finfo(np.float32).max
    _check(max(abs(mean).max(), std.max()) <= largest and np.float32(std.min()) > 0, "means and stds that fit float32")
    for step in chain.steps:
        _check_step(step, shapes)


def _check_step(step: Step, shapes: dict[str, tuple[int, ...]]) -> None:
    images = [index for index, name in enumerate(sources(step)) if name == INPUT]
    _check(not images or (isinstance(step, Conv) and images == [0]), "images that only convolutions read", step)
    shape = shapes[step.name]
    if len(shape) == 3:
        values = _round_up(shape[0], LANES) * shape[1] * shape[2]
        _check(max(shape[1:]) <= MAX_SIDE and values <= MAX_MAP_VALUES, "maps of 4096 pixels a side, 2^31 values", step)
        _check(shape[0] <= MAX_CHANNELS, f"{MAX_CHANNELS} channels", step)
    if isinstance(step, Conv | MaxPool):
        kernel = step.weight.shape[2:] if isinstance(step, Conv) else (step.kernel,)
        _check(max(kernel) <= MAX_KERNEL, f"kernels of {MAX_KERNEL} pixels", step)
        _check(step.stride <= MAX_STRIDE and step.padding <= MAX_PADDING, "a stride of 16 and a padding of 15", step)


def _nests(value: object, depth: int) -> bool:
    """Whether there are at most ``depth`` containers around a value."""
    if not isinstance(value, dict | list | tuple):
        return True
    return depth > 0 and all(
        _nests(inner, depth - 1) for inner in (value.values() if isinstance(value, dict) else value)
    )


def _check(fits: bool, limit: str, step: Step | None = None) -> None:
    if not fits:
        raise UserError(f"{step.name if step else 'the network'} does not fit the native engine, which takes {limit}")


# --- on disk


def make_native(
    path: str | Path, chain: Chain, precision: str = "fp32", verify: Callable[[bytes], dict] | None = None
) -> Artefact:
    """The .rdp file of a chain, and its sidecar, ready to be written to ``path`` and beside it.

    ``verify`` gets the file's bytes; what it returns becomes the sidecar's ``parity``, and it may raise.
    """
    path = check_target(path)
    content = to_rdp(chain, precision)
    *_, weight_bytes, _, _ = HEADER.unpack_from(content)
    particular = {"rdp_version": VERSION, "weight_bytes": weight_bytes}
    return make_artefact(path, sidecar_path(path), content, chain, precision, verify, particular, PACKAGES)


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a .rdp file lies: not at .json, which is that of the ONNX file."""
    return path.with_name(path.name + ".json")


def check_target(path: str | Path) -> Path:
    """The output path, if it ends in .rdp, can be written and nothing of others is in the way: before the work."""
    path = Path(path)
    files.check_target(path, SUFFIX, sidecar_path(path))
    return path
