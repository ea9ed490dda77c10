"""Committed results, and what a table made from them needs."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def find(pattern: str) -> dict | None:
    """The latest committed result of a kind, with its path; names begin with their date. None without one."""
    paths = sorted(RESULTS.glob(f"*/{pattern}"), key=lambda path: path.name)
    if not paths:
        return None
    return json.loads(paths[-1].read_text(encoding="utf-8")) | {"path": paths[-1].relative_to(ROOT).as_posix()}


def newest(pattern: str) -> dict:
    """The latest committed result of a kind, which there must be."""
    found = find(pattern)
    if found is None:
        raise SystemExit(f"no {pattern} under {RESULTS}; make it with the script that the README names")
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
