"""Picture of feature-map ledgers: live bytes over the layers, the part that shortcuts hold shaded."""

from dataclasses import dataclass
from pathlib import Path

from rd_deploy.common import UserError, atomic_path
from rd_deploy.memory import Ledger

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart by colour-blind readers too


def plot_ledgers(path: str | Path, ledgers: dict[str, Ledger], title: str = "") -> None:
    """Draw one to four labelled ledgers into one PNG (atomically): MiB or KiB that are live during each step.

    The shaded area is what shortcuts hold, drawn from the curve downwards; each peak is marked with its size. The title
    is the ledgers' policy, batch and element size unless one is given.
    """
    if not 1 <= len(ledgers) <= len(COLOURS):
        raise UserError(f"a memory plot shows 1 to {len(COLOURS)} networks, not {len(ledgers)}; leave some out")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display, slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = max(ledger.peak_bytes for ledger in ledgers.values())
    unit, scale = ("MiB", 2**20) if top >= 2**20 else ("KiB", 2**10)
    for number, (label, ledger) in enumerate(ledgers.items()):
        width = 3.2 if number == 0 else 1.6  # so that equal curves stay visible
        _draw(axes, _Curve(label, ledger, unit, scale), COLOURS[number], width)
    axes.set(xlabel="layer, in order of execution", ylabel=f"live feature maps ({unit})", ylim=(0, 1.15 * top / scale))
    axes.set_xlim(0, max(len(ledger.steps) for ledger in ledgers.values()))
    axes.set_title(title or _title(ledgers), loc="left", fontweight="bold")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _title(ledgers: dict[str, Ledger]) -> str:
    """What was counted: every policy, batch and element size among the ledgers."""
    counted = {f"{entry.policy}, batch {entry.batch}, {entry.element_bytes} bytes each" for entry in ledgers.values()}
    return f"Feature maps in memory ({'; '.join(sorted(counted))})"


@dataclass(frozen=True)
class _Curve:
    """A labelled ledger and the unit it is drawn in: ``scale`` bytes."""

    label: str
    ledger: Ledger
    unit: str
    scale: int


def _draw(axes, curve: _Curve, colour: str, width: float) -> None:
    """One network: a step per layer from its number to the next, the held part shaded, the peak marked."""
    from matplotlib.patheffects import withStroke

    ledger = curve.ledger
    live = [step.live_bytes / curve.scale for step in ledger.steps]
    free = [(step.live_bytes - step.shortcut_bytes) / curve.scale for step in ledger.steps]
    edges = range(len(live) + 1)
    peak = f"peak {max(live):.2f} {curve.unit} at {ledger.peak_step}"
    axes.stairs(live, edges, baseline=None, color=colour, linewidth=width, label=f"{curve.label}: {peak}")
    if any(step.shortcut_bytes for step in ledger.steps):
        held = f"held by its shortcuts ({ledger.shortcut_share:.0%} of the area)"
        axes.stairs(live, edges, baseline=free, fill=True, color=colour, alpha=0.25, linewidth=0, label=held)
    peak_at = (ledger.peak_bytes, ledger.peak_step)
    at = next(number for number, step in enumerate(ledger.steps) if (step.live_bytes, step.name) == peak_at)
    axes.plot(at + 0.5, live[at], "o", color=colour, markersize=6, zorder=4)
    outline = [withStroke(linewidth=3, foreground="white")]  # readable over the curves
    text = axes.annotate(f"{live[at]:.2f}", (at + 0.5, live[at]), (0, 6), textcoords="offset points", ha="center")
    text.set(color=colour, fontweight="bold", path_effects=outline, zorder=5)
