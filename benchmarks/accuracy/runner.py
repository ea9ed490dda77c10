"""Trainings as processes of ``rd-train``, some at a time: what the benchmarks of accuracy share.

A run goes on where it was interrupted and is skipped where it is complete; each is one process with one thread. A time
limit, Ctrl-C and SIGTERM stop runs between two steps, with everything saved.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

import torch

ROOT = str(Path(__file__).resolve().parents[2])
RESULTS = Path(ROOT) / "benchmarks" / "results"
sys.path.insert(0, ROOT)  # this checkout, installed or not

from rd_deploy.bench.environment import cpu, git_commit
from rd_deploy.common import UserError
from rd_train import bf16
from rd_train.recipe import Recipe
from rd_train.recipe_files import preset_values, read_values

RD_TRAIN = (sys.executable, "-m", "rd_train.cli")
# Entries of a recipe that say where it runs and where its files are, not what is trained.
OF_THE_MACHINE = {"summary", "data_dir", "download", "teacher_weights", "device", "threads"}
OF_THE_MACHINE |= {"workers", "max_corrupt", "save_minutes"}
# Entries that older results lack, and what their runs did.
IN_ALL_STEPS = {"kd_start": 0.0, "kd_probability": 1.0}
INTERRUPTED = "interrupted; the next call goes on with it"


@dataclass(frozen=True)
class Job:
    """One training: its name, its folder (which must tell all settings that differ), preset and settings.

    ``settings``: options of ``rd-train`` over the preset. ``teacher``: the folder of the run that must be complete
    first. ``must``: results need it most. ``was``: what earlier files call it. ``earlier``: its result from another
    machine, whose folder is not here.
    """

    name: str
    folder: Path
    preset: str
    settings: dict
    teacher: Path | None = None
    must: bool = False
    was: str = ""
    earlier: dict | None = None

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    def flags(self) -> list[str]:
        """The settings as options of the command."""
        values = {**self.settings, **({"teacher_weights": self.teacher / "model.pt"} if self.teacher else {})}
        texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        return [self.preset, *(f"--{name.replace('_', '-')}={value}" for name, value in texts.items())]

    def recipe(self) -> Recipe:
        """The settings as a recipe."""
        teacher = {"teacher_weights": str(self.teacher / "model.pt")} if self.teacher else {}
        return Recipe(**(preset_values(self.preset) | self.settings | teacher))

    def complete(self) -> bool:
        """Whether the folder holds the finished run."""
        return (self.folder / "result.json").exists()

    def trained(self) -> dict | None:
        """What the complete run in the folder found, with the job's name and its settings; None where there is none."""
        if not self.complete():
            return None
        found = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        found = {key: value for key, value in found.items() if key != "teacher_weights"}
        recipe = read_values(self.folder / "recipe.yaml")
        settings = {name: value for name, value in recipe.items() if name not in OF_THE_MACHINE}
        if self.teacher:
            settings["teacher_weights"] = "/".join(Path(recipe["teacher_weights"]).parts[-2:])
        metrics = self.folder / "metrics.jsonl"
        rows = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        fit = json.loads(rows[-1])["train_accuracy"] if rows else None
        extra = {"last_train_accuracy": fit, "device": recipe.get("device"), "settings": settings}
        if self.starts.exists():
            starts = self.starts.read_text(encoding="utf-8").splitlines()
            extra["trained"] = [json.loads(line) for line in starts]
        return {"name": self.name, **found, **extra}

    @property
    def starts(self) -> Path:
        """The file that says when, by which commit and on which CPU the run was begun and gone on with: JSON lines."""
        return self.folder / "starts.jsonl"

    def lock(self) -> IO | None:
        """The folder, made and held until this is closed; None where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def record_start(self) -> None:
        """Say there that it is begun, or gone on with, now."""
        machine = cpu()
        about = {"cpu": machine["model"], "flags": machine["flags"], "torch": str(torch.__version__)}
        with self.starts.open("a" if self.begun() else "w", encoding="utf-8") as starts:
            starts.write(json.dumps({"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), **about}) + "\n")

    def result(self) -> dict | None:
        """The earlier result, or else what the folder holds."""
        return self.earlier or self.trained()

    def begun(self) -> bool:
        """Whether there is something to resume."""
        return any(self.folder.glob("*-state.pt"))

    def check_folder(self) -> None:
        """Refuse a folder that holds a run of other settings, whose result would pass for this one's."""
        path = self.folder / "recipe.yaml"
        if not path.exists():
            return
        if difference := self.difference(read_values(path)):
            raise UserError(
                f"{self.folder} holds a run {difference} as {self.name} has now: "
                "move the folder away, or give another --out"
            )

    def difference(self, settings: dict) -> str | None:
        """The first setting in which a run was another one, in words.

        Not what has no effect, says where a run is, or is settled by the machine (a precision of ``auto``, or how a CPU
        does bf16).
        """
        theirs, ours = Recipe(**IN_ALL_STEPS | settings), self.recipe()
        if self.teacher and theirs.teacher_weights:  # which older results do not say
            taught = Path(theirs.teacher_weights).parent.name
            if taught != self.teacher.name:
                return f"taught by {taught}, not {self.teacher.name}"
        inert = {*theirs.unused(), *ours.unused()}
        for name in [field.name for field in fields(Recipe) if field.name not in OF_THE_MACHINE]:
            found, wanted = getattr(theirs, name), getattr(ours, name)
            if {found, wanted} == {"bf16", bf16.EMULATED}:
                continue
            if name == "precision" and wanted == "auto":
                continue
            if found != wanted and name not in inert:
                was = f"with {name}={found}" if name in settings else f"of another version, without {name}"
                return f"{was}, not {name}={wanted}"
        return None


