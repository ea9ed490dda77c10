"""Draws docs/images/accuracy.png from the committed results of accuracy/table.py.

    python benchmarks/accuracy/plot.py [--main FILE.json] [--depth FILE.json] [--out docs/images/accuracy.png]

Left: test accuracy against depth (experiment depth, or main's depths while that was not run), with a standard deviation
over seeds each way; points of fewer seeds than most say of how many. Right: at the depth with the most rows of
experiment main, accuracy against the cost of training, in cross-entropy trainings of the plain network; hollow with the
training of the teacher.
"""

import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from committed import cost_of, find

from rd_deploy.common import UserError, atomic_path, check_file, run_command

COLOURS = {
    **{"resnet": "#555555", "resnet-tuned": "#AAAAAA", "plain": "#D55E00", "ours": "#0072B2"},
    **{"published": "#CC79A7", "start": "#009E73", "former": "#56B4E9", "ours-alone": "#332288"},
}
NAMES = {"resnet": "ResNet", "resnet-tuned": "ResNet by Muon", "plain": "plain, cross-entropy"}
NAMES |= {"published": "plain, the published loss"}
NAMES |= {"start": "plain, cross-entropy, from our start by Muon", "ours": "plain, ours"}
NAMES |= {"former": "plain, ours from the former start, rate 0.004"}
OTHER_COLOURS = (  # as many as rows of main may need: two of one colour would be taken for one
    *("#E69F00", "#000000", "#8C564B", "#9467BD", "#BCBD22", "#17BECF", "#F0027F", "#66A61E"),
    *("#7FC97F", "#FDC086", "#BF5B17", "#1B9E77"),
)


def read(path: Path | None, name: str) -> dict | None:
    """A given file, or the newest committed one, if any."""
    if path is None:
        return find(f"*-accuracy-{name}.json")
    document = json.loads(check_file(path, "results").read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise UserError(f"{path} holds no results of benchmarks/accuracy/table.py")
    return document


def draw(main: dict, depth: dict | None, path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    by_depth, by_cost = figure.subplots(1, 2)
    curves = series(depth or main)
    counts = Counter(len(row["seeds"]) for rows in curves.values() for row in rows).most_common(1)
    for key, rows in curves.items():
        spreads = [100 * (row["std"] or 0) for row in rows]
        by_depth.errorbar(
            [row["depth"] for row in rows],
            [100 * row["mean"] for row in rows],
            yerr=spreads,
            color=COLOURS[key],
            label=_label(NAMES[key], rows),
            marker="o",
            capsize=3,
        )
        for row in [row for row in rows if len(row["seeds"]) < counts[0][0]]:
            place = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 7, "color": COLOURS[key]}
            by_depth.annotate(f"n={len(row['seeds'])}", (row["depth"], 100 * row["mean"]), **place)
    depths = sorted({row["depth"] for row in (depth or main)["rows"]})
    by_depth.set(xlabel="depth", ylabel="test accuracy, %", xticks=depths)
    by_depth.set_title(textwrap.fill((depth or main)["what"], 70), fontsize=8)
    _draw_costs(by_cost, main)
    for axes in (by_depth, by_cost):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_depth.legend(fontsize=8, frameon=False)
    figure.legend(*by_cost.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})


def _label(text: str, rows: list[dict]) -> str:
    """With the precision, where it is not that of the other rows."""
    found = sorted({row["other_precision"] for row in rows if row.get("other_precision")})
    return f"{text} ({', '.join(found)})" if found else text


def series(document: dict) -> dict[str, list[dict]]:
    """The rows of each curve over depth."""
    found = {key: [row for row in document["rows"] if row["key"] == key] for key in NAMES}
    return {key: sorted(rows, key=lambda row: row["depth"]) for key, rows in found.items() if rows}


def costs(document: dict) -> list[dict]:
    """The rows at the greatest depth that ours has a result of."""
    ours = [row["depth"] for row in document["rows"] if row["key"] == "ours"]
    deepest = max(ours or (row["depth"] for row in document["rows"]))
    return [row for row in document["rows"] if row["depth"] == deepest]


def _draw_costs(axes: object, document: dict) -> None:
    rows, others = costs(document), iter(OTHER_COLOURS)
    for row in rows:
        colour = COLOURS.get(row["key"]) or next(others)
        mean, spread = 100 * row["mean"], 100 * (row["std"] or 0)
        style = {"color": colour, "marker": "o"}
        cost = cost_of(row)
        axes.errorbar(cost, mean, yerr=spread, capsize=3, ls="", label=_label(row["label"], [row]), **style)
        if row["teacher_cost"] is not None:
            whole = cost + row["teacher_cost"]
            axes.plot([cost, whole], [mean, mean], color=colour, lw=0.8, ls=":")
            axes.plot(whole, mean, mfc="white", **style)
    axes.set(xlabel="cost of training; 1: cross-entropy, plain (hollow: with the teacher's)")
    axes.set_title(f"depth {rows[0]['depth']}", fontsize=9)


def command() -> None:
    """Read, draw, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--main", type=Path)
    parser.add_argument("--depth", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "accuracy.png")
    options = parser.parse_args()
    main = read(options.main, "main")
    if main is None or not main["rows"]:
        raise UserError("no results of experiment main: run python benchmarks/accuracy/table.py main")
    draw(main, read(options.depth, "depth"), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(run_command("plot", command))
