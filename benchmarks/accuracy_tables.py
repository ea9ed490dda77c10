"""The tables of accuracy: docs/accuracy.md from the experiments of accuracy/table.py, and the README's short one."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import PurePosixPath

from committed import find, located, markdown, newest

EXPERIMENTS = ("main", "fp32", "full", "depth", "ablation", "levers", "rates", "bottleneck", "glyphs", "gpu")
SHORT = ("resnet", "resnet-muon", "plain", "start", "published", "sgd", "ours")  # rows of the README's table
FEWEST = 3  # as in accuracy/summary.py, whose imports would bring torch
OTHERS = {
    "resnet": "the ResNet",
    "resnet-muon": "the ResNet by Muon",
    "plain": "plain cross-entropy",
    "start": "cross-entropy from the same start",
    "published": "the published loss",
}


COLUMNS = (
    "Mean ± standard deviation (n - 1) over seeds, how many in brackets. Cost: multiply-accumulates of the training in "
    "units of training the plain network by cross-entropy; the teacher's own training comes besides. Intervals are "
    "Student's t over the seeds (of initialisation, order and augmentation), which takes the few differences to be "
    "normal; training and test images are the same for all, so that which images these are is not in the intervals. "
    "Means over different seeds cannot be subtracted: what is compared has equal seeds."
)
RATES = (
    "One seed. Validation and test are of the epoch that validation chose; training is the mean over the last epoch's "
    "steps, of augmented images and of weights that still moved."
)


def short() -> str:
    """The README's table: the rows that decide of the main experiment."""
    document = newest("*-accuracy-main.json")
    rows = [row for row in _rows(document) if row["key"] in SHORT]
    names = {row["name"] for row in rows}
    verdicts = "\n".join(f"- {line}" for line in _verdicts(document, ("resnet", "resnet-muon", "start", "published")))
    shown = [run for run in document["results"] if run["name"] in names]
    source = _source(document | {"results": shown}, COLUMNS, notes=False)
    return "\n\n".join(part for part in (_unfinished(document), _by_depth(rows), verdicts, source) if part)


def experiment(name: str) -> Callable[[], str]:
    """What makes the table of an experiment, with what is missing and what follows."""

    def table() -> str:
        document = find(f"*-accuracy-{name}.json")
        if document is None:
            script = "gpu.py" if name == "gpu" else f"table.py {name}"
            return f"Not run yet: `python benchmarks/accuracy/{script}`."
        if name == "rates":
            made, columns = (_rates(_rows(document)),), RATES
        else:
            verdicts = "\n".join(f"- {line}" for line in _verdicts(document, tuple(OTHERS)))
            made, columns = (_by_depth(_rows(document), seconds=True), verdicts), COLUMNS
        return "\n\n".join(part for part in (_unfinished(document), *made, _source(document, columns)) if part)

    return table


def _rows(document: dict) -> list[dict]:
    """The document's rows, each with how many of its results are by emulated bf16, and how many seconds they took."""
    emulated = Counter(run["name"] for run in document["results"] if _is_emulated(run))
    seconds = defaultdict(list)
    for run in document["results"]:
        seconds[run["name"]].append(run["seconds"])
    return [row | {"emulated": emulated[row["name"]], "took": _range(seconds[row["name"]])} for row in document["rows"]]


def _range(seconds: list[float]) -> str:
    """Of all seeds: machines and what else ran differ, so that a mean would say little."""
    low, high = f"{min(seconds):,.0f}", f"{max(seconds):,.0f}"
    return low if low == high else f"{low} to {high}"


def _is_emulated(run: dict) -> bool:
    return run["precision"].endswith("-emulated")


def _by_depth(rows: list[dict], seconds: bool = False) -> str:
    """A line per kind of row, a column per depth; cost and seconds are those of the deepest network that has it."""
    depths = sorted({row["depth"] for row in rows})
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {row["depth"]: row for row in rows if row["label"] == label}
        deepest = found[max(found)]
        teacher = deepest["teacher_cost"]
        line = [label, *(_cell(found.get(depth)) for depth in depths), f"{deepest['step_cost']:.2f}"]
        if deepest["depth"] != depths[-1]:
            line[-1] += f" (depth {deepest['depth']})"
        line.append("-" if teacher is None else f"{teacher:.2f}")
        lines.append([*line, deepest["took"]] if seconds else line)
    header = ["test accuracy, %", *(f"depth {depth}" for depth in depths), "cost", "its teacher's"]
    return markdown([*header, "seconds"] if seconds else header, lines)