@dataclass
class _Process:
    """A training under way; the lock on its folder is the process's too, and outlives a killed benchmark."""

    job: Job
    process: subprocess.Popen
    lock: object


def _start(job: Job) -> _Process | None:
    """Begin or resume a run; None where another process trains it."""
    if (lock := job.lock()) is None:
        return None
    options = ["--resume", job.folder] if job.begun() else [*job.flags(), "--out", job.folder, "--overwrite"]
    job.record_start()
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
        command = [*RD_TRAIN, *map(str, options)]
        path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[lock.fileno()], env=environment)
    return _Process(job, process, lock)


def to_train(jobs: list[Job]) -> list[Job]:
    """Those without a result, and those whose earlier result is one of a teacher that these still need."""
    teachers = {job.teacher for job in jobs if not (job.earlier or job.complete())}
    return [job for job in jobs if not job.complete() and (job.earlier is None or job.folder in teachers)]


def run_all(
    jobs: list[Job],
    workers: int,
    minutes: float | None = None,
    finished: Callable[[dict[Path, str]], None] = lambda missing: None,
) -> dict[Path, str]:
    """Train what is not complete, in this order (a run waits for its teacher), ``workers`` at a time.

    A teacher that has an earlier result only is trained again where a student needs its weights.
    A run that fails stops neither the others nor the benchmark. ``finished`` is called after each run that ended.
    Returns, by folder, why a run without a result has none.
    """
    for job in jobs:
        job.check_folder()
    waiting = to_train(jobs)
    missing, running = {job.folder: "not begun" for job in waiting}, []
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    with told_to_stop() as told, _none_left(running):
        stopping = False
        while running or (waiting and not stopping):
            if not stopping and (told or time.monotonic() >= deadline):
                stopping = True
                for each in running:
                    each.process.terminate()
            if not stopping and len(running) < workers and (job := _ready(waiting)):
                waiting.remove(job)
                started = _start(job)
                missing[job.folder] = "under way" if started else "another process trains it"
                running += [started] if started else []
                continue
            if not running:  # those that wait need a teacher that there will not be
                break
            time.sleep(0.2)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                _end(each, missing, stopping)
                finished(missing)
    for job in waiting:
        if job.begun():
            missing[job.folder] = INTERRUPTED
        elif not stopping:
            missing[job.folder] = f"its teacher {job.teacher.name} has no result"
    return missing


