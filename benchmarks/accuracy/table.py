"""Accuracy over several seeds: ResNets and plain networks, by every method, in named experiments.

    python benchmarks/accuracy/table.py [main] [depth] ... [--seeds 0,1,2] [--workers 2] [--minutes 60]
    python benchmarks/accuracy/table.py main --list           what would run, and what is there already
    python benchmarks/accuracy/table.py main depth --minutes 0    no training: results from what is there
    python benchmarks/accuracy/table.py main --earlier JSON ...   go on where another machine stopped

main         Fashion-MNIST padded to 32x32, a fixed subset of 20,000 training images, depth 20 and 56, every row
fp32         the ResNet, the plain network by cross-entropy and our former method in fp32, depth 20: does it matter?
full         the rows that decide, on all 55,000 training images
ablation     our method with one lever out at a time, depth 56
rates        the ResNet and our former method, without branches, by both optimisers at several rates, depth 56, one seed
levers       our method, by SGD or as it is, with one lever more, depth 56: what was tried to make it better
depth        20, 32, 44, 56, 110: ResNets, plain by cross-entropy, ours and the former
bottleneck   plain-50 at a quarter of its width, every row
glyphs       coloured glyphs of unseen fonts (--glyphs FILE, which benchmarks/accuracy/glyphs.py makes)

A GPU is taken where there is one. These networks leave it idle between launches: on an H200 eight trainings at once,
through CUDA's multi-process service (`nvidia-cuda-mps-control -d`), took about as long each as one alone (docs/gpu.md).

Rows of an experiment share epochs (one of main has twice as many), batch, learning rate, clipping and augmentation; a
seed's students have the ResNet of that seed as their teacher, whose own training is not part of their cost but stands
beside it. Runs that experiments share are trained once. The rows that decide come first, for all seeds (`full`, `rates`
and `depth` need one only, `fp32` two; but for `rates` they have of the others what is there). After each run every
experiment's JSON is written: per row mean ± standard deviation over seeds (of the sample, n - 1), cost, seconds (which
depend on what else ran), our method's paired differences, and what is still missing.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments import NAMES, Experiment, check_names, experiments
from runner import INTERRUPTED, Job, asked, check, document, parser_of, run_all, to_train, with_origin
from summary import comparisons, summary

from rd_deploy.common import UserError, check_file, one_line, run_command, write_json
from rd_train.recipe import Recipe


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, "runs/table", "runs/accuracy-NAME.json")
    parser.add_argument("names", nargs="*", default=["main"], metavar="EXPERIMENT", help=", ".join(NAMES))
    parser.add_argument("--epochs", type=int, help="another number of epochs than the experiments' own")
    parser.add_argument(
        "--seeds",
        type=lambda text: tuple(map(int, text.split(","))),
        help="those to train, instead of each experiment's own",
    )
    parser.add_argument("--minutes", type=float, help="stop after so long; the next call goes on")
    parser.add_argument(
        "--earlier", type=Path, nargs="+", metavar="JSON",
        help="results of these files count as they are, where their settings are those of today; "
        "teachers that are still needed are trained again",
    )  # fmt: skip
    parser.add_argument("--glyphs", type=Path, help="the file of glyphs, for the experiment of that name")
    parser.add_argument("--list", action="store_true", help="say what would run and what is there, and stop")
    return parser


def results_path(template: Path, name: str) -> Path:
    """Where an experiment's results go: NAME in the file's name stands for the experiment's."""
    return template.with_name(template.name.replace("NAME", name))


def read_earlier(files: list[Path]) -> dict[tuple[str, int], list[dict]]:
    """The results in ``files`` (JSON of experiments) by name and seed, which experiments of other sizes share.

    Whatever a table is made of is checked: an error later would cost trainings.
    """
    found = defaultdict(list)
    for path in files:
        text = check_file(path, "file of results", 16 << 20).read_bytes()
        try:
            document = json.loads(text)
            for each in with_origin(document, path):
                _check_result(each)
                found[each["name"], each["seed"]].append(each)
        except (ValueError, KeyError, TypeError, RecursionError, UserError) as error:
            raise UserError(
                f"{path} has no results with their settings ({one_line(error)[:100]}); "
                "--earlier takes what table.py wrote"
            ) from error
    return found


# What tables are made of: its type, and between which values it is.
FIELDS = {
    **dict.fromkeys(("test_accuracy", "val_accuracy"), (float, 0, 1)),
    **{"seed": (int, 0, 2**62), "epochs": (int, 1, 10**6), "train_images": (int, 1, 10**9)},
    **{"step_cost": (float, 0.1, 1e3), "seconds": (float, 0, 1e9)},
}


def _check_result(result: dict) -> None:
    """Anything that an experiment's table could not be made of is a ValueError, KeyError or TypeError."""
    Recipe(**result["settings"])
    for name in ("name", "precision"):
        if type(result[name]) is not str:
            raise ValueError(f"{name} is no text")
    for name, (kind, low, high) in FIELDS.items():
        if type(result[name]) not in {kind, int} or not low <= result[name] <= high:
            raise ValueError(f"{name} of {result['name']} is not from {low} to {high}")
    for name in ("teacher_test_accuracy", "last_train_accuracy"):
        if result.get(name) is not None and not 0 <= result[name] <= 1:
            raise ValueError(f"{name} of {result['name']} is not from 0 to 1")
    origin = result["from"]
    # The oldest files give no note to what they took over themselves.
    texts = [origin["file"], origin["date"], origin["commit"], origin.get("note", ""), origin["machine"]["cpu"]]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError("where a result is from is no text")
    if not isinstance(result.get("trained", []), list):
        raise ValueError("trained is no list")


