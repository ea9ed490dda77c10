"""Ranges of feature maps from calibration images, by the calibrators of onnxruntime.quantization.

A range is the largest absolute value that is still told from larger ones (quantisation is symmetric around 0).
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from rd_deploy.chain import INPUT, Chain
from rd_deploy.common import UserError, first_line, nearest, require
from rd_deploy.export.onnx import to_onnx
from rd_deploy.quantize.qdq import KINDS, quantized_tensors

# onnxruntime's names, and options where its defaults are of no use. Its entropy calibrator has as many bins as it
# merges them into (128 and 128), so that it can only return the largest value; here 1,024 are merged into 256, the
# steps of 8 bits, and ranges from a quarter of the largest value on are tried.
METHODS = {
    "minmax": ("MinMax", {"symmetric": True}),
    "percentile": ("Percentile", {"symmetric": True, "percentile": 99.99}),
    "entropy": ("Entropy", {"symmetric": True, "num_bins": 1024, "num_quantized_bins": 256}),
    "distribution": ("Distribution", {"num_bins": 2048}),
}
# onnxruntime's distribution calibrator is made for float8: it matches standard deviations, of the values and of the
# numbers that the type has. For int8 it says nothing but the largest value.
CALIBRATORS = {"int8": ("minmax", "percentile", "entropy"), "fp8": tuple(METHODS)}
# Of all maps of a batch together: onnxruntime's calibrators hold them at once, and a copy of one.
BATCH_BYTES = 256 << 20
ADVICE = "use other images, another calibrator, or train again"


class CalibrationError(UserError):
    """A calibrator found no ranges in these images; another one may."""


def check_calibrator(name: str, kind: str) -> None:
    """Raise `UserError` for a calibrator that does not exist, or not for this kind; ``auto`` is all of them."""
    known = ("auto", *CALIBRATORS[kind])
    if name not in known:
        raise UserError(f"calibrator '{name}' is none of {kind}'s{nearest(name, known)}")


def calibrate(chain: Chain, kind: str, method: str, images: Iterable[np.ndarray]) -> dict[str, float]:
    """The range of every tensor that ``kind`` quantises, found by ``method`` (of `CALIBRATORS`) in batches of images.

    ``images``: float32 batches (N, C, H, W); only one is in memory at a time if they come from a generator. Raises
    `CalibrationError` when a tensor is 0 wherever the calibrator looks, or not finite.
    """
    check_calibrator(method, kind)
    names = quantized_tensors(chain, KINDS[kind])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        found = _collect(_marked(chain, names), method, images, Path(folder))
    ranges = {name: _range(found[name], method, kind) for name in names}
    for name, value in ranges.items():
        if not 0 < value < np.inf:  # NaN included
            what = "nothing but 0" if value == 0 else "no finite range"
            raise CalibrationError(f"{method} finds {what} in {name}: {ADVICE}")
    return ranges


def batch_size(chain: Chain) -> int:
    """Images of which all feature maps fit into `BATCH_BYTES`, 1 at least and 64 at most."""
    size = 4 * sum(int(np.prod(shape)) for shape in chain.shapes().values())
    return int(np.clip(BATCH_BYTES // size, 1, 64))


def _marked(chain: Chain, names: Sequence[str]) -> onnx.ModelProto:
    """The float32 network with a node of a type of its own on each tensor to calibrate: a calibrator is told types.

    Shape is one that costs nothing; its result is no float and so not calibrated.
    """
    model = to_onnx(chain)
    model.graph.node.extend(helper.make_node("Shape", [name], [f"{name}/shape"], f"{name}/shape") for name in names)
    return model


def _collect(model: onnx.ModelProto, method: str, images: Iterable[np.ndarray], folder: Path):
    quantization = require("onnxruntime.quantization", "")
    onnx.save(model, folder / "model.onnx")
    name, options = METHODS[method]
    calibrator = quantization.create_calibrator(
        folder / "model.onnx",
        ["Shape"],
        str(folder / "augmented.onnx"),
        getattr(quantization.CalibrationMethod, name),
        extra_options=options,
    )
    try:
        for batch in _finite(images):
            calibrator.collect_data(_OneBatch(batch))  # a call each: a call holds the maps of all its batches
        return calibrator.compute_data().data
    except (ValueError, AttributeError) as error:  # no images; or histograms of what is not finite
        raise CalibrationError(f"{method} finds no ranges ({first_line(error)}): {ADVICE}") from error


def _finite(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches as they are; the calibrators leave NaN out silently."""
    for batch in images:
        if not np.isfinite(batch).all():
            raise CalibrationError("calibration images hold NaN or infinity: check the images and the preprocessing")
        yield batch


class _OneBatch:
    """What onnxruntime calls a CalibrationDataReader."""

    def __init__(self, images: np.ndarray):
        self.batches = iter([{INPUT: images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def _range(found, method: str, kind: str) -> float:
    if method == "distribution":
        return float(found.avg_std[1]) * KINDS[kind].largest / _deviation_of_fp8()
    return float(np.max(np.abs(found.range_value)))


def _deviation_of_fp8() -> float:
    """Standard deviation of all finite numbers of E4M3, as onnxruntime's quantizer takes it for this calibrator."""
    values = np.arange(256, dtype=np.uint8).view(KINDS["fp8"].dtype).astype(np.float32)
    return float(values[np.isfinite(values)].std())
