"""Picture of feature-map ledgers: live bytes over the layers, the part that shortcuts hold shaded."""

from pathlib import Path

from rd_deploy.common import UserError, atomic_path
from rd_deploy.memory import Ledger

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart by colour-blind readers too


def plot_ledgers(path: str | Path, ledgers: dict[str, Ledger], title: str = "Feature maps in memory") -> None:
    """Draw one to four labelled ledgers into one PNG (atomically): MiB that are live during each step.

    The shaded area is what shortcuts hold, drawn from the curve downwards; each peak is marked with its size.
    """
    if not 1 <= len(ledgers) <= len(COLOURS):
        raise UserError(f"a memory plot shows 1 to {len(COLOURS)} networks, not {len(ledgers)}; leave some out")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display, slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, ledger), colour in zip(ledgers.items(), COLOURS, strict=False):
        _draw(axes, label, ledger, colour)
    top = max(ledger.peak_bytes for ledger in ledgers.values()) / 2**20
    axes.set(xlabel="layer, in order of execution", ylabel="live feature maps (MiB)", ylim=(0, 1.15 * top))
    axes.set_xlim(0, max(len(ledger.steps) for ledger in ledgers.values()))
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes, label: str, ledger: Ledger, colour: str) -> None:
    """One network: a step per layer from its number to the next, the held part hatched, the peak marked."""
    live = [step.live_bytes / 2**20 for step in ledger.steps]
    free = [(step.live_bytes - step.shortcut_bytes) / 2**20 for step in ledger.steps]
    edges = range(len(live) + 1)
    axes.stairs(live, edges, color=colour, linewidth=1.8, label=f"{label}: peak {max(live):.2f} MiB")
    if any(step.shortcut_bytes for step in ledger.steps):
        held = f"held by its shortcuts ({ledger.shortcut_share:.0%} of the area)"
        axes.stairs(live, edges, baseline=free, fill=True, color=colour, alpha=0.3, linewidth=0, label=held)
    peak = (ledger.peak_bytes, ledger.peak_step)
    at = next(number for number, step in enumerate(ledger.steps) if (step.live_bytes, step.name) == peak)
    axes.plot(at + 0.5, live[at], "o", color=colour, markersize=5)
    text = f"{live[at]:.2f} MiB at {ledger.peak_step}"
    axes.annotate(text, (at + 0.5, live[at]), (4, 6), textcoords="offset points", color=colour, fontsize=9)
