"""Committed results, and what a table made from them needs."""

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
    return json.loads(paths[-1].read_text(encoding="utf-8")) | {"path": paths[-1].relative_to(ROOT).as_posix()}


def newest(pattern: str, machine: str = "*") -> dict:
    """The latest committed result of a kind, which there must be."""
    found = find(pattern, machine)
    if found is None:
        raise SystemExit(f"no {machine}/{pattern} under {RESULTS}; make it with the script that the README names")
    return found


def located(name: str) -> str:
    """A result's path in the repository, which says its machine, where one committed file has that name."""
    paths = list(RESULTS.glob(f"*/{name}"))
    return paths[0].relative_to(ROOT).as_posix() if len(paths) == 1 else name


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
