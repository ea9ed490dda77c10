"""How good a quantised network is: against the labels, and against the network it was made from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from rd_deploy.common import UserError
from rd_deploy.quantize.data import Samples


@dataclass(frozen=True)
class Score:
    """``accuracy``: share of images, None without labels; ``agreement``: share that keep the original's class.

    ``mean_error``: of the logits, in standard deviations of the original's; infinite when they are not finite.
    """

    images: int
    accuracy: float | None
    agreement: float
    mean_error: float

    def to_dict(self) -> dict:
        return {**asdict(self), "mean_error": self.mean_error if np.isfinite(self.mean_error) else None}

    def order(self) -> tuple[float, float]:
        """More is better: accuracy, then the error; without labels the error alone, which is finer than agreement."""
        return (0.0 if self.accuracy is None else self.accuracy), -self.mean_error


class Judge:
    """Some images, and what the original network says about them, computed once; corrupt ones are left out.

    ``run``: float32 (N, C, H, W) to logits (N, classes), of the original; ``batch``: images at a time.
    """

    def __init__(self, samples: Samples, run: Callable[[np.ndarray], np.ndarray], batch: int):
        self.samples, self.batch = samples, batch
        logits = self._logits(run)
        corrupt = [*samples.corrupt()]  # known now that all have been read
        self.readable = np.delete(np.arange(samples.count), corrupt)
        if not self.readable.size:
            raise UserError(f"none of the {samples.count} {samples.origin} can be read; replace them")
        self.left_out = len(corrupt)
        self.labels = None if samples.labels is None else samples.labels[self.readable]
        self.logits = logits[self.readable]
        if not np.isfinite(self.logits).all() or self.logits.std() == 0:
            raise UserError(f"the network gives no usable logits for the {samples.origin}: it is dead; train again")

    def original(self) -> Score:
        """The original's own score."""
        return self._score(self.logits)

    def judge(self, run: Callable[[np.ndarray], np.ndarray]) -> Score:
        """The score of another network with the same classes."""
        return self._score(self._logits(run)[self.readable])

    def _logits(self, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([run(images) for images in self.samples.batches(self.batch)]).astype(np.float64)

    def _score(self, logits: np.ndarray) -> Score:
        if not np.isfinite(logits).all():
            return Score(len(logits), None if self.labels is None else 0.0, 0.0, float("inf"))
        classes, labels = logits.argmax(axis=1), self.labels
        return Score(
            images=len(logits),
            accuracy=None if labels is None else float((classes == labels).mean()),
            agreement=float((classes == self.logits.argmax(axis=1)).mean()),
            mean_error=float(np.abs(logits - self.logits).mean() / self.logits.std()),
        )
