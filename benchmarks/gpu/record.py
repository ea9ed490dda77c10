"""The suite's JSON file: what is measured is written at once, and what is there is not measured again."""

import contextlib
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from rd_deploy.common import UserError, check_file, write_json

FORMAT = "residual-distillation/gpu-suite/1"
ROOT = Path(__file__).resolve().parents[2]
# What two sittings must share to be one measurement, beside versions and settings.
SAME = {
    "dry run": lambda head: head["dry"],
    "state of the sources": lambda head: head["sources"],
    "card": lambda head: head["card"]["name"],
    "driver": lambda head: head["card"].get("driver") or "unknown",
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

    def finished(self, key: str, seconds: float = 0.0) -> bool:
        """Whether a row is not to be measured again by a sitting that samples for so many ``seconds``."""
        row = self.rows.get(key, {})
        return row.get("status") in FINISHED and row.get("sampling_seconds", seconds) >= seconds

    def add(self, key: str, row: dict) -> None:
        """Keep a row and write the file: whoever kills the suite now loses nothing of it.

        A finished row that could not be measured again stays as it was, with a warning. One that failed when it was
        keeps its figures as ``earlier``, which count no more.
        """
        old = self.rows.pop(key, {})
        if old.get("status") == "measured" and row["status"] == "failed":
            row = row | {"earlier": old}
        if old.get("status") in FINISHED and row["status"] not in FINISHED:
            warning = f"not measured again, with more sampling: {row.get('reason')}"
            self.rows[key] = old | {"warnings": list(dict.fromkeys([*old.get("warnings", ()), warning]))}
        else:
            self.rows[key] = row | {"sitting": self._sitting}
        self.save()

    def drop(self, key: str) -> None:
        """Let go of a row, in the file too."""
        del self.rows[key]
        self.save()

    @property
    def _sitting(self) -> dict:
        """The date and the commit of the sitting at work."""
        return {name: self.sittings[-1].get(name) for name in ("date", "commit")}

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
    """A new record, or the one at ``path`` to go on with; one that `differences` finds different is a `UserError`.

    ``sitting``: what describes this run of the suite alone, such as its options, date and commit.
    """
    record = Record(path, head)
    if path.exists():
        old = _read(path)
        if differing := differences(old, head):
            raise UserError(f"{path} is of another {differing}: give another --out or remove it")
        record.head = head | {name: old[name] for name in head if name in old}
        record.head["versions"] = head.get("versions", {}) | old.get("versions", {})
        record.rows = {row.pop("key"): row for row in old["rows"]}
        record.sittings = old["sittings"]
    record.sittings = [*record.sittings, sitting]
    record.save()
    return record


def differences(old: dict, head: dict) -> str:
    """What keeps two sittings from being one measurement, by their heads, each with both values; "" if nothing does.

    A package that only one of them had does not: without it an engine is skipped.
    """
    pairs = {name: (of(old), of(head)) for name, of in SAME.items()}
    for kind in ("versions", "settings"):
        theirs, ours = old.get(kind, {}), head.get(kind, {})
        pairs |= {name: (theirs[name], ours[name]) for name in theirs if name in ours}
    return " and ".join(f"{name} ({theirs}, here {ours})" for name, (theirs, ours) in pairs.items() if theirs != ours)


def default_path(folder: Path, name: str, head: dict) -> tuple[Path, str]:
    """Where a sitting writes that was given no file, and why not to the newest file there, if there is one.

    To the newest result in ``folder`` that it can go on with; else to a new file, ``name``.json or ``name``-2.json...
    """
    newest = ""
    for path, old in _results(folder):
        differing = differences(old, head)
        if not differing:
            return path, ""
        newest = newest or f"{path.name} is of another {differing}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{free}.json" for free in names) if not path.exists()), newest


def _results(folder: Path) -> list[tuple[Path, dict]]:
    """The suite's results in a folder, the one that was begun last first."""
    found = []
    for path in folder.glob("gpu-*.json"):
        with contextlib.suppress(UserError):  # what is no result is no business of ours
            found.append((path, _read(path)))
    return sorted(found, key=lambda result: (str(result[1].get("date")), result[0].name), reverse=True)


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
