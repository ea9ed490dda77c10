"""What TensorRT-RTX plans for a network's feature maps: its builder's own account, which needs no GPU."""

from collections.abc import Sequence

from rd_deploy.bench.feature_maps import figure_row
from rd_deploy.bench.models import Subject
from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError
from rd_deploy.engines.base import ELEMENT_BYTES, Figure, Unsupported, weight_elements, with_batch
from rd_deploy.export.onnx import to_onnx
from rd_deploy.trt.build import Profile, build
from rd_deploy.trt.flavours import Flavour, load_flavour

SOURCE = "tensorrt-rtx builder"
# One GPU generation that TensorRT-RTX builds for and that runs every precision here.
TARGET = "sm89"
HOW = f"activation memory of an engine of this batch size for {TARGET}, workspaces included; nothing was run"


def builder_rows(subjects: Sequence[Subject], precisions: Sequence[str], batches: Sequence[int]) -> list[dict]:
    """A row for every network, precision and batch; raises `UserError` when TensorRT-RTX is not installed.

    What cannot be built has a row without a figure, whose ``how`` says why.
    """
    flavour = load_flavour("rtx")
    return [
        _row(flavour, subject, precision, batch)
        for precision in precisions
        for batch in batches
        for subject in subjects
    ]


def _row(flavour: Flavour, subject: Subject, precision: str, batch: int) -> dict:
    weights = weight_elements(subject.model) * ELEMENT_BYTES[precision]
    try:
        built = build(_model(subject, precision, batch), flavour, Profile(batch, batch, batch), (TARGET,))
        figure = Figure(SOURCE, built.activation_bytes, f"{HOW}, {flavour.version}")
    except (UserError, Unsupported) as reason:
        figure = Figure(SOURCE, None, str(reason))
    return figure_row(subject.name, precision, batch, None, weights, figure)


def _model(subject: Subject, precision: str, batch: int) -> bytes:
    """The network in a precision: fp32 as it is, else written again from the chain that it must be."""
    if precision == "fp32":
        return with_batch(subject.model, batch).SerializeToString()
    return to_onnx(chain_from_onnx(subject.model), precision).SerializeToString()