def with_earlier(jobs: list[Job], results: dict[tuple[str, int], list[dict]]) -> list[Job]:
    """The jobs, each with the first of the earlier ``results`` that is of its name, seed and settings."""
    return [replace(job, earlier=_equal(job, results)) for job in jobs]


def _equal(job: Job, every: dict[tuple[str, int], list[dict]]) -> dict | None:
    """An earlier result of today's settings; else it is said why those that there are do not count."""
    refused = []
    for each in [each for name in (job.name, job.was) for each in every.get((name, job.seed), [])]:
        difference = job.difference(each["settings"])
        if difference is None:
            return each | {"name": job.name}
        refused.append(f"{job.name}, seed {job.seed}: not taken from {each['from']['file']}: {difference}")
    if refused:
        print("\n".join(refused))
    return None


def report(name: str, experiment: Experiment, jobs: list[Job], missing: dict[Path, str], options) -> dict:
    """An experiment's JSON: all results that there are of its ``jobs``, whatever was asked to be trained now."""
    found = {job.folder: result for job in jobs if (result := job.result()) is not None}
    results = list(found.values())
    lost = [
        {
            "name": job.name,
            "seed": job.seed,
            "why": missing.get(job.folder, INTERRUPTED if job.begun() else "not begun"),
        }
        for job in jobs
        if job.folder not in found and (job.seed in experiment.seeds or job.folder in missing)
    ]
    rows = summary(experiment, results)
    epochs = f" --epochs {options.epochs}" if options.epochs is not None else ""
    seeds = sorted({*experiment.seeds, *(each["seed"] for each in results)})
    more = f" --seeds {','.join(map(str, seeds))}" if seeds != sorted(experiment.seeds) else ""
    glyphs = f" --glyphs {options.glyphs.name}" if name == "glyphs" else ""
    command = f"python benchmarks/accuracy/table.py {name}{epochs}{more}{glyphs}"
    return {
        "experiment": name,
        **document(experiment.what, command, options),
        "complete": not any(each["seed"] in experiment.seeds for each in lost),
        "missing": lost,
        "rows": rows,
        "comparisons": comparisons(rows),
        "results": results,
    }


def say(found: dict) -> None:
    """An experiment, as text."""
    print(f"{found['experiment']}: {found['what']}")
    for row in found["rows"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.2%}"
        cost = f"cost {row['step_cost']:.2f}, {row['seconds']:.0f} s {row['other_precision']}".rstrip()
        print(f"  {row['name']:36} {row['mean']:.2%}{spread} (n={len(row['seeds'])}), {cost}")
    for pair in [pair for pair in found["comparisons"] if pair["interval"]]:
        low, high = (100 * bound for bound in pair["interval"])
        verdict = ", ".join(f"{name} {'holds' if holds else 'FAILS'}" for name, holds in pair["holds"].items())
        print(
            f"  {pair['ours']} - {pair['other']}: {100 * pair['mean']:+.2f} points "
            f"({low:+.2f} to {high:+.2f}, n={len(pair['seeds'])}) {verdict}"
        )
    for each in found["missing"]:
        print(f"  missing: {each['name']}, seed {each['seed']}: {each['why']}")


def state(job: Job, training: Sequence[Job] = ()) -> str:
    """What is there of a run, of which `to_train` says whether it would be trained."""
    if job.earlier:
        return "earlier, trained again for its students" if job in training else "earlier"
    return "complete" if job.complete() else "begun" if job.begun() else "not begun"


def command() -> int:
    """Train what is missing and write each experiment's JSON; exit code 1 while a run that was asked for is missing."""
    parser = _parser()
    options = parser.parse_args()
    check_names(options.names)
    if "glyphs" in options.names and options.glyphs is None:
        raise UserError("the experiment glyphs needs its file: --glyphs FILE (made by benchmarks/accuracy/glyphs.py)")
    if len(options.names) > 1 and "NAME" not in options.results.name:
        raise UserError("--results must have NAME in its file's name where there are several experiments")
    if options.epochs is not None and options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is the warm-up")
    known = experiments(options.glyphs)
    found = {name: known[name].with_epochs(options.epochs) for name in options.names}
    jobs = {name: each.jobs((*each.seeds, *each.more_seeds), options.out) for name, each in found.items()}
    every = [job for each in jobs.values() for job in each]
    check(parser, options, {job.name for job in every}, {job.seed for job in every})
    earlier = read_earlier(options.earlier)
    jobs = {name: with_earlier(each, earlier) for name, each in jobs.items()}
    once = {
        job.folder: job
        for name, each in jobs.items()
        for job in asked(each, options, options.seeds or found[name].seeds)
    }
    once = sorted(once.values(), key=lambda job: not job.must)  # stable: those that decide first, of all experiments
    if options.list:
        training = to_train(once)
        print("\n".join(f"{state(job, training):10} {job.folder}" for job in once))
        return 0

    def write(missing: dict[Path, str]) -> dict[str, dict]:
        reports = {name: report(name, found[name], jobs[name], missing, options) for name in found}
        for name, each in reports.items():
            write_json(results_path(options.results, name), each)
        return reports

    reports = write(run_all(once, options.workers, options.minutes, write))
    for name, each in reports.items():
        say(each)
        print(f"wrote {results_path(options.results, name)}{'' if each['complete'] else ', incomplete'}")
    return int(any(job.result() is None for job in once))


if __name__ == "__main__":
    sys.exit(run_command("table", command))
