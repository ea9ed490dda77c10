"""docs/images/engine-memory.png: what plain-50 keeps alive on the compiled engine, beside ResNet-50's optimal plan.

python benchmarks/engine_memory.py [FILE.png]

Nothing is timed: the engine's figures are its plans', ResNet-50's the ledger's (`rd_deploy.memory`, in-place policy).
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rd_deploy.common import atomic_path
from rd_deploy.export.native import to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import chain_from_name
from rd_deploy.memory import ledger
from rd_deploy.native import Flag, Network

THREADS, PRECISION, ELEMENT_BYTES = 2, "bf16", 2
TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "engine-memory.png"
PLANS = {
    "plain50, layer by layer": (Flag.UNFUSED, "#999999"),
    "plain50, as it runs": (Flag.NONE, "#0072B2"),
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


def main() -> int:
    """Draw the picture and print its peaks."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    network = Network.from_bytes(to_rdp(chain_from_name("plain50"), PRECISION))
    curves = {"resnet50, optimal plan (feature maps alone)": (*ledger_curve("resnet50"), "#D55E00")}
    for label, (flags, colour) in PLANS.items():
        curves[f"{label} (arena: maps and scratch)"] = (*engine_curve(network, flags), colour)
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
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
