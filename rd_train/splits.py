"""How a data set is divided: always the same way, whatever the run's seed."""

import hashlib
import os

import numpy as np

from rd_deploy.common import UserError

SPLIT_SEED = 20  # fixed for good: another value would move test images into training


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """A fixed permutation whose every prefix holds the classes in their proportions.

    Each class is shuffled, its k-th of n members gets the position (k + 1/2) / n, and all are sorted by position.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")


def limited(labels: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices of the whole training split, or of its first ``limit`` images in stratified order."""
    if limit is None:
        return np.arange(len(labels))
    if not 1 <= limit <= len(labels):
        raise UserError(f"train_limit={limit} must be from 1 to the {len(labels):,} training images")
    return stratified_order(labels)[:limit]


def hashed_share(name: str) -> float:
    """A number in [0, 1) that depends on the name only: adding or removing files moves no other file."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


def check_labels(labels: np.ndarray, classes: list[str], where: str, *, every: bool = False) -> None:
    """Labels must lie in 0 .. classes - 1; with ``every``, each class must occur."""
    if len(labels) == 0:
        raise UserError(f"{where} has no images; add some")
    if len(classes) < 2:
        raise UserError(f"{where} has fewer than 2 classes; there is nothing to learn")
    if labels.min() < 0 or labels.max() >= len(classes):
        last = len(classes) - 1
        raise UserError(f"{where} has labels from {labels.min()} to {labels.max()}, not 0 to {last}; fix them")
    if every and (empty := lacking(labels, classes)):
        raise UserError(
            f"{where} has no images of class '{empty[0]}'; every class needs some, and several "
            "where validation or test images are taken from the same folder"
        )


def lacking(labels: np.ndarray, classes: list[str]) -> list[str]:
    """The classes that do not occur."""
    return [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]
