"""The layers of a built engine, read from the builder's log: what was fused, in which precision it runs.

A builder with detailed profiling lists its layers in one message of severity VERBOSE, which needs no GPU; the engine
inspector, which does, says the same. Seen with TensorRT-RTX 1.7.
"""

import re
from dataclasses import dataclass

HEAD = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[")
OUTPUTS = re.compile(r"\], Outputs: \[(?P<outputs>.*?)\], TacticName: ")
TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Tensor:
    """A map between layers; -1 in ``shape`` is the batch of a dynamic profile. ``dtype``: ``Float``, ``Half``, ..."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine. ``onnx``: the nodes of the ONNX file that were fused into it, none for a copy."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    onnx: tuple[str, ...]

    @property
    def is_reformat(self) -> bool:
        """Whether it only moves, reorders or converts what others compute.

        TensorRT-RTX names a generated kernel after its operations (``__myl_CastConc_...``), enterprise TensorRT has a
        kind of its own.
        """
        generated = re.match(r"__myl_([A-Za-z]+)", self.name)
        if self.kind == "kgen" and generated:
            return set(re.findall("[A-Z][a-z]*", generated[1])) <= MOVES
        return self.kind in ("Reformat", "Shuffle", "NoOp")

    def to_dict(self) -> dict:
        """Compact, for a sidecar."""
        return {
            "name": self.name,
            "kind": self.kind,
            "reads": [tensor.dtype for tensor in self.inputs],
            "writes": [tensor.dtype for tensor in self.outputs],
            "onnx": list(self.onnx),
        }


# Operations that compute nothing, as TensorRT-RTX abbreviates them. Quantisation is one: others fuse it.
MOVES = {"Move", "Tran", "Cast", "Conc", "Resh", "Repl", "Slic", "Pad", "Quan", "Dequ", "Cvt", "Copy"}
# How a layer list names the types that convolutions are quantised to.
QUANTISED = {"int8": "Int8", "fp8": "FP8"}


def widened(layers: tuple[Layer, ...]) -> int:
    """How many layers multiply 8-bit maps and write wider ones, which another kernel has to read and quantise again.

    Where that is so, 8 bits save neither traffic nor memory. TensorRT-RTX 1.7 does it to every convolution.
    """
    eight_bits = set(QUANTISED.values())
    return sum(
        not layer.is_reformat
        and any(tensor.dtype in eight_bits for tensor in layer.inputs)
        and any(tensor.dtype not in eight_bits for tensor in layer.outputs)
        for layer in layers
    )


def parse_layers(messages: list[str]) -> tuple[Layer, ...]:
    """The layers in a builder's messages; none when it listed none."""
    lines = [line for message in messages if message.lstrip().startswith("Layers:") for line in message.splitlines()]
    return tuple(layer for layer in map(_layer, lines) if layer is not None)


def _layer(line: str) -> Layer | None:
    head, outputs = HEAD.search(line.strip()), OUTPUTS.search(line)
    if head is None or outputs is None:
        return None
    onnx = tuple(ONNX_LAYER.findall(line[outputs.end() :]))
    return Layer(head["name"], head["kind"], _tensors(head["inputs"]), _tensors(outputs["outputs"]), onnx)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(found["name"], tuple(int(size) for size in found["shape"].split(",") if size), found["dtype"])
        for found in TENSOR.finditer(text)
    )
