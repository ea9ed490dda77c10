"""The tables of accuracy: those of two pages from the experiments of accuracy/table.py, and the README's short one.

What their columns and signs mean is said once, in docs/accuracy.md ("How to read the tables").
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import PurePosixPath
from string import ascii_uppercase

from committed import command_of, cost_of, find, located, markdown, newest, read

# The experiments of docs/accuracy.md and of docs/accuracy-choice.md.
RESULTS = ("main", "full", "depth", "bottleneck", "glyphs", "gpu")
CHOICES = ("rates", "ablation", "levers", "fp32")
EXPERIMENTS = RESULTS + CHOICES
# What the README calls the rows that it shows, and those that it compares ours with.
SHORT = {
    "resnet": "ResNet, SGD",
    "resnet-tuned": "ResNet, Muon",
    "resnet-twice": "ResNet, Muon, twice the epochs",
    "plain": "plain, Kaiming, SGD, no teacher",
    "plain-muon": "plain, Kaiming, Muon, no teacher",
    "start": "plain, our initialisation, Muon, no teacher",
    "start-twice": "plain, our initialisation, Muon, no teacher, twice the epochs",
    "published": "plain, the paper's loss, SGD",
    "sgd": "plain, `rd` with SGD",
    "ours": "**plain, `rd`**",
    "ours-taught-longer": "plain, `rd`, teacher trained twice as long",
    "ours-twice": "plain, `rd`, it and its teacher trained twice as long",
}
SHORT_PAIRS = {
    "resnet-tuned": "the ResNet, Muon",
    "resnet": "the ResNet, SGD",
    "start": "the same without a teacher",
    "plain-muon": "plain, Kaiming, Muon, no teacher",
    "published": "the paper's loss, SGD",
}
UNLIKE_COSTS = 0.05  # of one row at two depths; those of one method differ by a hundredth
USUAL_EPOCHS = 10
FEWEST = 3  # as in accuracy/summary.py, whose imports would bring torch
OTHERS = {
    "resnet": "the ResNet by SGD",
    "resnet-muon": "the ResNet by Muon at 0.004",  # of older files
    "resnet-tuned": "the ResNet by Muon",
    "resnet-twice": "the ResNet by Muon, twice the epochs",
    "plain": "plain cross-entropy, Kaiming",
    "plain-muon": "plain cross-entropy, Kaiming, by Muon",
    "start": "cross-entropy from the same start by Muon",
    "start-longer": "cross-entropy from the same start by Muon, 1.2 times the epochs",
    "start-twice": "cross-entropy from the same start by Muon, twice the epochs",
    "former-start": "cross-entropy from the same start at that rate",
    "start-sgd": "cross-entropy from the same start by SGD",
    "published": "the published loss",
}


def short() -> str:
    """The README's table: the rows that decide of the main experiment, each with its teacher's cost."""
    document = newest("*-accuracy-main.json")
    rows = [row for row in _rows(document) if row["key"] in SHORT]
    kinds = {_kind(row["name"]) for row in rows}
    shown = {part: [run for run in document[part] if _kind(run["name"]) in kinds] for part in ("results", "missing")}
    shown = document | shown
    depths = sorted({row["depth"] for row in rows})
    lines = []
    for key, label in SHORT.items():
        found = {row["depth"]: row for row in rows if row["key"] == key}
        if found:
            costs = [f"{cost_of(row) + (row['teacher_cost'] or 0):.1f}" for _, row in sorted(found.items())]
            lines.append([label, *(_cell(found.get(depth)) for depth in depths), ", ".join(dict.fromkeys(costs))])
    table = markdown(["network, training", *(f"depth {depth}" for depth in depths), "cost"], lines)
    page = "docs/accuracy.md"
    return _joined(table, _unfinished(shown), _line(shown, f"[sources]({page}#sources)", document["path"], page))


def short_differences() -> str:
    """The README's table of what ours is ahead by, in points."""
    document = newest("*-accuracy-main.json")
    ours = {row["name"] for row in document["rows"] if row["key"] == "ours"}
    found = [pair for pair in _pairs(document) if pair["ours"] in ours and pair["against"] in SHORT_PAIRS]
    pairs = {(pair["against"], pair["depth"]): pair for pair in found}
    depths = sorted({depth for _, depth in pairs})
    emulated = _emulated(document)
    lines = []
    for against, label in SHORT_PAIRS.items():
        cells = []
        for depth in depths:
            pair = pairs.get((against, depth))
            seeds = "" if pair is None or len(pair["seeds"]) < FEWEST else f", {len(pair['seeds'])} seeds"
            marked = "" if pair is None or not _unlike(pair, emulated) else ", one side emulated"
            cells.append("-" if pair is None else f"{_difference(pair)}{seeds}{marked}")
        lines.append([label, *cells])
    return markdown(["plain by `rd`, minus", *(f"depth {depth}" for depth in depths)], lines)


