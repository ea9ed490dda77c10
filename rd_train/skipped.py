"""Corrupt images of a run: counted, named, and too many of them an error."""

import json
import sys
import threading
from pathlib import Path

from rd_deploy.common import UserError, printable, write_text

SHOWN = 5  # on the terminal; all are in the file
MAX_CORRUPT = 10


class Skipped:
    """The corrupt images found so far, over all splits; ``limit`` of them are tolerated. Used by several threads.

    Those below ``root`` are counted, and named in the file, by their path from there.
    """

    def __init__(self, limit: int = MAX_CORRUPT, root: Path | None = None):
        self.limit, self.root = limit, root
        self.path: Path | None = None
        self._write = True
        self._reasons: dict[str, str] = {}
        self._agreed = 0  # so many of them all processes know of
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, path: Path, *, resume: bool, write: bool = True) -> None:
        """Name them in this file from now on, and with ``resume`` count those it names already.

        Without ``write``, another process writes it, and tells of them on the terminal.
        """
        with self._lock:
            self.path, self._write = path, write
            if resume and path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                whole = [line[:-1] for line in lines if line.endswith("\n")]  # killed while it wrote the last one
                named = (line.partition("\t") for line in whole)  # absolute names by earlier versions
                self._reasons = {self._relative(name): reason for name, _, reason in named} | self._reasons
            if write and (self._reasons or path.is_file()):
                write_text(path, "".join(f"{name}\t{reason}\n" for name, reason in self._reasons.items()))

    def agree(self) -> None:
        """Count what the other processes found, too; all of them call this together.

        Too many in all are a `UserError` in each of them. Where nothing is new, they exchange a single number.
        """
        from rd_train import distributed  # torch is slow to import, and workers do without

        if distributed.world() == 1:
            return
        with self._lock:
            own = dict(self._reasons)
        if not distributed.any_process(len(own) > self._agreed):
            return
        found = {}
        for text in distributed.of_each(json.dumps(own)):
            found |= json.loads(text)
        self._agreed = len(found)
        for name, reason in found.items():
            self.add(name, reason)

    def _relative(self, name: str) -> str:
        """The name within the data's folder, so that it is the same where that has moved to."""
        path = Path(name)
        return str(path.relative_to(self.root)) if self.root and path.is_relative_to(self.root) else name

    def add(self, name: str, reason: str) -> None:
        """Count an image that was not counted yet; one more than ``limit`` is a `UserError`."""
        name, reason = printable(self._relative(name)), printable(reason)
        with self._lock:
            if name in self._reasons:
                return
            if len(self._reasons) >= self.limit:
                more = f"; the others are in {self.path}" if self._reasons and self.path else ""
                raise UserError(f"more corrupt images than rd-train's --max-corrupt {self.limit}: {reason}{more}")
            self._reasons[name] = reason
            if not self._write:
                return
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{name}\t{reason}\n")
            if len(self._reasons) <= SHOWN:
                print(f"skipped  {reason}", file=sys.stderr)
            elif len(self._reasons) == SHOWN + 1 and self.path is not None:
                print(f"skipped  more; all are named in {self.path}", file=sys.stderr)
