"""Do the engines compute the same? Checked before anything is timed: a fast wrong answer is worthless."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from rd_deploy.engines import Session, get_engine
from rd_deploy.engines.base import fixed_batch

# Largest error of a logit over the largest reference logit. A bf16 number has 8 significant bits, and errors of some
# fifty layers add up; whatever is wrong by more than a rounding goes far beyond these.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
IMAGES = 8


@dataclass(frozen=True)
class Agreement:
    """Of one session with ONNX Runtime fp32 on random images. ``max_error``: relative to the largest logit."""

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
        error = "NaN" if self.max_error is None else f"{self.max_error:.2g}"
        return (
            f"{self.model}: logits differ from ONNX Runtime fp32 by {error} of the largest "
            f"(tolerance {self.tolerance:g}): not timed"
        )


@dataclass(frozen=True)
class Reference:
    """Random images (n, C, H, W) and their logits (n, classes) by ONNX Runtime in fp32."""

    images: np.ndarray
    logits: np.ndarray


def reference(model: onnx.ModelProto, batches: list[int], shape: tuple[int, int, int], seed: int = 0) -> Reference:
    """Logits of enough images for every batch size, computed at batch 1 (or the file's own)."""
    batch = fixed_batch(model) or 1
    count = batch * math.ceil(max(IMAGES, *batches) / batch)
    images = random_images(count, shape, seed)
    session = get_engine("onnxruntime").load(model, "fp32", threads=1, batch=batch)
    return Reference(images, _run_all(session, images))


def compare(name: str, session: Session, truth: Reference) -> Agreement:
    """Run a session on the reference images, as many whole batches as there are."""
    whole = len(truth.images) // session.batch * session.batch
    logits, expected = _run_all(session, truth.images[:whole]), truth.logits[:whole]
    error = float(np.abs(logits - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    tolerance = TOLERANCE[session.precision]
    return Agreement(
        model=name,
        engine=session.engine.name,
        precision=session.precision,
        batch=session.batch,
        images=whole,
        max_error=error if math.isfinite(error) else None,
        top1=float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        tolerance=tolerance,
        agrees=math.isfinite(error) and error <= tolerance,
    )


def random_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Images (count, C, H, W), float32: a random colour per image plus noise, so that logits differ over images."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, *shape), dtype=np.float32)
    return noise + rng.standard_normal((count, shape[0], 1, 1), dtype=np.float32)


def _run_all(session: Session, images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), session.batch)
    return np.concatenate([session.run(images[start : start + session.batch]) for start in starts])