@contextlib.contextmanager
def _none_left(running: list[_Process]) -> Iterator[None]:
    """Stop those that still train where an error ends the benchmark; what they have is saved."""
    try:
        yield
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()
            each.lock.close()


def _ready(waiting: list[Job]) -> Job | None:
    """The first run whose teacher is there."""
    return next((job for job in waiting if not job.teacher or (job.teacher / "result.json").exists()), None)


def _end(ended: _Process, missing: dict[Path, str], stopping: bool) -> None:
    """Say what became of a run that ended."""
    ended.lock.close()
    job, code = ended.job, ended.process.returncode
    if result := job.trained():
        del missing[job.folder]
        print(
            f"{job.name}, seed {job.seed}: test {result['test_accuracy']:.2%} in {result['seconds']:.0f} s", flush=True
        )
        return
    lines = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    if stopping or code in (130, -signal.SIGTERM, -signal.SIGINT):
        missing[job.folder] = INTERRUPTED
    else:
        missing[job.folder] = f"ended with {code}: {lines[-1][:200] if lines else 'it said nothing'}"
        print(f"{job.name}, seed {job.seed}: {missing[job.folder]} (see {job.folder / 'log.txt'})", flush=True)


@contextlib.contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM add to."""
    told: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: told.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield told
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def parser_of(description: str, out: str, results: str, *, several: bool = True) -> argparse.ArgumentParser:
    """The options that the benchmarks of accuracy share; ``several``: where runs can be trained at the same time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--results", type=Path, default=Path(results))
    if several:
        parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    else:
        parser.set_defaults(workers=1)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="names of the runs to train, with commas between them"
    )
    parser.add_argument("--note", default="", help="what a reader must know of the machine meanwhile")
    parser.set_defaults(earlier=[], seeds=None)
    return parser


def asked(jobs: list[Job], options: argparse.Namespace, seeds: tuple[int, ...]) -> list[Job]:
    """Of all jobs those that the options want trained, and the teachers that these need.

    What is left out counts where it is there; so every folder must hold what it should.
    """
    for job in jobs:
        job.check_folder()
    wanted = [job for job in jobs if job.name in (options.only or [job.name]) and job.seed in seeds]
    folders = {job.folder for job in wanted} | {job.teacher for job in wanted if job.result() is None}
    return [job for job in jobs if job.folder in folders]


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, runs: set[str], seeds: set[int]) -> None:
    """Refuse what the options of benchmarks cannot mean, of which ``runs`` and ``seeds`` there are."""
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if unknown := set(options.only or ()) - runs:
        parser.error(f"--only: no runs {', '.join(sorted(unknown))}; there are {', '.join(sorted(runs))}")
    if unknown := set(options.seeds or ()) - seeds:
        parser.error(
            f"--seeds: no {', '.join(map(str, sorted(unknown)))}; there are {', '.join(map(str, sorted(seeds)))}"
        )


def named(path: Path, base: Path = RESULTS) -> str:
    """What JSON calls a file of results: its path from ``base`` where it is below benchmarks/results, else its name."""
    path = path.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(RESULTS) else path.name


ORIGIN = ("date", "commit", "machine", "note")


def with_origin(document: dict, path: Path) -> list[dict]:
    """A document's results, each with where it is ``from``: this file, unless it had been taken over from another."""
    origin = {key: document[key] for key in ORIGIN} | {"file": named(path)}
    return [{"from": origin} | each for each in document["results"]]


def document(what: str, command: str, options: argparse.Namespace) -> dict:
    """A JSON's first part: what it holds and where it comes from."""
    earlier = [named(path, Path(ROOT)) for path in options.earlier]
    return {
        "what": what,
        "command": " ".join([command, *(["--earlier"] if earlier else []), *earlier]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "note": options.note,
        "machine": {
            "cpu": cpu()["model"],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "workers": options.workers,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
