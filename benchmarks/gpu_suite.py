"""Everything about one NVIDIA GPU in one command: correctness, speed, memory, each step against the card's limits.

    python benchmarks/gpu_suite.py                     # up to 45 minutes; again: the rows that it did not reach
    python benchmarks/gpu_suite.py --minutes 4 --total 8     # where a command may take 10 minutes; again: the next ones
    python benchmarks/gpu_suite.py --part b --batch 32,128 --precision fp16
    python benchmarks/gpu_suite.py --part a --rows Stem      # only rows with this in their key
    python benchmarks/gpu_suite.py --dry               # without a GPU: does every part's code run? (CI does this)

Parts, in the order in which they run: b: latency and throughput, plain-50 against ResNet-50. d: steps of our engine
against measured limits. a: every kernel and engine is right. c: memory. e: training speed. Results are written after
every row; the same command again goes on where it was stopped, skips what is finished and tries again what was out of
time. Needs no network and no installation of this project. The exit code is 1 when something is wrong: a kernel, an
engine, or a row that failed.

A file holds results of one state of the sources on one card, with one driver, one version of each package and one value
of each RD_FUSION, RD_TUNE and RD_PDL. Without --out a sitting goes on with the newest file of this card of which that
is true, or begins a new one; it says which. With more --seconds than before, rows of part b are measured again.

How long: each of the five parts begins no row after --minutes (8), compiling our kernels included, and no part one
after --total; a row that has begun is finished, which takes seconds, or minutes where an engine is slow to load. All
rows of all parts need several such sittings. Where commands are cut off, only the row at work is lost, and what was
compiled stays in Triton's cache.
"""

import argparse
import importlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]  # this checkout, installed or not; spawned processes inherit it

from rd_deploy.bench.environment import git_commit
from rd_deploy.common import UserError, nearest, require, run_command
from rd_deploy.cpus import available_threads

# In this order where all run. Speed first: what it times is compared with torch there, too.
PARTS = {"b": "speed", "d": "steps", "a": "correctness", "c": "memory", "e": "training"}
RESULTS = ROOT / "benchmarks" / "results"
DRY = {"batch": "1", "precision": "fp16"}
DEFAULT_OUT = "the newest of results/CARD/gpu-*.json that this sitting can go on with, or gpu-DATE.json there"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), metavar="a,b,...", help="(default: %(default)s)")
    parser.add_argument("--batch", metavar="N,...", help="(default: 32,128,1,8,256)")
    parser.add_argument("--precision", metavar="P,...", help="fp16, bf16 (default: both)")
    parser.add_argument("--engines", metavar="E,...", help="(default: all that are importable)")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose key holds it (default: all)")
    parser.add_argument(
        "--patience", type=float, default=60, metavar="SECONDS", help="for one kernel's check in part a"
    )
    parser.add_argument("--minutes", type=float, default=8, help="for each part (default: %(default)g)")
    parser.add_argument("--total", type=float, metavar="MINUTES", help="for all parts together (default: no limit)")
    parser.add_argument("--seconds", type=float, default=2, help="of sampling per comparison (default: %(default)g)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help=f"(default: {DEFAULT_OUT})")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: the figures mean nothing")
    return parser.parse_args()


def run(given: argparse.Namespace) -> int:
    """Run the parts, print the table; 1 if anything failed."""
    parts = chosen(given.part, PARTS, "part")
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 would run the kernels on the CPU: unset it, or give --dry")
    require("torch", "train")
    from rd_deploy.engines.device import no_gpu

    if not given.dry and (reason := no_gpu()):
        raise UserError(f"{reason}; --dry runs without one")
    require("triton", "cuda")
    from gpu import table

    suite, found = make_suite(given), []

    try:
        for part in parts:
            suite.run(part, picked(importlib.import_module(f"gpu.{PARTS[part]}").rows(suite), given.rows, found))
    finally:  # stopped or not: what there is
        print(f"\n{table.text(suite.record)}\n\nwritten: {suite.record.path}", flush=True)
    if given.rows and not found:
        raise UserError(f"no row of parts {', '.join(parts)} has '{given.rows}' in its key")
    return int(bool(suite.record.failures))


