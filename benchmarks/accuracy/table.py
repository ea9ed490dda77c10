"""The main table of accuracy: ResNets and plain networks of depth 20 and 56 by every method, several seeds.

    python benchmarks/accuracy/table.py [--epochs 10] [--seeds 0,1,2] [--workers 2] [--only plain20-rd,resnet20]

Fashion-MNIST padded to 32x32; a fixed subset of 20,000 training images (the same for all seeds), the whole validation
and test splits. All rows share epochs, batch, learning rate, clipping and augmentation; a seed's students have the
ResNet of that seed as their teacher, whose own training is not part of their cost. Writes one JSON after each seed: all
results, and per row mean ± standard deviation over seeds (of the sample, n - 1), cost and seconds; ``plain_steps`` is
the cost of the whole training in cross-entropy steps of the plain network.
"""

import argparse
import statistics
from pathlib import Path

from runner import Job, check, document, parser_of, run_all

from rd_deploy.common import write_json

DEPTHS = (20, 56)
TRAIN_IMAGES = 20_000
KD = ("--method=kd", "--kd-weight=0.5", "--kd-temperature=4")
# What rows add to the shared flags. "published": initialisation, feature term and BN as in the authors' code.
ROWS = {
    "resnet{}": ("--method=ce", "--arch=resnet{}"),
    "resnet{}-kd": ("--arch=resnet{}", *KD),
    "plain{}-ce-kaiming": ("--method=ce", "--init=kaiming"),
    "plain{}-kd": (*KD, "--init=kaiming"),
    "plain{}-jointrd-published": (
        *("--method=jointrd", "--init=kaiming", "--feature-weight=0.001", "--feature-reduction=sum"),
        "--teacher-bn=eval",
    ),
    "plain{}-jointrd-options": (
        *("--method=jointrd", "--init=dirac", "--feature-weight=1", "--feature-reduction=mean", "--teacher-bn=batch"),
        "--recalibrate=2000",
    ),
    "plain{}-rd": ("--method=rd",),
}


def names() -> list[str]:
    """All rows, teachers first."""
    return [row.format(depth) for row in ROWS for depth in DEPTHS]


def job(row: str, depth: int, seed: int, options: argparse.Namespace) -> Job:
    """One row with one seed; other settings have another folder."""

    def folder(name: str) -> Path:
        return options.out / f"{name}-n{TRAIN_IMAGES}-e{options.epochs}-s{seed}"

    name = row.format(depth)
    shared = {
        "train-limit": TRAIN_IMAGES,
        "size": 32,
        "epochs": options.epochs,
        "batch-size": 128,
        "lr": 0.1,
        "clip-norm": 1.0,
        "threads": 1,
        "seed": seed,
    }
    flags = [*(f"--{key}={value}" for key, value in shared.items()), *(flag.format(depth) for flag in ROWS[row])]
    if "--method=ce" not in flags:
        flags.append(f"--teacher-weights={folder(f'resnet{depth}') / 'model.pt'}")
    return Job(name, folder(name), (f"fashion-plain{depth}", *flags))


def summary(results: list[dict]) -> list[dict]:
    """Per row, over its seeds: test accuracy (mean, standard deviation of the sample), cost, seconds."""
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        runs = [result for result in results if result["name"] == name]
        accuracies = [run["test_accuracy"] for run in runs]
        steps = runs[0]["epochs"] * (runs[0]["train_images"] // 128)
        rows.append(
            {
                "name": name,
                "seeds": [run["seed"] for run in runs],
                "test_accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "std": statistics.stdev(accuracies) if len(runs) > 1 else None,
                "step_cost": runs[0]["step_cost"],
                "plain_steps": runs[0]["step_cost"] * steps,
                "seconds": statistics.mean(run["seconds"] for run in runs),
            }
        )
    return rows


def say(rows: list[dict]) -> None:
    """The table, as text."""
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.2%}"
        cost = f"cost {row['step_cost']:.2f}, {row['seconds']:.0f} s"
        print(f"{row['name']:28} {row['mean']:.2%}{spread} (n={len(row['seeds'])}), {cost}")


def main() -> None:
    """Seed by seed, so that a table of fewer seeds is complete early."""
    parser = parser_of(__doc__, "runs/table", "runs/accuracy-table.json")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    options = parser.parse_args()
    check(parser, options, set(names()))
    what = f"Fashion-MNIST padded to 32x32, {TRAIN_IMAGES:,} training images, 5,000 validation, 10,000 test images"
    seeds = ",".join(map(str, options.seeds))
    command = f"python benchmarks/accuracy/table.py --epochs {options.epochs} --seeds {seeds}"
    results: list[dict] = []
    for seed in options.seeds:
        jobs = [job(row, depth, seed, options) for row in ROWS for depth in DEPTHS]
        chosen = [each for each in jobs if not options.only or each.name in options.only]
        for teachers in (True, False):  # the others need them
            part = [each for each in chosen if (each.name in {f"resnet{depth}" for depth in DEPTHS}) == teachers]
            results += run_all(part, options.workers)
        write_json(options.results, {**document(what, command, options, results), "summary": summary(results)})
    say(summary(results))
    print(f"wrote {options.results}")


if __name__ == "__main__":
    main()