def experiment(name: str, results: str = "") -> Callable[[], str]:
    """What makes the table of an experiment, with what is missing and what follows; ``results``: the page to link to.

    It says how to read the tables, and where each result is from; the table's own page needs no name.
    """

    def table() -> str:
        document = _newest(name)
        if document is None:
            script = "gpu.py" if name == "gpu" else f"table.py {name}"
            return f"Not run yet: `python benchmarks/accuracy/{script}`."
        rows = _rows(document)
        pairs = [] if name == "rates" else _pairs(document) if name == "main" else _not_in_main(_pairs(document))
        made = _rates(rows) if name == "rates" else _by_depth(rows, seconds=True)
        used = [key for key, source in _sources().items() if source.used[name]]
        letters = f"[source{'s' * (len(used) > 1)}]({results}#sources) {', '.join(used)}"
        line = _line(document, letters, f"../{document['path']}", results)
        notes = [*_more_threads(document), *_other_teachers(document)] if name == "main" else []
        return _joined(made, _unfinished(document), _verdicts(document, pairs), line, "\n".join(notes))

    return table


def choice() -> str:
    """What a recipe was chosen by: accuracy on training images that no run was trained on."""
    document = _newest("choice")
    if document is None:
        return "Not measured yet: `python benchmarks/accuracy/choice.py`."
    runs = sorted(document["results"], key=lambda run: (run["arch"], run["seed"], -run["left_out_accuracy"]))
    lines = [
        [
            run["arch"],
            ", ".join(f"`{name}={value}`" for name, value in (_epochs(run["name"]) | run["options"]).items()) or "-",
            "-" if run["teacher"] is None else re.sub(r"-n\d.*", "", run["teacher"]),
            str(run["seed"]),
            *(f"{100 * run[f'{key}_accuracy']:.2f}" for key in ("left_out", "val", "test")),
        ]
        for run in runs
    ]
    images = [" or ".join(sorted({f"{run[f'{key}_images']:,}" for run in runs})) for key in ("left_out", "val")]
    header = [
        *("network", "otherwise than by the first default", "teacher", "seed"),
        *(f"left out ({images[0]}), %", f"validation ({images[1]}), %", "test, %"),
    ]
    line = f"Accuracy on {images[0]} training images that these runs left out · [JSON](../{document['path']})"
    return _joined(markdown(header, lines, texts=4), line)


def _epochs(name: str) -> dict[str, int]:
    """How long a run trained, where its folder's name says that it was not the usual time."""
    found = re.search(r"-e(\d+)-s\d+$", name)
    epochs = int(found[1]) if found else USUAL_EPOCHS
    return {} if epochs == USUAL_EPOCHS else {"epochs": epochs}


def _newest(name: str) -> dict | None:
    return find(f"*-accuracy-{name}.json")


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _kind(name: str) -> str:
    """A run's name without its depth."""
    return re.sub(r"\d+", "", name, count=1)


# --- results


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
    """A line per kind of row, a column per depth; seconds are those of the deepest network that has it.

    So is the cost, unless a method does less at some depth.
    """
    depths = sorted({row["depth"] for row in rows})
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {row["depth"]: row for row in rows if row["label"] == label}
        deepest = found[max(found)]
        teacher = deepest["teacher_cost"]
        costs = {depth: cost_of(row) for depth, row in sorted(found.items())}
        line = [label, *(_cell(found.get(depth)) for depth in depths), f"{cost_of(deepest):.2f}"]
        if max(costs.values()) - min(costs.values()) > UNLIKE_COSTS:
            line[-1] = ", ".join(f"{cost:.2f} (depth {depth})" for depth, cost in costs.items())
        elif deepest["depth"] != depths[-1]:
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


# --- what follows


