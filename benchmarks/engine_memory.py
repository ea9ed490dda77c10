"""What plain-50 keeps alive on the compiled engine, beside ResNet-50's optimal plan: a picture and a table's figures.

python benchmarks/engine_memory.py --results FILE.json     also draws docs/images/engine-memory.png

Nothing is timed: the engine's figures are its plans', ResNet-50's the ledger's (`rd_deploy.memory`, in-place policy).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rd_deploy.bench.memory_plot import COLOURS
from rd_deploy.common import atomic_path, write_json
from rd_deploy.export.native import to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import chain_from_name
from rd_deploy.memory import ledger
from rd_deploy.native import Flag, Network

THREADS, PRECISION, ELEMENT_BYTES = 2, "bf16", 2
THREAD_COUNTS = (1, 2, 4, 8, 16, 32, 64)
TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "engine-memory.png"
PLANS = {
    "plain50, layer by layer": (Flag.UNFUSED, "#999999"),
    "plain50, as it runs": (Flag.NONE, COLOURS[0]),
    "plain50, small": (Flag.SMALL, "#009E73"),
}


def engine_curve(network: Network, flags: Flag) -> tuple[np.ndarray, np.ndarray, int]:
    """Share of multiply-accumulates done before each step (n + 1), live MiB of each step (n), bytes of the arena."""
    plan = network.plan(1, THREADS, flags=flags)
    macs = np.cumsum([0, *(step.macs for step in plan.steps)])
    return macs / macs[-1], np.array([step.live_bytes for step in plan.steps]) / 2**20, plan.info.arena_bytes


def ledger_curve(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The same of the ledger, whose steps are spread evenly."""
    counted = ledger(to_onnx(chain_from_name(name)), 1, ELEMENT_BYTES, "in-place")
    live = np.array([step.live_bytes for step in counted.steps]) / 2**20
    return np.linspace(0, 1, len(live) + 1), live, counted.peak_bytes


def plans(network: Network) -> list[dict]:
    """Arena and maps by the number of threads, in bytes."""
    rows = []
    for threads in THREAD_COUNTS:
        row = {"threads": threads}
        for name, flags in (("default", Flag.NONE), ("small", Flag.SMALL)):
            info = network.plan(1, threads, flags=flags).info
            row[name] = {"arena_bytes": info.arena_bytes, "feature_map_bytes": info.feature_map_bytes}
        rows.append(row)
    return rows


def main() -> int:
    """Draw the picture, print its peaks, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", required=True, metavar="FILE.json")
    options = parser.parse_args()
    network = Network.from_bytes(to_rdp(chain_from_name("plain50"), PRECISION))
    resnet = ledger_curve("resnet50")
    curves = {"resnet50, optimal plan (feature maps alone)": (*resnet, COLOURS[1])}
    for label, (flags, colour) in PLANS.items():
        curves[f"{label} (arena: maps and scratch)"] = (*engine_curve(network, flags), colour)
    isa = network.plan(1, THREADS).info.isa
    values = {"isa": isa, "resnet50_optimal_bytes": resnet[2], "plans": plans(network)}
    write_json(options.results, values)
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, (share, live, peak, colour) in curves.items():
        print(f"{peak:>10,} bytes: {label}")
        axes.stairs(live, share, baseline=None, color=colour, linewidth=2, label=f"{label}: {peak / 2**20:.2f} MiB")
    axes.set(xlabel="progress through the network", ylabel="live memory (MiB)", xlim=(0, 1), ylim=(0, None))
    axes.set_title(f"224x224, batch 1, {PRECISION}, {THREADS} threads", loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with atomic_path(TARGET) as temporary:
        figure.savefig(temporary, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
