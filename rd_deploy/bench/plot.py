"""The picture of a benchmark: latency, ratios, and feature maps over the layers of both networks."""

from collections.abc import Sequence
from pathlib import Path

from rd_deploy.bench.claims import SPEED
from rd_deploy.bench.memory_plot import COLOURS, draw_ledgers
from rd_deploy.bench.report import engine_label
from rd_deploy.common import atomic_path
from rd_deploy.memory import Ledger

FAR_APART = 30  # times: on a linear axis the least could no longer be read


def plot_bench(path: str | Path, document: dict, ledgers: dict[str, dict[str, Ledger]]) -> None:
    """Write one PNG: latency bars (median, 95% interval), ratio per setting, live bytes over the steps.

    ``document``: the content of bench.json. ``ledgers``: policy to network to ledger, or nothing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sum(len(document.get(part, ())) for part in ("ratios", "best", "native_against_others"))
    figure = Figure(figsize=(11, 3.2 + 0.42 * rows + 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1 + 0.42 * rows, 3.2])
    latency = figure.add_subplot(grid[0, 0])
    draw_latency(latency, document)
    draw_ratios(figure.add_subplot(grid[0, 1]), document)
    if ledgers:
        draw_ledgers([figure.add_subplot(grid[1, column]) for column in range(len(ledgers))], ledgers)
    figure.suptitle(title(document))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def title(document: dict) -> str:
    """The two networks, and what they ran on; a GPU has a line of its own."""
    machine, threads = document["environment"], document["environment"]["threads"]
    gpu = machine.get("gpu")
    card = f"{gpu['name']}\n" if gpu else ""
    where = f"{machine['cpu']['model'] or 'unknown CPU'}, {threads} thread{'s' if threads != 1 else ''}"
    return f"{document['model']} against {document['compare']} · {card}{where}"


def _setting(row: dict) -> str:
    return f"{engine_label(row)}\n{_where(row)}"


def _where(row: dict) -> str:
    return f"{row['precision']}, batch {row['batch']}"


def _scale(axes, values: Sequence[float], label: str) -> None:
    """Scale and label of the horizontal axis: logarithmic where one engine is far slower than another."""
    least, most = min(values), max(values)
    axes.margins(x=0.15)
    if most > FAR_APART * least > 0:
        axes.set_xscale("log")
        axes.set_xlim(least / 2, most * 3)  # and room for its number
        label += "\non a logarithmic axis"
    axes.set_xlabel(label)


def draw_latency(axes, document: dict) -> None:
    """Horizontal bars, two per setting; time per image, so that batches share one axis."""
    settings = list(dict.fromkeys(_setting(row) for row in document["results"]))
    for side, name in enumerate((document["model"], document["compare"])):
        rows = [row for row in document["results"] if row["model"] == name]
        places = [settings.index(_setting(row)) + (side - 0.5) * 0.38 for row in rows]
        values = [row["median_ms"] / row["batch"] for row in rows]
        below = [value - row["low_ms"] / row["batch"] for value, row in zip(values, rows, strict=True)]
        above = [row["high_ms"] / row["batch"] - value for value, row in zip(values, rows, strict=True)]
        axes.barh(places, values, 0.36, xerr=(below, above), color=COLOURS[side], label=name, capsize=2)
        for place, value, high in zip(places, values, above, strict=True):
            axes.annotate(
                f"{value:.3g}", (value + high, place), (4, 0), textcoords="offset points", va="center", size=8
            )
    axes.set_yticks(range(len(settings)), settings, size=8)
    axes.set_ylim(len(settings) - 0.4, -0.6)
    times = [row[name] / row["batch"] for row in document["results"] for name in ("low_ms", "high_ms")]
    _scale(axes, times, "ms per image, host to host (median, 95% interval)")
    axes.set_title("Latency: shorter is better", size=10)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def draw_ratios(axes, document: dict) -> None:
    """Points with intervals against the lines of no difference and of the claim."""
    rows = [(_setting(row), row) for row in document["ratios"]]
    for kind, across in (("best", document["best"]), ("best other", document.get("native_against_others", ()))):
        rows += [(f"{kind}: {row['model_engine']} / {row['compare_engine']}\n{_where(row)}", row) for row in across]
    order = list(dict.fromkeys(_where(row) for row in document["ratios"]))
    rows.sort(key=lambda entry: order.index(_where(entry[1])))
    for place, (_, row) in enumerate(rows):
        error = ([row["ratio"] - row["low"]], [row["high"] - row["ratio"]])
        best = "model_engine" in row
        axes.errorbar(row["ratio"], place, xerr=error, fmt="D" if best else "o", color="black", capsize=3, markersize=5)
        # Right of the axes, where neither the intervals nor the two lines can run through it.
        beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(f"{row['ratio']:.2f}x", (1, place), (5, 0), va="center", size=8, **beside)
    axes.axvline(1, color="grey", linewidth=1)
    axes.axvline(SPEED, color="green", linewidth=1, linestyle="--")
    where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "size": 8}
    axes.annotate("equal", (1, 1), (-3, -2), ha="right", color="grey", **where)
    axes.annotate(f"claim {SPEED}x", (SPEED, 1), (3, -2), color="green", **where)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], size=8)
    axes.set_ylim(len(rows) - 0.5, -0.9)
    ends = [1, SPEED, *(row[name] for _, row in rows for name in ("low", "high"))]
    _scale(axes, ends, f"time of {document['compare']} / time of {document['model']} (95% interval)")
    axes.set_title(f"How many times faster {document['model']} is", size=10)
    axes.spines[["top", "right"]].set_visible(False)
