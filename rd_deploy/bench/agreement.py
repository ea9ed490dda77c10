"""Do the engines compute the same? Checked before anything is timed: a fast wrong answer is worthless."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from rd_deploy import parity
from rd_deploy.common import UserError
from rd_deploy.engines import Session, get_engine
from rd_deploy.onnx_files import fixed_batch

IMAGES = 8


@dataclass(frozen=True)
class Agreement:
    """Of one session with ONNX Runtime fp32 on random images.

    ``max_error``: in standard deviations of the reference's logits, None when the session gives NaN or infinity.
    """

    model: str
    engine: str
    precision: str
    batch: int
    images: int
    max_error: float | None
    top1: float
    tolerance: float
    agrees: bool

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def text(self) -> str:
        if self.max_error is None:
            return f"{self.model}: logits are NaN or infinite: not timed"
        return (
            f"{self.model}: logits differ from ONNX Runtime fp32 by {self.max_error:.2g} of their standard deviation "
            f"(tolerance {self.tolerance:g}, top-1 agreement {self.top1:.0%}): not timed"
        )


@dataclass(frozen=True)
class Reference:
    """Random images (n, C, H, W) and their logits (n, classes) by ONNX Runtime in fp32."""

    images: np.ndarray
    logits: np.ndarray


def reference(
    model: onnx.ModelProto, batches: list[int], shape: tuple[int, int, int], seed: int = 0, threads: int = 1
) -> Reference:
    """Logits of enough images for every batch size, computed at batch 1 (or the file's own).

    Raises `UserError` when they mean nothing (NaN, all equal): every engine would agree with them, or none.
    """
    batch = fixed_batch(model) or 1
    count = batch * math.ceil(max(IMAGES, *batches) / batch)
    images = random_images(count, shape, seed)
    logits = _run_all(get_engine("onnxruntime").load(model, "fp32", threads, batch), images)
    _compare(logits, logits, parity.TOLERANCES["fp32"])
    return Reference(images, logits)


def compare(name: str, session: Session, truth: Reference) -> Agreement:
    """Run a session on at least `IMAGES` reference images, if there are as many, in whole batches."""
    wanted = session.batch * math.ceil(IMAGES / session.batch)
    whole = min(wanted, len(truth.images) // session.batch * session.batch)
    logits = _run_all(session, truth.images[:whole])
    found = _compare(truth.logits[:whole], logits, parity.TOLERANCES[session.precision])
    return Agreement(
        model=name,
        engine=session.engine.name,
        precision=session.precision,
        batch=session.batch,
        images=whole,
        max_error=found.max_error if math.isfinite(found.max_error) else None,
        top1=found.top1_agreement,
        tolerance=found.tolerance,
        agrees=found.passes,
    )


def _compare(expected: np.ndarray, logits: np.ndarray, tolerance: float) -> parity.Parity:
    try:
        return parity.compare(expected, logits, tolerance)
    except parity.ParityError as reason:
        raise UserError(f"engines cannot be checked against each other on random images: {reason}") from reason


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Images (count, C, H, W), float32: a random colour per image plus noise, so that logits differ over images."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, *shape), dtype=np.float32)
    return noise + rng.standard_normal((count, shape[0], 1, 1), dtype=np.float32)


def _run_all(session: Session, images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), session.batch)
    return np.concatenate([session.run(images[start : start + session.batch]) for start in starts])
