"""Accuracy on the full Fashion-MNIST: ce, kd and jointrd, both initialisations, plain-20 and plain-56, one seed.

    python benchmarks/accuracy/fashion.py --out runs/fashion [--epochs20 3 --epochs56 1] [--workers 2]

Each run is one ``rd-train`` process with one thread, two at a time: on a quiet machine 5% more images per second at
depth 20 than one process with two threads, 18% at depth 56, and far more on a busy one. A run goes on where it was
interrupted and is skipped where it is complete.
The two ResNets come first: they are the teachers of all others and the bar to reach. Writes one JSON with every result.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rd_deploy.bench.environment import cpu, git_commit
from rd_deploy.common import write_json

METHODS = ("ce", "kd", "jointrd")
INITS = ("kaiming", "dirac")
LOG_LOCK = threading.Lock()


def train(name: str, options: argparse.Namespace, flags: list[str]) -> dict:
    """One run, from where it stands; returns its result.json."""
    # Seed and epochs in the folder's name: other settings must not find these results.
    folder = options.out / f"{name}-e{epochs_of(name, options)}-s{options.seed}"
    if not (folder / "result.json").exists():
        begun = any(folder.glob("*-state.pt"))
        start = ["--resume", str(folder)] if begun else [*flags, "--out", str(folder), "--overwrite"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run([sys.executable, "-m", "rd_train.cli", *start], stdout=log, stderr=log).returncode
        if code:
            raise RuntimeError(f"{name} ended with {code}; see {folder / 'log.txt'}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with LOG_LOCK:
        print(f"{name}: test {result['test_accuracy']:.2%} in {result['seconds']:.0f} s", flush=True)
    return {"name": name, **{key: value for key, value in result.items() if key != "teacher_weights"}}


def epochs_of(name: str, options: argparse.Namespace) -> int:
    """Epochs of a run, by its depth."""
    return options.epochs56 if "56" in name else options.epochs20


def teacher_file(depth: int, options: argparse.Namespace) -> Path:
    """The teacher of a depth."""
    name = f"resnet{depth}"
    return options.out / f"{name}-e{epochs_of(name, options)}-s{options.seed}" / "model.pt"


def shared_flags(depth: int, options: argparse.Namespace) -> list[str]:
    """What all runs of a depth have in common."""
    epochs = options.epochs20 if depth == 20 else options.epochs56
    flags = {
        "epochs": epochs,
        "batch_size": 64,
        "lr": 0.05,
        "warmup_epochs": 0.5,
        "clip_norm": 1.0,
        "threads": 1,
        "seed": options.seed,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def main() -> None:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--results", type=Path, default=Path("runs/accuracy-fashion.json"))
    parser.add_argument("--epochs20", type=int, default=3)
    parser.add_argument("--epochs56", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="names of runs, such as resnet20,plain20-ce-dirac"
    )
    parser.add_argument("--note", default="", help="what a reader must know of the machine meanwhile")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    runs = {f"resnet{depth}" for depth in (20, 56)} | {
        f"plain{depth}-{method}-{init}" for depth, method, init in itertools.product((20, 56), METHODS, INITS)
    }
    if unknown := set(options.only or ()) - runs:
        parser.error(f"--only: no runs {', '.join(sorted(unknown))}; there are {', '.join(sorted(runs))}")
    jobs = [(f"resnet{depth}", [f"fashion-resnet{depth}", *shared_flags(depth, options)]) for depth in (56, 20)]
    results = run_all(jobs, options)
    jobs = []
    for depth, method, init in itertools.product((20, 56), reversed(METHODS), INITS):
        flags = [f"fashion-plain{depth}", *shared_flags(depth, options), f"--method={method}", f"--init={init}"]
        if method != "ce":
            flags.append(f"--teacher-weights={teacher_file(depth, options)}")
        jobs.append((f"plain{depth}-{method}-{init}", flags))
    results += run_all(jobs, options)
    document = {
        "what": "Fashion-MNIST, 55,000 training, 5,000 validation, 10,000 test images of 28x28; one seed; jointrd "
        "without its feature term (feature_weight 0), as the authors' scripts for 32x32 images",
        "command": f"python benchmarks/accuracy/fashion.py --epochs20 {options.epochs20} --epochs56 {options.epochs56} "
        f"--workers {options.workers} --seed {options.seed}"
        + (f" --only {','.join(options.only)}" if options.only else ""),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "note": options.note,
        "machine": {"cpu": cpu()["model"], "workers": options.workers, "python": platform.python_version()},
        "results": results,
    }
    write_json(options.results, document)
    print(f"wrote {options.results}")


def run_all(jobs: list[tuple[str, list[str]]], options: argparse.Namespace) -> list[dict]:
    """The runs, ``workers`` at a time; the first that fails cancels those that have not begun."""
    if options.only is not None:
        jobs = [(name, flags) for name, flags in jobs if name in options.only]
    with ThreadPoolExecutor(options.workers) as pool:
        futures = [pool.submit(train, name, options, flags) for name, flags in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