def picked(rows, text: str, found: list[str]):
    """Those that have ``text`` in their key, which ``found`` gets."""
    for row in rows:
        if text in row.key:
            found.append(row.key)
            yield row


def make_suite(given: argparse.Namespace):
    """The suite on this card, going on with its result file where there is one."""
    from gpu import card
    from gpu.suite import BATCHES, ENGINES, OURS, PRECISIONS, Suite

    precisions = chosen(given.precision or (DRY["precision"] if given.dry else ""), PRECISIONS, "precision")
    engines = chosen(given.engines or "", ENGINES, "engine")
    ours = OURS in engines and chosen(given.part, PARTS, "part") != ("e",)
    batches = sizes(given.batch or (DRY["batch"] if given.dry else "")) or BATCHES
    total = float("inf") if given.total is None else given.total
    if not (0 <= given.minutes <= 1e6 and total >= 0 and 0 <= given.seconds <= 600 and 0 < given.patience <= 1e6):
        raise UserError("--minutes and --total must be 0 or more, --seconds from 0 to 600, --patience above 0")
    head = make_head(given.dry, ours)
    asked = {
        "part": given.part,
        "rows": given.rows,
        "batch": list(batches),
        "precision": list(precisions),
        "engines": list(engines),
    }
    sitting = {
        "date": head["date"],
        "commit": head["commit"],
        "options": asked | {"minutes": given.minutes, "total": given.total, "seconds": given.seconds},
        "state": card.state(given.dry),
    }
    record = open_results(given.out, head, sitting)
    threads = 1 if given.dry else available_threads()  # tiny work: threads only wait for each other
    if given.dry:
        require("torch", "train").set_num_threads(threads)
    times = given.minutes, given.seconds
    return Suite(record, batches, precisions, engines, *times, threads, given.dry, total, given.patience)


def make_head(dry: bool, ours: bool) -> dict:
    """What describes all rows of a result file; ``ours``: kernels of ours are to be compiled."""
    from gpu import card
    from gpu.record import FORMAT, sources_digest

    from rd_deploy.engines.cuda import SETTINGS, setting

    described = card.describe(dry)
    return {
        "format": FORMAT,
        "dry": dry,
        "sources": sources_digest(),
        "card": described,
        "commit": git_commit(),
        "versions": card.versions(),
        "settings": {name: setting(name) for name in SETTINGS},
        "assembler": card.assembler(described["capability"], dry, ours=ours),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "timing": "one run is one replay on resident images, by the GPU's events; 'host' rows: NumPy in, NumPy out",
    }


def open_results(out: Path | None, head: dict, sitting: dict):
    """The record in the file that was given or in the default one; says which, and whether it is gone on with."""
    from gpu import card
    from gpu.record import default_path, open_record

    path, reason = out, ""
    if path is None:
        name = f"gpu-{head['date'][:10]}{'-dry' if head['dry'] else ''}"
        path, reason = default_path(RESULTS / card.slug(head["card"]["name"]), name, head)
    record = open_record(path, head, sitting)
    if len(record.sittings) > 1:
        print(f"going on with {path} (rows: {len(record.rows)})", flush=True)
    else:
        print(f"new results: {path}{f' ({reason})' if reason else ''}", flush=True)
    return record


def chosen(text: str, known, what: str) -> tuple[str, ...]:
    """The names in a list with commas, all that are known if it is empty; an unknown one is a `UserError`."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} '{name}'{nearest(name, known)}")
    return names


def sizes(text: str) -> tuple[int, ...]:
    """Batch sizes in a list with commas."""
    try:
        batches = tuple(dict.fromkeys(int(size) for size in text.split(",") if size.strip()))
    except ValueError as error:
        raise UserError(f"--batch {text}: give numbers such as 32,128") from error
    if any(size < 1 for size in batches):
        raise UserError("batches must be at least 1")
    return batches


if __name__ == "__main__":
    arguments = options()
    sys.exit(run_command("gpu_suite", lambda: run(arguments)))
