"""The suite's JSON file: what is measured is written at once, and what is there is not measured again."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from rd_deploy.common import UserError, check_file, write_json

FORMAT = "residual-distillation/gpu-suite/1"
ROOT = Path(__file__).resolve().parents[2]
# What two sittings must share to be one measurement.
SAME = {
    "dry run": lambda head: head["dry"],
    "state of the sources": lambda head: head["sources"],
    "card": lambda head: head["card"]["name"],
    "assembler": lambda head: head.get("assembler", "unknown"),
}
FINISHED = ("measured", "passed", "failed")  # what was skipped or not reached is tried again


@dataclass
class Record:
    """One result file. ``head``: what describes all rows; ``rows``: by their keys, in the order they were made."""

    path: Path
    head: dict
    rows: dict[str, dict] = field(default_factory=dict)
    sittings: list[dict] = field(default_factory=list)

    def finished(self, key: str) -> bool:
        return self.rows.get(key, {}).get("status") in FINISHED

    def add(self, key: str, row: dict) -> None:
        """Keep a row and write the file: whoever kills the suite now loses nothing of it."""
        self.rows.pop(key, None)
        self.rows[key] = row
        self.save()

    def of(self, part: str) -> dict[str, dict]:
        """The rows of one part."""
        return {key: row for key, row in self.rows.items() if key.startswith(f"{part}/")}

    @property
    def warnings(self) -> list[str]:
        return [f"{key}: {text}" for key, row in self.rows.items() for text in row.get("warnings", ())]

    @property
    def failures(self) -> list[str]:
        return [key for key, row in self.rows.items() if row["status"] == "failed"]

    def save(self) -> None:
        rows = [{"key": key, **row} for key, row in self.rows.items()]
        write_json(self.path, {**self.head, "sittings": self.sittings, "warnings": self.warnings, "rows": rows})


def open_record(path: Path, head: dict, sitting: dict) -> Record:
    """A new record, or the one at ``path`` to go on with; one of other sources or another card is a `UserError`.

    ``sitting``: what describes this run of the suite alone, such as its options and date.
    """
    record = Record(path, head)
    if path.exists():
        old = _read(path)
        pairs = {name: (of(old), of(head)) for name, of in SAME.items()}
        differing = [f"{name} ({theirs}, here {ours})" for name, (theirs, ours) in pairs.items() if theirs != ours]
        if differing:
            raise UserError(f"{path} is of another {' and '.join(differing)}: give another --out or remove it")
        record.head = head | {name: old[name] for name in head if name in old}
        record.rows = {row.pop("key"): row for row in old["rows"]}
        record.sittings = old["sittings"]
    record.sittings = [*record.sittings, sitting]
    record.save()
    return record


def _read(path: Path) -> dict:
    try:
        old = json.loads(check_file(path, "result file").read_text(encoding="utf-8"))
        rows = old["rows"]
        known = [of(old) is not None for of in SAME.values()]
        whole = all("key" in row and "status" in row for row in rows) and isinstance(old["sittings"], list)
        if old["format"] == FORMAT and whole and all(known):
            return old
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no result of this suite: give another --out")


def sources_digest() -> str:
    """Identity of the code that is measured and measures, with or without a git checkout."""
    digest = hashlib.sha256()
    for folder in ("rd_deploy", "rd_train", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