def _pairs(document: dict) -> list[dict]:
    """The document's comparisons that have a seed."""
    return [pair for pair in document["comparisons"] if pair["seeds"]]


def _not_in_main(pairs: list[dict]) -> list[dict]:
    """Those whose two rows main does not compare: it may have more seeds of them, and so another result."""
    main = _newest("main")
    there = [{pair["ours"], pair["other"]} for pair in _pairs(main)] if main else []
    return [pair for pair in pairs if {pair["ours"], pair["other"]} not in there]


def _verdicts(document: dict, pairs: list[dict]) -> str:
    """What pairs of seeds say, a line each."""
    emulated = _emulated(document)
    lines = [_compared(pair, _unlike(pair, emulated)) for pair in pairs]
    header = ["depth", "row", "against", "difference (95% interval)", "by seed", "goal", "must"]
    judged = len(header) if any({*line[-2:]} != {"-"} for line in lines) else -2
    return markdown(header[:judged], [line[:judged] for line in lines], texts=len(header[:judged])) if lines else ""


def _emulated(document: dict) -> set[tuple[str, int]]:
    return {(run["name"], run["seed"]) for run in document["results"] if _is_emulated(run)}


def _unlike(pair: dict, emulated: set[tuple[str, int]]) -> set[int]:
    """The seeds of which one side alone was trained by emulated bf16."""
    sides = [{seed for seed in pair["seeds"] if (pair[side], seed) in emulated} for side in ("ours", "other")]
    return sides[0] ^ sides[1]


def _compared(pair: dict, unlike: set[int]) -> list[str]:
    """A pair's line; ``unlike``: its seeds that are not trained alike on both sides."""
    against = pair["base"] if pair["against"] == "lever" else OTHERS[pair["against"]]
    each = zip(pair["seeds"], pair["differences"], strict=True)
    by_seed = ", ".join(f"{seed}{'e' * (seed in unlike)}: {100 * difference:+.2f}" for seed, difference in each)
    verdicts = [_verdict(pair, name, bool(unlike)) for name in ("goal", "must")]
    return [str(pair["depth"]), pair["label"], against, _difference(pair), by_seed, *verdicts]


def _difference(pair: dict) -> str:
    """The mean in points, and its interval where there are seeds enough for one."""
    interval = {1: "one seed", 2: "two seeds: no interval"}.get(len(pair["seeds"]))
    if interval is None:
        interval = " to ".join(f"{100 * bound:+.2f}" for bound in pair["interval"])
    precisions = [" and ".join(each) for each in pair.get("precisions") or ()]
    unlike = f", {' against '.join(precisions)}" if precisions else ""
    return f"{100 * pair['mean']:+.2f} ({interval}){unlike}"


def _verdict(pair: dict, name: str, unlike: bool) -> str:
    """Whether the mean reaches what is asked, unsure where the interval does not exclude the opposite."""
    if name not in pair["holds"] or len(pair["seeds"]) < FEWEST:  # older files have verdicts of two
        return "-"
    holds, (low, high) = pair["holds"][name], pair["interval"]
    bound = pair["spread"] if pair["against"] == "published" else {"goal": 0.0, "must": -0.003}[name]
    sure = low >= bound if holds else high < bound
    return f"{'yes' if holds else '**no**'}{'' if sure else ', unsure'}{' (e)' if unlike else ''}"


# --- where it comes from


def _unfinished(document: dict) -> str:
    """That something is missing, and what."""
    missing = document["missing"]
    if not missing:
        return ""
    named = "; ".join(f"{each['name']}, seed {each['seed']} ({each['why']})" for each in missing[:5])
    more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
    runs = len(missing) + len(document["results"])
    return f"**Unfinished: {len(missing)} of {runs} runs are missing.** {named}{more}."


def _line(document: dict, sources: str, path: str, page: str) -> str:
    """What was trained, and links: to the JSON at ``path`` and to how to read it on ``page``."""
    runs = document["results"]
    emulated = sum(map(_is_emulated, runs))
    parts = [
        f"{document['what']}; {_trained(runs)}",
        f"{len(runs)} results{f', {emulated} emulated (e)' if emulated else ''}",
        *([sources] if runs else []),
        f"[JSON]({path})",
        f"[how to read]({page}#how-to-read-the-tables)",
    ]
    return " · ".join(parts)


