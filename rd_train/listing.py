"""Which images a split has, and where their bytes are. Free of torch, like `rd_train.decode`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rd_train.decode import Place
from rd_train.splits import hashed_share


@dataclass(frozen=True)
class Listing:
    """Images below ``root`` and their class numbers int64 (N,).

    ``files``: CLASS/FILE, or SHARD/MEMBER of tars. ``shards``: the tars, and ``spans`` int64 (N, 3) the number of the
    tar, offset and length of each image; None where each image is a file of its own. ``ignored``: how many entries of
    the class folders below ``root`` are no images by their name, nested folders among them, and one of these.
    """

    root: Path
    files: list[str]
    labels: np.ndarray
    shards: list[str] = field(default_factory=list)
    spans: np.ndarray | None = None
    ignored: tuple[int, str] = (0, "")

    def select(self, chosen: np.ndarray) -> "Listing":
        """Those at the given indices."""
        spans = None if self.spans is None else self.spans[chosen]
        files = [self.files[index] for index in chosen]
        return replace(self, files=files, labels=self.labels[chosen], spans=spans)

    def place(self, index: int) -> Place:
        """Where the bytes of an image are."""
        if self.spans is None:
            return Place(str(self.root / self.files[index]))
        shard, offset, length = self.spans[index].tolist()
        return Place(str(self.root / self.shards[shard]), offset, length)

    def divide(self, bounds: tuple[float, ...], keys: list[str] | None = None) -> list["Listing"]:
        """Parts by the hash of each image's key (by default its name): from 0 to the first bound, and so on to 1."""
        part = np.searchsorted(bounds, [hashed_share(key) for key in keys or self.files], side="right")
        return [self.select(np.flatnonzero(part == number)) for number in range(len(bounds) + 1)]