def _rates(rows: list[dict]) -> str:
    """What chooses a rate, validation, beside what it comes to."""
    lines = [
        [
            row["label"] + _other_precision(row),
            *("-" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("validation", "mean", "training")),
        ]
        for row in rows
    ]
    return markdown(["%", "validation", "test", "training, last epoch"], lines)


def _other_precision(row: dict) -> str:
    """With a space before it, where it is not that of the other rows."""
    return f" {row['other_precision']}" if row.get("other_precision") else ""


def _cell(row: dict | None) -> str:
    """Mean ± standard deviation over so many seeds; the precision where it is not the table's usual one."""
    if row is None:
        return "-"
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
    emulated = f", {row['emulated']} e" if row.get("emulated") else ""
    return f"{100 * row['mean']:.2f}{spread} ({len(row['seeds'])}{emulated}){_other_precision(row)}"


def _verdicts(document: dict, against: tuple[str, ...]) -> list[str]:
    """What the pairs of seeds say, computed; against other methods nothing where there are fewer than two."""
    lines = []
    emulated = {(run["name"], run["seed"]) for run in document["results"] if _is_emulated(run)}
    for pair in document["comparisons"]:
        lever = pair["against"] == "lever"
        if pair["against"] not in (*against, "lever") or not pair["seeds"] or not (lever or pair["interval"]):
            continue
        between = f"{pair['label']} against {pair['base'] if lever else OTHERS[pair['against']]}"
        line = f"Depth {pair['depth']}, {between}: {100 * pair['mean']:+.2f} points"
        if pair["interval"]:
            low, high = (100 * bound for bound in pair["interval"])
            each = ", ".join(f"{100 * difference:+.2f}" for difference in pair["differences"])
            line += f", 95% interval {low:+.2f} to {high:+.2f} (seeds {', '.join(map(str, pair['seeds']))}: {each})."
        else:
            line += f" (seed {pair['seeds'][0]})."
        shares = [
            sum((pair[side], seed) in emulated for seed in pair["seeds"]) / len(pair["seeds"])
            for side in ("ours", "other")
        ]
        if precisions := pair.get("precisions"):
            first, other = (" and ".join(each) for each in precisions)
            line += f" Of unlike precisions: the first was trained in {first}, the other in {other}."
        elif shares[0] != shares[1]:
            first, other = ({0: "none", 1: "all"}.get(share, f"{share:.0%}") for share in shares)
            line += f" By emulated bf16 are {first} of the first's results and {other} of the other's."
        enough = len(pair["seeds"]) >= FEWEST  # older files have verdicts of two
        judged = [_verdict(pair, name, holds) for name, holds in pair["holds"].items()] if enough else []
        lines.append(" ".join([line, *judged]))
    return lines


def _verdict(pair: dict, name: str, holds: bool) -> str:
    if pair["against"] == "published":
        asked, bound = f"above it by more than the seeds spread ({100 * pair['spread']:.2f})", pair["spread"]
    else:
        asked, bound = {"goal": ("at least its mean", 0.0), "must": ("at most 0.3 points below it", -0.003)}[name]
    low, high = pair["interval"]
    doubt = "" if (low >= bound if holds else high < bound) else ", though the interval does not exclude the opposite"
    return f"{name.capitalize()}, {asked}: {'reached' if holds else '**missed**'} in the mean{doubt}."


def _unfinished(document: dict) -> str:
    """That something is missing, and what."""
    missing = document["missing"]
    if not missing:
        return ""
    named = "; ".join(f"{each['name']}, seed {each['seed']} ({each['why']})" for each in missing[:5])
    more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
    runs = len(missing) + len(document["results"])
    return f"**Unfinished: {len(missing)} of {runs} runs are missing.** {named}{more}."


