"""From the results of runs to an experiment's table: means over seeds, cost, and what follows for our method."""

import math
import statistics
from collections import Counter
from dataclasses import replace

from experiments import SHARED, Experiment, Row

WITHIN = 0.003  # of the ResNet's accuracy: what our method must reach; its goal is to equal it
CONFIDENCE = 0.95
FEWEST = 3  # pairs of seeds of a verdict: the two differences of two can be equal by chance, and their interval short
# What is compared with ours, and with ours by SGD: with the latter what is by SGD, too.
AGAINST = {
    "ours": (
        *("resnet", "resnet-tuned", "resnet-twice", "plain", "plain-muon"),
        *("start", "start-longer", "start-twice", "published"),
    ),
    "ours-alone": ("resnet-tuned", "start"),
    "ours-taught-longer": ("resnet-tuned", "resnet-twice"),
    "ours-twice": ("resnet-twice", "start-twice"),
    "former": ("resnet", "resnet-tuned", "former-start"),
    "sgd": ("resnet", "start-sgd", "published"),
}
JUDGED = ("resnet", "resnet-tuned")  # what our method was asked to equal
JUDGED_TWICE = {"ours-twice": "resnet-twice"}  # and what it is to equal when both train for longer


def summary(experiment: Experiment, results: list[dict]) -> list[dict]:
    """A line for each row and depth that has results: accuracy over seeds, cost, seconds.

    ``std`` is that of the sample (n - 1). ``teacher``: the name of the row that taught it, if any.
    ``validation``: mean accuracy of the epoch that was chosen; ``training``:
    that of the last epoch, None where a result does not say it. ``precisions``: of each seed (`precision`);
    ``other_precision``: those in words where they are not all the experiment's usual one, else empty. ``step_cost``:
    multiply-accumulates of a step in units of a cross-entropy step of the plain network; ``plain_steps``: of the whole
    training, in the same units; ``cost`` and ``teacher_cost``: what its training and the teacher's own cost in units of
    a whole cross-entropy training of the plain network, the latter None without one.
    """
    lines, usual = [], Counter(map(precision, results)).most_common(1)
    for row in experiment.rows:
        for depth in experiment.depths_of(row):
            runs = _runs(experiment, row, depth, results)
            if not runs:
                continue
            accuracies = [run["test_accuracy"] for run in runs]
            precisions = [precision(run) for run in runs]
            training = [run.get("last_train_accuracy") for run in runs]
            teachers = [] if row.taught_by is None else _runs(experiment, row.taught_by, depth, results)
            plain, teacher = (_plain_steps(run[0], experiment) if run else None for run in (runs, teachers))
            cost = runs[0]["step_cost"] * experiment.epochs_of(row) / experiment.epochs
            lines.append(
                {
                    "name": experiment.name(row, depth),
                    "label": row.label,
                    "key": row.key,
                    "teacher": row.taught_by and experiment.name(row.taught_by, depth),
                    "base": row.base and experiment.name(replace(row, name=row.base), depth),
                    "depth": depth,
                    "residual": row.residual,
                    "seeds": [run["seed"] for run in runs],
                    "test_accuracies": accuracies,
                    "mean": statistics.mean(accuracies),
                    "std": statistics.stdev(accuracies) if len(runs) > 1 else None,
                    "validation": statistics.mean(run["val_accuracy"] for run in runs),
                    "training": None if None in training else statistics.mean(training),
                    "precisions": precisions,
                    "other_precision": "" if {*precisions} == {usual[0][0]} else " and ".join(sorted({*precisions})),
                    "step_cost": runs[0]["step_cost"],
                    "plain_steps": plain,
                    "cost": cost,
                    "teacher_cost": teacher * cost / plain if teachers else None,
                    "seconds": statistics.mean(run["seconds"] for run in runs),
                }
            )
    return lines


def precision(run: dict) -> str:
    """What a run computed in, which its machine settled.

    Emulated bf16 rounds where bf16 on CPUs does and sums in another order, as these do among each other. A GPU's
    libraries choose more than that.
    """
    found = run["precision"].removesuffix("-emulated")
    return f"{found} on a GPU" if run.get("device") == "cuda" else found


