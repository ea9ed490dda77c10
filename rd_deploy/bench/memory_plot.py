"""Feature-map ledgers drawn: live bytes over the layers of two networks, one panel per policy."""

from collections.abc import Sequence
from pathlib import Path

from rd_deploy.common import atomic_path
from rd_deploy.memory import Ledger

COLOURS = ("#D55E00", "#0072B2")  # the model, what it is compared with: Okabe and Ito's, for colour-blind readers too
WIDTHS = (3, 1.4)  # the model's curve shows under the other where both are equal
POLICIES = {"separate": "each sum is a new tensor", "in-place": "sums overwrite the shortcut where they can"}


def plot_ledgers(path: str | Path, ledgers: dict[str, dict[str, Ledger]]) -> None:
    """Write one PNG (atomically). ``ledgers``: policy to network (the model, what it is compared with) to ledger."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display, slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5 * len(ledgers)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ledgers), sharex=True, sharey=True, squeeze=False)[:, 0]
    draw_ledgers(panels, ledgers)
    for panel in panels:
        panel.label_outer()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_ledgers(panels: Sequence, ledgers: dict[str, dict[str, Ledger]]) -> None:
    """Draw each policy's networks into one panel (matplotlib axes), all to the same scale in MiB or KiB.

    The filled area is what shortcuts hold; each peak is marked with its size.
    """
    every = [ledger for pair in ledgers.values() for ledger in pair.values()]
    top, length = max(ledger.peak_bytes for ledger in every), max(len(ledger.steps) for ledger in every)
    unit, scale = ("MiB", 2**20) if top >= 2**20 else ("KiB", 2**10)
    counted = f"batch {every[0].batch}, {every[0].element_bytes} bytes each"
    for axes, (policy, pair) in zip(panels, ledgers.items(), strict=True):
        for side, (label, ledger) in enumerate(pair.items()):
            _curve(axes, label, ledger, side, scale)
        axes.set(xlim=(0, length), ylim=(0, 1.4 * top / scale))  # room for the legend above every curve
        axes.set(xlabel="fused layer, in order of execution", ylabel=f"live feature maps ({unit})")
        axes.set_title(f"Feature maps, {policy} policy ({counted})\n{POLICIES[policy]}", loc="left", size=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", fontsize=9)


def _curve(axes, label: str, ledger: Ledger, side: int, scale: int) -> None:
    """One network: layer n spans n to n + 1; what shortcuts hold is filled, the peak marked."""
    from matplotlib.patheffects import withStroke

    colour = COLOURS[side]
    live = [step.live_bytes / scale for step in ledger.steps]
    held = [step.shortcut_bytes / scale for step in ledger.steps]
    axes.stairs(live, baseline=None, color=colour, linewidth=WIDTHS[side], label=f"{label}: peak at {ledger.peak_step}")
    if any(held):
        share = f"held by shortcuts of {label} ({ledger.shortcut_share:.0%} of its area)"
        axes.stairs(held, fill=True, color=colour, alpha=0.25, linewidth=0, zorder=0, label=share)
    at = [(step.live_bytes, step.name) for step in ledger.steps].index((ledger.peak_bytes, ledger.peak_step))
    peak = (at + 0.5, live[at])
    axes.plot(*peak, "o", color=colour, markersize=5)
    text = axes.annotate(f"{live[at]:.2f}", peak, (0, 5), textcoords="offset points", ha="center", color=colour)
    text.set(weight="bold", path_effects=[withStroke(linewidth=3, foreground="white")])  # readable over the curves
