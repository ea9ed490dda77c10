"""Committed results, and what a table made from them needs."""

import functools
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def find(pattern: str, machine: str = "*") -> dict | None:
    """The latest committed result of a kind, of any machine or one, with its path; None without one.

    Names of files begin with their date, and ``machine`` names a folder. Of files of one name that of the last folder,
    by its name, counts as the latest: files say no hour, and so it is the same one everywhere.
    """
    paths = sorted(RESULTS.glob(f"{machine}/{pattern}"), key=lambda path: (path.name, path.parent.name))
    if not paths:
        return None
    return read(paths[-1])


def read(path: Path) -> dict:
    """A committed result with its path."""
    return json.loads(path.read_text(encoding="utf-8")) | {"path": path.relative_to(ROOT).as_posix()}


def newest(pattern: str, machine: str = "*") -> dict:
    """The latest committed result of a kind, which there must be."""
    found = find(pattern, machine)
    if found is None:
        raise SystemExit(f"no {machine}/{pattern} under {RESULTS}; docs/development.md says what makes it")
    return found


def located(origin: dict) -> Path | None:
    """The committed file that a result says it is from; None where there is none, or more than one that it can be.

    ``origin``: its name or path below benchmarks/results, and its date, commit and machine, which tell files of one
    name apart. A file gets an ending (-first) where a later one of its folder takes its name.
    """
    name = origin["file"] if "/" in origin["file"] else f"*/{origin['file']}"
    for pattern in (name, f"{name.removesuffix('.json')}-*.json"):
        found = [path for path in RESULTS.glob(pattern) if _written(path) == _head(origin)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _head(document: dict) -> tuple:
    return document.get("date"), document.get("commit"), document.get("machine", {}).get("cpu")


@functools.cache
def _written(path: Path) -> tuple:
    return _head(read(path))


def command_of(document: dict) -> str:
    """The command that made a document, with the folders of files of results, which older commands lack.

    A bare name is that of a file in the document's folder, else of the one file that has it.
    """

    def full(word: str) -> str:
        if not word.endswith(".json") or "/" in word:
            return word
        paths = list(RESULTS.glob(f"*/{word}"))
        beside = (ROOT / document["path"]).with_name(word)
        found = [beside] if beside in paths else paths
        return found[0].relative_to(ROOT).as_posix() if len(found) == 1 else word

    return " ".join(map(full, document["command"].split()))


def cost_of(row: dict) -> float:
    """What an accuracy row's training costs; older files have rows of equal epochs only, whose steps say it."""
    return row.get("cost", row["step_cost"])


def markdown(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """A Markdown table whose first columns are texts, so many, and whose others are numbers."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