def _runs(experiment: Experiment, row: Row, depth: int, results: list[dict]) -> list[dict]:
    name = experiment.name(row, depth)
    return sorted((result for result in results if result["name"] == name), key=lambda result: result["seed"])


def _plain_steps(run: dict, experiment: Experiment) -> float:
    batch = (SHARED | experiment.settings)["batch_size"]
    return run["step_cost"] * run["epochs"] * max(1, run["train_images"] // batch)


def paired(ours: dict, other: dict) -> dict:
    """Our row against another of the same depth, over the seeds that both have.

    ``interval``: Student's t for the mean of the differences, None with fewer than two seeds. It takes the differences
    to be normal, which so few seeds cannot show. ``spread``: the larger standard deviation of
    both rows over these seeds. ``precisions``: those of each row, None where every pair is of one.
    """
    accuracies = [dict(zip(row["seeds"], row["test_accuracies"], strict=True)) for row in (ours, other)]
    seeds = sorted(set(accuracies[0]) & set(accuracies[1]))
    differences = [accuracies[0][seed] - accuracies[1][seed] for seed in seeds]
    found = {"depth": ours["depth"], "ours": ours["name"], "other": other["name"], "against": other["key"]}
    found |= {"seeds": seeds, "differences": differences, "mean": statistics.mean(differences) if seeds else None}
    precisions = [dict(zip(row["seeds"], row["precisions"], strict=True)) for row in (ours, other)]
    unlike = any(precisions[0][seed] != precisions[1][seed] for seed in seeds)
    found["precisions"] = [sorted({each[seed] for seed in seeds}) for each in precisions] if unlike else None
    several = len(seeds) > 1
    return found | {
        "interval": t_interval(differences) if several else None,
        "spread": max(statistics.stdev(each[seed] for seed in seeds) for each in accuracies) if several else None,
    }


def t_interval(values: list[float], confidence: float = CONFIDENCE) -> list[float]:
    """[low, high]: the confidence interval of the mean of at least two values, by Student's t."""
    from scipy.stats import t  # slow to import

    half = t.ppf((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values) - half, statistics.mean(values) + half]


def comparisons(rows: list[dict]) -> list[dict]:
    """Ours, and ours by SGD, against ResNets, plain training and the published method, each with what it decides.

    Of rows that vary another one, by a lever more or less: each against that, as ``lever``.
    ``holds``: against those of `JUDGED`, and of `JUDGED_TWICE` by its key, ``goal`` (at least their mean) and ``must``
    (at most `WITHIN` below it), against the published method ``must`` (above it by more than the spread over seeds).
    With fewer than `FEWEST` seeds of both it is empty, and where they were trained in unlike precisions.
    """
    found = []
    for ours in [row for row in rows if row["key"] in AGAINST]:
        against = AGAINST[ours["key"]]
        for other in [row for row in rows if row["key"] in against and row["depth"] == ours["depth"]]:
            pair = paired(ours, other)
            found.append({**pair, "label": ours["label"], "holds": _holds(pair, ours["key"])})
    by_name = {row["name"]: row for row in rows}
    for row in [row for row in rows if row["base"] in by_name]:
        labels = {"label": row["label"], "base": by_name[row["base"]]["label"]}
        found.append({**paired(row, by_name[row["base"]]), "against": "lever", **labels, "holds": {}})
    return found


def _holds(pair: dict, key: str) -> dict[str, bool]:
    if len(pair["seeds"]) < FEWEST or pair["precisions"]:
        return {}
    mean = round(pair["mean"], 9)  # of multiples of 1e-4, whose sums are not exact
    if pair["against"] in (*JUDGED, JUDGED_TWICE.get(key)):
        return {"goal": mean >= 0, "must": mean >= -WITHIN}
    return {"must": mean > round(pair["spread"], 9)} if pair["against"] == "published" else {}
