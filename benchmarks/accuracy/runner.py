"""Trainings as processes of ``rd-train``, some at a time: what the benchmarks of accuracy share.

A run goes on where it was interrupted and is skipped where it is complete; each is one process with one thread.
"""

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rd_deploy.bench.environment import cpu, git_commit

LOG_LOCK = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One training: its name, its folder (which must tell all settings that differ), preset and flags."""

    name: str
    folder: Path
    flags: tuple[str, ...]


def train(job: Job) -> dict:
    """One run, from where it stands; returns its result.json and its name."""
    if not (job.folder / "result.json").exists():
        begun = any(job.folder.glob("*-state.pt"))
        start = ["--resume", str(job.folder)] if begun else [*job.flags, "--out", str(job.folder), "--overwrite"]
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run([sys.executable, "-m", "rd_train.cli", *start], stdout=log, stderr=log).returncode
        if code:
            raise RuntimeError(f"{job.name} ended with {code}; see {job.folder / 'log.txt'}")
    result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    with LOG_LOCK:
        print(f"{job.name}: test {result['test_accuracy']:.2%} in {result['seconds']:.0f} s", flush=True)
    return {"name": job.name, **{key: value for key, value in result.items() if key != "teacher_weights"}}


def run_all(jobs: list[Job], workers: int) -> list[dict]:
    """The runs, ``workers`` at a time; the first that fails cancels those that have not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(train, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def parser_of(description: str, out: str, results: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of accuracy share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of runs, with commas between them")
    parser.add_argument("--note", default="", help="what a reader must know of the machine meanwhile")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, runs: set[str]) -> None:
    """Refuse what `parser_of`'s options cannot mean."""
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if unknown := set(options.only or ()) - runs:
        parser.error(f"--only: no runs {', '.join(sorted(unknown))}; there are {', '.join(sorted(runs))}")


def document(what: str, command: str, options: argparse.Namespace, results: list[dict]) -> dict:
    """A JSON of results with where they come from."""
    return {
        "what": what,
        "command": command + (f" --only {','.join(options.only)}" if options.only else ""),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "note": options.note,
        "machine": {"cpu": cpu()["model"], "workers": options.workers, "python": platform.python_version()},
        "results": results,
    }
