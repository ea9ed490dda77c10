"""What every engine offers: load one ONNX artefact for one precision, batch and thread count, then run images.

The base class checks what goes in and comes out; an engine's file holds only what is particular to it. Heavy imports
happen inside methods, so that naming an engine costs nothing.
"""

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from rd_deploy.common import UserError

PRECISIONS = ("fp32", "bf16")


class Unsupported(Exception):
    """This engine cannot do what was asked on this machine; the message is a one-line reason, nothing was run."""


@dataclass(frozen=True)
class Info:
    """What an engine says about a loaded network.

    ``feature_map_bytes``: peak bytes of feature maps in one run as the engine itself accounts for them, or None;
    ``feature_map_how`` says how that was measured, or why there is no figure. It is never the process's RSS.
    ``weight_bytes``: bytes of the weights in the precision they are held in, without copies a kernel may pack.
    """

    name: str
    version: str
    precision: str
    batch: int
    threads: int
    feature_map_bytes: int | None
    feature_map_how: str
    weight_bytes: int

    def to_dict(self) -> dict:
        return asdict(self)


class Session(ABC):
    """One network loaded on one engine. ``shape`` is (N, C, H, W), the only input it takes."""

    def __init__(self, engine: "Engine", model: onnx.ModelProto, precision: str, threads: int, batch: int):
        self.engine, self.precision, self.threads, self.batch = engine, precision, threads, batch
        self.shape = (batch, *image_shape(model))
        self.weight_bytes = weight_elements(model) * (2 if precision == "bf16" else 4)
        self._info: Info | None = None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, C, H, W) float32 in host memory to logits (N, classes) float32 in host memory."""
        if images.shape != self.shape or images.dtype != np.float32:
            raise UserError(f"the session takes float32 {self.shape}, got {images.dtype} {images.shape}")
        return self._run(images)

    def info(self) -> Info:
        """Name, version, precision, threads and memory; the first call may run the network once to account for it."""
        if self._info is None:
            feature_map_bytes, how = self._feature_maps()
            self._info = Info(
                name=self.engine.name,
                version=self.engine.version(),
                precision=self.precision,
                batch=self.batch,
                threads=self.threads,
                feature_map_bytes=feature_map_bytes,
                feature_map_how=how,
                weight_bytes=self.weight_bytes,
            )
        return self._info

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _feature_maps(self) -> tuple[int | None, str]: ...


class Engine(ABC):
    """A way to run an ONNX file.

    Subclasses set ``name``, ``package`` and the ``extra`` that installs it (None: a core dependency).
    """

    name: str
    package: str
    extra: str | None

    def missing(self) -> str | None:
        """None if the engine's package is installed, else one line saying how to get it."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        extra = f"[{self.extra}]" if self.extra else ""
        return f"{self.package} is not installed: pip install 'residual-distillation{extra}'"

    @abstractmethod
    def version(self) -> str:
        """Version of the engine's package."""

    def load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        """Prepare a network for one batch size.

        ``model``: one float32 input (N, C, H, W), N free or equal to ``batch``; first output (N, classes).
        Raises `Unsupported` when the engine, the CPU or the graph does not allow it, `UserError` for bad arguments.
        """
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}' (known: {', '.join(PRECISIONS)})")
        if batch < 1 or threads < 1:
            raise UserError("batch and threads must be at least 1")
        reason = self.missing()
        if reason:
            raise UserError(reason)
        session = self._load(with_batch(model, batch), precision, threads, batch)
        _try(session)
        return session

    @abstractmethod
    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session: ...


def _try(session: Session) -> None:
    """Run once: a graph the engine cannot execute is refused here, and not in the middle of a measurement."""
    try:
        logits = session.run(np.zeros(session.shape, np.float32))
    except Exception as error:  # engines raise classes of their own
        raise Unsupported(f"{session.engine.name} cannot run the model: {first_line(error)}") from error
    if logits.ndim != 2 or logits.shape[0] != session.batch or logits.dtype != np.float32:
        raise UserError(
            f"the model gives {logits.dtype} {logits.shape} for {session.batch} images, not float32 logits (N, classes)"
        )


def first_line(error: Exception) -> str:
    """What an engine's exception says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def image_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one input that is not a weight; anything but one float32 (N, C, H, W) tensor is a `UserError`."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise UserError(f"the ONNX model has {len(inputs)} inputs; give one with a single image input")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT or len(kind.shape.dim) != 4:
        raise UserError(f"ONNX input '{inputs[0].name}' must be float32 (N, C, H, W)")
    return inputs[0]


def image_shape(model: onnx.ModelProto) -> tuple[int, int, int]:
    """(C, H, W) of the image input, all fixed."""
    dims = image_input(model).type.tensor_type.shape.dim[1:]
    shape = tuple(dim.dim_value for dim in dims)
    if any(size < 1 for size in shape):
        raise UserError("the ONNX model leaves channels, height or width open; export it with a fixed image size")
    return shape


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch size an ONNX file is fixed to, or None when it is free."""
    dim = image_input(model).type.tensor_type.shape.dim[0]
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose batch dimension is ``batch``, so that every engine can plan with static shapes."""
    fixed = fixed_batch(model)
    if fixed not in (None, batch):
        raise Unsupported(f"the ONNX file is fixed to batch {fixed}; export it with a free batch dimension")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    image_input(copy).type.tensor_type.shape.dim[0].dim_value = batch
    for value in copy.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    del copy.graph.value_info[:]  # intermediate shapes may name the free dimension; engines infer them again
    return copy


def weight_elements(model: onnx.ModelProto) -> int:
    """Elements of all floating-point initialisers."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type in kinds)