def _source(document: dict, columns: str, *, notes: bool = True) -> str:
    """What the columns mean and where they come from; ``notes``: with what each run's circumstances were."""
    precisions = [run["precision"].removesuffix("-emulated") for run in document["results"]]
    settings = sorted({*zip([run["epochs"] for run in document["results"]], precisions, strict=True)})
    trained = " or ".join(f"{epochs} epochs in {precision}" for epochs, precision in settings) or "nothing trained yet"
    if len({precision for _, precision in settings}) > 1:
        usual = Counter(precisions).most_common(1)[0][0]
        trained += f", {usual} where nothing else is said"
    if emulated := sum(map(_is_emulated, document["results"])):
        trained += f"; {emulated} of the results by emulated bf16 (e)"
    machine = document.get("card") or document["machine"]["cpu"]
    seconds = f"of one thread{_more_threads(document)}, least and most of the seeds; they depend on the machine and"
    seconds = "of one GPU" if "card" in document else f"{seconds} on what else ran, the cost does not"
    parts = (
        f"{document['what']}; {trained}. {columns} ",
        f"Seconds are {seconds}. " if columns == COLUMNS and notes else "",
        f"Written on {machine}, {document['date']}, by commit {document['commit']}{_trained_by(document)}. ",
        *([f"{document['note']} ", *_origins(document), *_other_teachers(document)] if notes else _elsewhere(document)),
        f"From `{document['path']}`, made by `{_command(document)}`.",
    )
    return " ".join("".join(parts).split())


def _command(document: dict) -> str:
    """The document's command; files of results by their paths, which older documents have without folders."""
    return " ".join(located(word) if word.endswith(".json") else word for word in document["command"].split())


def _more_threads(document: dict) -> str:
    """Which results were made by more than one thread."""
    found = [run for run in document["results"] if run.get("threads", 1) > 1]
    named = ", ".join(f"{run['name']} seed {run['seed']}: {run['threads']}" for run in found)
    return f" ({named})" if named else ""


def _trained_by(document: dict) -> str:
    """The commits that trained the results that this file was the first to hold, where the runs said so."""
    own = [run["trained"] for run in document["results"] if "from" not in run and "trained" in run]
    commits = sorted({str(start["commit"]) for starts in own for start in starts})
    return f", which holds {len(own)} results first, trained by {' and '.join(commits)}" if commits else ""


def _elsewhere(document: dict) -> list[str]:
    """How many results the document took over from others, without what its whole table says of these."""
    files = [located(run["from"]["file"]) for run in document["results"] if "from" in run]
    if not files:
        return []
    here = PurePosixPath(document["path"]).parent
    others = Counter(PurePosixPath(file).parent.name for file in files if PurePosixPath(file).parent != here)
    named = ", ".join(f"{count} of machine {name or 'unknown'}" for name, count in sorted(others.items()))
    named = f" ({named})" if named else ""
    whole = len(document["results"])
    return [f"{len(files)} of the {whole} results are of earlier files{named}: [which](docs/accuracy.md). "]


def _origins(document: dict) -> list[str]:
    """Where results of earlier files came from."""
    origins = {
        (*(run["from"].get(key, "") for key in ("file", "date", "commit", "note")), run["from"]["machine"]["cpu"])
        for run in document["results"]
        if "from" in run
    }
    if not origins:
        return []
    named = "; ".join(
        f"{located(file)}: {cpu}, {date}, commit {commit}{f': {note}' if note else ''}"
        for file, date, commit, note, cpu in sorted(origins)
    )
    count = sum("from" in run for run in document["results"])
    return [f"{count} of the results are of earlier files, their seconds too ({named}). "]


def _other_teachers(document: dict) -> list[str]:
    """Whose teacher scored otherwise than the ResNet in the table: trained again, or tested on another machine."""
    depths = {row["name"]: row["depth"] for row in document["rows"]}
    resnets = {row["depth"]: row["name"] for row in document["rows"] if row["key"] == "resnet"}
    scores = {(run["name"], run["seed"]): run["test_accuracy"] for run in document["results"]}
    unlike = []
    for run in document["results"]:
        taught = run.get("teacher_test_accuracy")
        usual = scores.get((resnets.get(depths.get(run["name"])), run["seed"]))
        if taught is not None and usual is not None and taught != usual:
            unlike.append(f"{run['name']} seed {run['seed']} {100 * (taught - usual):+.2f}")
    if not unlike:
        return []
    return [
        "Teachers are trained again where a student is trained elsewhere; test accuracy of students' teachers, where "
        f"it is another than that of the ResNet in the table, against it in points: {', '.join(unlike)}. "
    ]