def _trained(runs: list[dict]) -> str:
    """The epochs and precisions of results."""
    epochs = sorted({run["epochs"] for run in runs})
    precisions = [each for each, _ in Counter(run["precision"].removesuffix("-emulated") for run in runs).most_common()]
    if not runs:
        return "nothing trained yet"
    others = f" ({' or '.join(precisions[1:])} where it says so)" if len(precisions) > 1 else ""
    return f"{' or '.join(map(str, epochs))} epochs, {precisions[0]}{others}"


@dataclass
class Source:
    """A file of results: what it says of itself, and what the tables have of it.

    ``used``: for each experiment, how many of its results this file was the first to hold. ``trained``: by commit those
    of these runs, by name and seed, that say which commit trained them.
    """

    about: dict
    used: Counter = field(default_factory=Counter)
    trained: dict[str, set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))


def sources() -> str:
    """The table of all files that were the first to hold a result of a table, and of the tables' own."""
    header = ["key", "file", "CPU", "date", "commit", "results first here", "note", "command"]
    lines = [[key, *_described(source)] for key, source in _sources().items()]
    return markdown(
        header, [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines], len(header)
    )


def _sources() -> dict[str, Source]:
    """Every source by its key: A, B, ... in the order of their files' names, which begin with the date."""
    found: dict[tuple[str, str], Source] = {}
    for name in EXPERIMENTS:
        if (document := _newest(name)) is None:
            continue
        found.setdefault(_identity(document), Source(document))
        for run in document["results"]:
            about = _about(run["from"]) if "from" in run else document
            source = found.setdefault(_identity(about), Source(about))
            source.used[name] += 1
            for start in run.get("trained", []):
                source.trained[str(start["commit"])].add((run["name"], run["seed"]))
    keys = [*ascii_uppercase, *map("".join, product(ascii_uppercase, repeat=2))]
    order = sorted(found, key=lambda identity: (PurePosixPath(identity[0]).name, identity))
    return dict(zip(keys, (found[identity] for identity in order), strict=False))


def _about(origin: dict) -> dict:
    """The file that a result says it is from; where it is not here, what the result says of it."""
    path = located(origin)
    return {**origin, "path": origin["file"]} if path is None else read(path)


def _identity(document: dict) -> tuple[str, str]:
    return document["path"], str(document["commit"])


def _described(source: Source) -> list[str]:
    """A source's line after its key."""
    about, path = source.about, PurePosixPath(source.about["path"])
    here = path.is_relative_to("benchmarks/results")
    trained = ", ".join(f"{commit} ({len(runs)})" for commit, runs in sorted(source.trained.items()))
    return [
        f"[{path.relative_to('benchmarks/results')}](../{path})" if here else str(path),
        about.get("card") or about["machine"]["cpu"],
        about["date"],
        f"{about['commit']}{f'; trained by {trained}' if trained else ''}",
        ", ".join(f"{name} {count}" for name, count in source.used.items()) or "none",
        about.get("note") or "-",
        f"`{command_of(about)}`" if "command" in about else "-",
    ]


def _more_threads(document: dict) -> list[str]:
    """Which results were made by more than one thread: a line, or none."""
    found = [run for run in document["results"] if run.get("threads", 1) > 1]
    named = ", ".join(f"{run['name']} seed {run['seed']} ({run['threads']})" for run in found)
    return [f"- By more than one thread: {named}."] if found else []


def _other_teachers(document: dict) -> list[str]:
    """Whose teacher scored otherwise than the ResNet in the table, trained or tested elsewhere: a line, or none."""
    teachers = {row["name"]: row.get("teacher") for row in document["rows"]}  # older files lack it
    scores = {(run["name"], run["seed"]): run["test_accuracy"] for run in document["results"]}
    unlike = []
    for run in document["results"]:
        taught = run.get("teacher_test_accuracy")
        usual = scores.get((teachers.get(run["name"]), run["seed"]))
        if taught is not None and usual is not None and taught != usual:
            unlike.append(f"{run['name']} seed {run['seed']} {100 * (taught - usual):+.2f}")
    if not unlike:
        return []
    return [
        "- A teacher is trained again where its student is trained on another machine. Students whose teacher's test "
        f"accuracy is not that of the ResNet in the table, and by how many points: {', '.join(unlike)}."
    ]
