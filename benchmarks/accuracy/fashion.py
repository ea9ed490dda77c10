"""Accuracy on the full Fashion-MNIST: ce, kd and jointrd, both initialisations, plain-20 and plain-56, one seed.

    python benchmarks/accuracy/fashion.py --out runs/fashion [--epochs20 3 --epochs56 1] [--workers 2]

Each run is one ``rd-train`` process with one thread, two at a time: on a quiet machine 5% more images per second at
depth 20 than one process with two threads, 18% at depth 56, and far more on a busy one. A run goes on where it was
interrupted and is skipped where it is complete.
The two ResNets come first: they are the teachers of all others and the bar to reach. Writes one JSON with every result
that there is, and what is missing; exit code 1 while a run that was asked for is missing.
"""

import argparse
import itertools
import sys
from pathlib import Path

from runner import Job, asked, check, document, parser_of, run_all

from rd_deploy.common import run_command, write_json

METHODS = ("ce", "kd", "jointrd")
INITS = ("kaiming", "dirac")


def epochs_of(depth: int, options: argparse.Namespace) -> int:
    """Epochs of a run, by its depth."""
    return options.epochs56 if depth == 56 else options.epochs20


def folder(name: str, depth: int, options: argparse.Namespace) -> Path:
    """Seed and epochs are in the folder's name: other settings must not find these results."""
    return options.out / f"{name}-e{epochs_of(depth, options)}-s{options.seed}"


def job(name: str, preset: str, depth: int, options: argparse.Namespace, **settings) -> Job:
    """A run with what all have in common; all methods but ce have the ResNet as their teacher."""
    shared = {
        "epochs": epochs_of(depth, options),
        "batch_size": 64,
        "lr": 0.05,
        "warmup_epochs": 0.5,
        "clip_norm": 1.0,
        "threads": 1,
        "seed": options.seed,
    }
    teacher = None if settings["method"] == "ce" else folder(f"resnet{depth}", depth, options)
    return Job(name, folder(name, depth, options), preset, shared | settings, teacher)


def students(options: argparse.Namespace) -> list[Job]:
    """All plain networks."""
    jobs = []
    for depth, method, init in itertools.product((20, 56), reversed(METHODS), INITS):
        more = {"feature_weight": 0.0} if method == "jointrd" else {}
        more |= {"init_noise": 0.5} if init == "dirac" else {}  # as when the committed results were made
        name, preset = f"plain{depth}-{method}-{init}", f"fashion-plain{depth}"
        jobs.append(job(name, preset, depth, options, method=method, init=init, **more))
    return jobs


def command() -> int:
    """Run everything and write the JSON."""
    parser = parser_of(__doc__, "runs/fashion", "runs/accuracy-fashion.json")
    parser.add_argument("--epochs20", type=int, default=3)
    parser.add_argument("--epochs56", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resnets = [job(f"resnet{depth}", f"fashion-resnet{depth}", depth, options, method="ce") for depth in (56, 20)]
    plain = students(options)
    check(parser, options, {each.name for each in resnets + plain}, {options.seed})
    jobs = asked(resnets + plain, options, (options.seed,))
    missing = run_all(jobs, options.workers)
    lost = [
        {"name": each.name, "seed": each.seed, "why": missing[each.folder]} for each in jobs if each.folder in missing
    ]
    what = (
        "Fashion-MNIST, 55,000 training, 5,000 validation, 10,000 test images of 28x28; one seed; jointrd "
        "without its feature term (feature_weight 0), as the authors' scripts for 32x32 images"
    )
    repeat = (
        f"python benchmarks/accuracy/fashion.py --epochs20 {options.epochs20} --epochs56 {options.epochs56} "
        f"--workers {options.workers} --seed {options.seed}"
        + (f" --only {','.join(options.only)}" if options.only else "")
    )
    asked_for = [each for each in jobs if each.name in (options.only or [each.name])]
    results = [found for each in asked_for if (found := each.result()) is not None]
    write_json(options.results, {**document(what, repeat, options), "missing": lost, "results": results})
    for each in lost:
        print(f"missing: {each['name']}: {each['why']}")
    print(f"wrote {options.results}{', incomplete' if lost else ''}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(run_command("fashion", command))
