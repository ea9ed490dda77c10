"""The tables of accuracy: docs/accuracy.md from the experiments of accuracy/table.py, and the README's short one."""

from collections import Counter
from collections.abc import Callable

from committed import find, located, markdown, newest

EXPERIMENTS = ("main", "fp32", "full", "depth", "ablation", "levers", "rates", "bottleneck", "glyphs", "gpu")
SHORT = ("resnet", "resnet-muon", "plain", "start", "published", "sgd", "ours")  # rows of the README's table
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
    "Student's t, which takes the few differences to be normal."
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
    """The document's rows, each with how many of its results are by emulated bf16."""
    names = Counter(run["name"] for run in document["results"] if _is_emulated(run))
    return [row | {"emulated": names[row["name"]]} for row in document["rows"]]


def _is_emulated(run: dict) -> bool:
    return run["precision"].endswith("-emulated")


def _by_depth(rows: list[dict], seconds: bool = False) -> str:
    """A line per kind of row, a column per depth; costs are those of the deepest network that has the row."""
    depths = sorted({row["depth"] for row in rows})
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {row["depth"]: row for row in rows if row["label"] == label}
        deepest = found[max(found)]
        teacher = deepest["teacher_cost"]
        line = [label, *(_cell(found.get(depth)) for depth in depths), f"{deepest['step_cost']:.2f}"]
        line.append("-" if teacher is None else f"{teacher:.2f}")
        lines.append([*line, f"{deepest['seconds']:,.0f}"] if seconds else line)
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
    for pair in document["comparisons"]:
        lever = pair["against"] == "lever"
        if pair["against"] not in (*against, "lever") or not pair["seeds"] or not (lever or pair["interval"]):
            continue
        between = f"{pair['label']} against {pair['base'] if lever else OTHERS[pair['against']]}"
        line = f"Depth {pair['depth']}, {between}: {100 * pair['mean']:+.2f} points"
        if pair["interval"]:
            low, high = (100 * bound for bound in pair["interval"])
            line += f", 95% interval {low:+.2f} to {high:+.2f} ({len(pair['seeds'])} pairs of seeds)."
        else:
            line += " (one seed)."
        if precisions := pair.get("precisions"):
            first, other = (" and ".join(each) for each in precisions)
            line += f" Of unlike precisions: the first was trained in {first}, the other in {other}."
        lines.append(" ".join([line, *(_verdict(pair, name, holds) for name, holds in pair["holds"].items())]))
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
    seconds = "of one GPU" if "card" in document else "of one thread and depend on what else ran"
    parts = (
        f"{document['what']}; {trained}. {columns} ",
        f"Seconds are {seconds}. " if columns == COLUMNS and notes else "",
        f"{machine}, {document['date']}, commit {document['commit']}. ",
        *([f"{document['note']} ", *_again(document)] if notes else _elsewhere(document)),
        f"From `{document['path']}`, made by `{_command(document)}`.",
    )
    return " ".join("".join(parts).split())


def _command(document: dict) -> str:
    """The document's command; files of results by their paths, which older documents have without folders."""
    return " ".join(located(word) if word.endswith(".json") else word for word in document["command"].split())


def _elsewhere(document: dict) -> list[str]:
    """How many results the document took over from others, without what its whole table says of these."""
    count = sum("from" in run for run in document["results"])
    if not count:
        return []
    whole = len(document["results"])
    return [f"{count} of the {whole} results are of earlier files, some of another CPU: [which](docs/accuracy.md). "]


def _again(document: dict) -> list[str]:
    """Where results of earlier files came from, and what became of teachers that were trained again."""
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
    said = f"{count} of the results are of earlier files, their seconds too ({named}). "
    again = document["trained_again"]
    if not again:
        return [said]
    changes = [f"{each['name']} seed {each['seed']} {100 * (each['again'] - each['earlier']):+.2f}" for each in again]
    return [
        said,
        f"Teachers trained again for students of today, points against the result in the table: {', '.join(changes)}. ",
    ]
