"""What every engine offers: load one ONNX artefact for one precision, batch and thread count, then run images.

The base class checks what goes in and comes out; an engine's file holds only what is particular to it. Heavy imports
happen inside methods, so that naming an engine costs nothing.
"""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx

from rd_deploy.common import UserError, first_line, install_hint
from rd_deploy.onnx_files import fixed_batch, runtime_inputs

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PRECISIONS = tuple(ELEMENT_BYTES)
# What a weight can be besides float32, by the names that ONNX gives: other floats, and integers of a byte or less.
FLOATS, SMALL_INTEGERS = ("FLOAT", "BFLOAT", "DOUBLE"), ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
OTHER_WEIGHTS = tuple(
    value
    for name, value in onnx.TensorProto.DataType.items()
    if value != onnx.TensorProto.FLOAT and (name.startswith(FLOATS) or name in SMALL_INTEGERS)
)
QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class Unsupported(Exception):
    """This engine cannot do what was asked on this machine; the message is a one-line reason, nothing was run."""


@dataclass(frozen=True)
class Figure:
    """Peak bytes of feature maps in one run, by one account of an engine's. It is never the process's RSS.

    ``source``: whose account, such as "torch allocator". ``how``: what was counted, or, when ``peak_bytes`` is None,
    why there is no figure.
    """

    source: str
    peak_bytes: int | None
    how: str


class Session(ABC):
    """One network loaded on one engine. ``shape`` is (N, C, H, W), the only input it takes.

    ``weight_bytes``: bytes of the weights in the session's precision, without copies that a kernel may pack.
    """

    def __init__(self, engine: "Engine", model: onnx.ModelProto, precision: str, threads: int, batch: int):
        self.engine, self.precision, self.threads, self.batch = engine, precision, threads, batch
        self.shape = (batch, *image_shape(model))
        self.weight_bytes = weight_elements(model) * ELEMENT_BYTES[precision]
        self._figures: tuple[Figure, ...] = ()

    @property
    def variant(self) -> str | None:
        """What the engine chose to run with, such as an instruction set; None: nothing that it tells."""
        return None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) float32 in host memory to logits (N, classes) float32 in host memory."""
        if images.shape != self.shape or images.dtype != np.float32:
            raise UserError(f"the session takes float32 {self.shape}, got {images.dtype} {images.shape}")
        return self._run(images)

    def feature_maps(self) -> tuple[Figure, ...]:
        """The engine's own accounts of its feature maps, at least one; the first call may run the network for them."""
        if not self._figures:
            try:
                self._figures = self._feature_maps()
            except Exception as error:  # profilers change between versions; that must not cost the times measured
                self._figures = (Figure(self.engine.name, None, f"its account failed: {first_line(error)}"),)
        return self._figures

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _feature_maps(self) -> tuple[Figure, ...]: ...


class Engine(ABC):
    """A way to run an ONNX file.

    Subclasses set ``name``, ``package`` and the ``extra`` that installs it (None: a core dependency), and, where they
    differ from these, the ``device`` it computes on and the ``precisions`` it has there.
    """

    name: str
    package: str
    extra: str | None
    device = "cpu"
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def missing(self) -> str | None:
        """None if the engine's package can be imported, else one line saying how to get it."""
        install = install_hint(self.extra)
        try:
            importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            if error.name == self.package:
                return f"{self.package} is not installed: {install}"
            return f"{self.package} is installed but cannot be imported ({first_line(error)}): {install}"
        except Exception as error:  # a broken installation: a library that is missing, binaries of another NumPy
            return f"{self.package} is installed but cannot be imported ({first_line(error)}): install it again"
        return None

    def load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        """Prepare a network for one batch size.

        ``model``: one float32 input (N, C, H, W), N free or equal to ``batch``; first output (N, classes).
        Raises `Unsupported` when the engine, the CPU or the graph does not allow it, `UserError` for bad arguments.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}' (known: {', '.join(PRECISIONS)})")
        if batch < 1 or threads < 1:
            raise UserError("batch and threads must be at least 1")
        if precision not in self.precisions:
            raise Unsupported(f"{self.name} runs {' and '.join(self.precisions)}, not {precision}")
        reason = self.missing()
        if reason:
            raise UserError(reason)
        return self._tried(with_batch(model, batch), precision, threads, batch)

    def _tried(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        """Load and run once: what the engine cannot do is refused here, and not in the middle of a measurement."""
        try:
            session = self._load(model, precision, threads, batch)
            logits = session.run(np.zeros(session.shape, np.float32))
        except (Unsupported, UserError):
            raise
        except Exception as error:  # engines raise classes of their own
            raise Unsupported(f"{self.name} cannot run the model: {first_line(error)}") from error
        if logits.ndim != 2 or logits.shape[0] != batch or logits.dtype != np.float32:
            raise Unsupported(
                f"the model gives {logits.dtype} {logits.shape} for {batch} images, not float32 logits (N, classes)"
            )
        return session

    @abstractmethod
    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session: ...


def image_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one input that is not a weight; anything but one float32 (N, C, H, W) tensor is a `UserError`.

    So is a file that is quantised or whose weights are not float32: an engine would run it, and its times would pass
    for float32's.
    """
    _check_float32(model)
    inputs = runtime_inputs(model)
    if len(inputs) != 1:
        raise UserError(f"the ONNX model has {len(inputs)} inputs; give one with a single image input")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT or len(kind.shape.dim) != 4:
        raise UserError(f"ONNX input '{inputs[0].name}' must be float32 (N, C, H, W)")
    return inputs[0]


def _check_float32(model: onnx.ModelProto) -> None:
    quantiser = next((node.op_type for node in model.graph.node if node.op_type in QUANTISERS), None)
    if quantiser is not None:
        raise UserError(f"the ONNX file is quantised (it has {quantiser}); give the fp32 export")
    other = next((tensor for tensor in model.graph.initializer if tensor.data_type in OTHER_WEIGHTS), None)
    if other is not None:
        kind = onnx.TensorProto.DataType.Name(other.data_type).lower()
        raise UserError(f"the ONNX file holds {kind} weights ('{other.name}'); give the fp32 export")


def image_shape(model: onnx.ModelProto) -> tuple[int, int, int]:
    """(C, H, W) of the image input; `fixed_batch` refuses files that leave one of them open."""
    return tuple(dim.dim_value for dim in image_input(model).type.tensor_type.shape.dim[1:])


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose batch dimension is ``batch``, so that every engine can plan with static shapes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    images, fixed = image_input(copy), fixed_batch(copy)
    if fixed not in (None, batch):
        raise Unsupported(f"the ONNX file is fixed to batch {fixed}; export it with a free batch dimension")
    images.type.tensor_type.shape.dim[0].dim_value = batch
    for value in copy.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    del copy.graph.value_info[:]  # intermediate shapes may name the free dimension; engines infer them again
    return copy


def weight_elements(model: onnx.ModelProto) -> int:
    """Elements of all floating-point initialisers (`image_input` refuses others than float32)."""
    floats = (tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    return sum(int(np.prod(tensor.dims)) for tensor in floats)
