"""Accuracy on the full Fashion-MNIST: ce, kd and jointrd, both initialisations, plain-20 and plain-56, one seed.

    python benchmarks/accuracy/fashion.py --out runs/fashion [--epochs20 3 --epochs56 1] [--workers 2]

Each run is one ``rd-train`` process with one thread (small maps: two processes with a thread each train about twice as
many images per second as one process with two), resumed where it was interrupted and skipped where it is complete.
The two ResNets come first: they are the teachers of all others and the bar to reach. Writes one JSON with every result.
"""

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("ce", "kd", "jointrd")
INITS = ("kaiming", "dirac")
LOG_LOCK = threading.Lock()


def train(name: str, options: argparse.Namespace, flags: list[str]) -> dict:
    """One run, from where it stands; returns its result.json."""
    folder = options.out / name
    if not (folder / "result.json").exists():
        start = ["--resume", str(folder)] if (folder / "recipe.yaml").exists() else [*flags, "--out", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run([sys.executable, "-m", "rd_train.cli", *start], stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{name} ended with {code}; see {folder / 'log.txt'}")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with LOG_LOCK:
        print(f"{name}: test {result['test_accuracy']:.2%} in {result['seconds']:.0f} s", flush=True)
    return {"name": name, **result}


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
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/accuracy-fashion.json"))
    parser.add_argument("--epochs20", type=int, default=3)
    parser.add_argument("--epochs56", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with ThreadPoolExecutor(options.workers) as pool:
        teachers = [
            pool.submit(train, f"resnet{depth}", options, [f"fashion-resnet{depth}", *shared_flags(depth, options)])
            for depth in (56, 20)
        ]
        results = [future.result() for future in teachers]
        students = [
            pool.submit(
                train,
                f"plain{depth}-{method}-{init}",
                options,
                [
                    f"fashion-plain{depth}",
                    *shared_flags(depth, options),
                    f"--method={method}",
                    f"--init={init}",
                    f"--teacher_weights={options.out / f'resnet{depth}' / 'model.pt'}",
                ],
            )
            for depth in (20, 56)
            for method in reversed(METHODS)
            for init in INITS
        ]
        results += [future.result() for future in students]
    document = {
        "what": "Fashion-MNIST, 55,000 training, 5,000 validation, 10,000 test images of 28x28; one seed",
        "command": "python benchmarks/accuracy/fashion.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "workers": options.workers, "python": platform.python_version()},
        "results": results,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.results}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
