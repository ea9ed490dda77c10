"""Reading ONNX files that may be damaged or hostile: what `load_model` returns is safe to analyse and to run.

Nothing is unpickled, sizes are checked before reading, and weights outside the model's folder are refused.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message

from rd_deploy.common import UserError, check_file, first_line

MAX_MODEL_BYTES = (2 << 30) - 1  # what protobuf can parse
MAX_ELEMENT_BYTES = 16  # a complex number of two doubles
# Of the types that weights mostly have; of others, some of which are packed, the size is left to their reader.
ELEMENT_BYTES = {
    **dict.fromkeys((onnx.TensorProto.INT8, onnx.TensorProto.UINT8), 1),
    **dict.fromkeys((onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16), 2),
    **dict.fromkeys((onnx.TensorProto.FLOAT, onnx.TensorProto.INT32), 4),
    **dict.fromkeys((onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64), 8),
}


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file; raises `UserError` for anything that is not a sound network with fixed image size.

    Weights stored beside the file ("external data") must lie in its own folder; they are checked for presence and
    size, and not read, since only their shapes are needed here.
    """
    path = check_file(path, "ONNX file", MAX_MODEL_BYTES)
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is truncated; export or copy it again") from error
    if not model.graph.node or not model.graph.output:
        raise UserError(f"ONNX file {path} has no {'nodes' if model.graph.output else 'outputs'}; export it again")
    messages = list(_messages(model))
    if not all(isinstance(text, str) for message in messages for text in _texts(message)):
        raise UserError(f"ONNX file {path} holds names that are not text; it is damaged, export or copy it again")
    for message in messages:
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(message, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise UserError(f"ONNX file {path} is not valid ({first_line(error)}); export it again") from error
    fixed_batch(model)
    return model


def _messages(message: Message) -> Iterator[Message]:
    """A protobuf message and every message in it, at any depth: tensors in subgraphs and functions too."""
    yield message
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _messages(part)


def _texts(message: Message) -> Iterator[str | bytes]:
    """The strings of one protobuf message; those that are not UTF-8 come out as bytes."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_STRING:
            yield from [value] if isinstance(value, str | bytes) else value


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse external weights that lie outside the model's folder, are missing, too short or of another size.

    Without a length all that follows the offset is read, and must be the tensor's size.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = entries.get("location", ""), path.resolve().parent
    if not location or "\0" in location or "\\" in location:
        raise UserError(f"ONNX file {path}: tensor '{tensor.name}' names no usable weight file; export it again")
    target = folder / location
    if folder not in target.resolve().parents:
        raise UserError(f"ONNX file {path} wants weights from outside its folder ({location!r}); it was refused")
    check_file(target, "weight file", 1 << 40)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as error:
        raise UserError(f"ONNX file {path}: tensor '{tensor.name}' has a bad offset or length") from error
    elements, each = math.prod(tensor.dims), ELEMENT_BYTES.get(tensor.data_type)
    wanted = length if each is None else elements * each
    there = target.stat().st_size
    if min(offset, length) < 0 or offset + (length or wanted) > there:
        raise UserError(f"weight file {target} is shorter than {path} says; copy it again")
    length = length or there - offset
    if length != wanted if each else length > elements * MAX_ELEMENT_BYTES:
        needed = f"{wanted:,}" if each else f"at most {elements * MAX_ELEMENT_BYTES:,}"
        what = f"tensor '{tensor.name}' needs {needed} bytes and has {length:,} in {target}"
        raise UserError(f"ONNX file {path}: {what}; export it again")


def runtime_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that are not weights (old files list weights as inputs too)."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {part.values.name for part in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in weights]


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the file fixes, None if it is dynamic; refuses inputs with any other dynamic dimension."""
    inputs = runtime_inputs(model)
    if not inputs:
        raise UserError("the ONNX network has no inputs; export it again")
    for value in inputs:
        if not value.type.tensor_type.HasField("shape"):
            raise UserError(f"input '{value.name}' has no shape; export the network with a fixed image size")
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value < 1:
                name = f" ('{dim.dim_param}')" if dim.dim_param else ""
                advice = "only the batch may be dynamic: export it with a fixed image size"
                raise UserError(f"input '{value.name}' has a dynamic dimension{name}; {advice}")
    first = inputs[0].type.tensor_type.shape.dim
    return first[0].dim_value if first and first[0].dim_value > 0 else None  # some exporters write -1
