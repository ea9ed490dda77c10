"""What is seen while a run trains: a few lines that are redrawn in a terminal, and nothing elsewhere.

The lines that a run prints, one an epoch, are printed either way, above these.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rd_deploy.common import require

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REDRAW = 0.25  # seconds between two drawings
BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 32  # epochs that a sparkline shows at most


@dataclass
class Phase:
    """Where a phase stands: step ``done`` of ``steps``, ``per_epoch`` an epoch; accuracies in [0, 1], one an epoch."""

    name: str
    epochs: int
    per_epoch: int
    done: int = 0
    means: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    validation: list[float] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, int]:
        """The best validation accuracy so far and its epoch, from 1; the first of equals."""
        best = max(self.validation)
        return best, self.validation.index(best) + 1


class View:
    """The state that is shown. Without `shown`, it is kept and never drawn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.phases: list[Phase] = []
        self.work: dict[str, float] = {}
        self.began: float | None = None
        self.skipped = 0.0  # share of the work that was done before this session
        self.drawn = 0.0
        self.live = None

    def plan(self, work: dict[str, float]) -> None:
        """The work of each phase of the run to come, in any unit, for the time that is left."""
        self.work = work

    def start(self, name: str, epochs: int, per_epoch: int, done: int, rows: list[dict]) -> None:
        """A phase begins, or goes on after ``done`` steps; ``rows``: of its epochs so far."""
        self.phases.append(Phase(name, epochs, per_epoch, done, validation=[row["val_accuracy"] for row in rows]))
        self.began = self.clock() if self.began is None else self.began
        self.skipped += self.share_of(self.phases[-1])
        self.draw()

    def step(self, done: int, rate: float, means: dict[str, float] | None) -> None:
        """``done`` steps of the phase are done, at ``rate`` images a second; ``means`` of the epoch, where known."""
        phase = self.phases[-1]
        phase.done, phase.rate = done, rate
        phase.means = phase.means if means is None else means
        if self.clock() - self.drawn >= REDRAW:
            self.draw()

    def epoch(self, row: dict) -> None:
        """An epoch is over and validated."""
        self.phases[-1].validation.append(row["val_accuracy"])
        self.draw()

    def share_of(self, phase: Phase) -> float:
        """The share of the whole run's work that is done of a phase."""
        whole = sum(self.work.values())
        return self.work.get(phase.name, 0.0) / whole * phase.done / (phase.epochs * phase.per_epoch) if whole else 0.0

    def seconds_left(self) -> float | None:
        """Of the whole run, by the pace of this session, validation included; None before anything was done."""
        share = sum(map(self.share_of, self.phases))
        if self.began is None or share <= self.skipped:
            return None
        return (self.clock() - self.began) / (share - self.skipped) * (1 - share)

    def draw(self) -> None:
        self.drawn = self.clock()
        if self.live is not None:
            self.live.refresh()

    def renderable(self) -> "RenderableType":
        """The lines, as rich draws them."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.phases:
            return Text("")
        phase = self.phases[-1]
        in_epoch = phase.done - (self._epoch() - 1) * phase.per_epoch
        left = self.seconds_left()
        first = Table.grid(padding=(0, 2), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1, min_width=4)
        first.add_column(no_wrap=True, justify="right")
        first.add_row(
            Text(f"{phase.name} epoch {self._epoch()} of {phase.epochs}", style="bold"),
            ProgressBar(total=phase.per_epoch, completed=in_epoch),
            f"{phase.rate:,.0f} images/s" + ("" if left is None else f", run done in {in_words(left)}"),
        )
        lines = [first, *(Text(line, no_wrap=True, overflow="ellipsis") for line in self.lines())]
        return Group(*lines)

    def _epoch(self) -> int:
        """The epoch that is trained, or validated, from 1."""
        phase = self.phases[-1]
        return min(phase.epochs, len(phase.validation) + 1)

    def lines(self) -> list[str]:
        """Loss terms; accuracies of the phase; those of the phases before."""
        phase = self.phases[-1]
        terms = [f"{name} {value:.3f}" for name, value in phase.means.items() if "accuracy" not in name]
        accuracies = [f"training {phase.means['train_accuracy']:.1%}"] if "train_accuracy" in phase.means else []
        if phase.validation:
            best, epoch = phase.best
            latest = f"validation {phase.validation[-1]:.2%}, best {best:.2%} in epoch {epoch}"
            accuracies += [latest, sparkline(phase.validation)]
        before = [f"{other.name} best {other.best[0]:.2%}" for other in self.phases[:-1] if other.validation]
        return [line for line in ("  ".join(terms), "  ".join(accuracies), "  ".join(before)) if line]


def sparkline(values: list[float]) -> str:
    """The last values as a row of blocks, the lowest of them the lowest block."""
    values = values[-SPARKS:]
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def in_words(seconds: float) -> str:
    """A duration as people say it, e.g. ``2 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


@contextlib.contextmanager
def shown(view: View, console: "Console | None" = None) -> Iterator[View]:
    """Draw a view where stdout is a terminal that can (or on ``console``); the terminal is left as it was."""
    if console is None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        console = require("rich.console", "train").Console()
    if console is None:
        yield view
        return
    view.live = require("rich.live", "train").Live(
        get_renderable=view.renderable,
        console=console,
        auto_refresh=False,  # by `View.draw`: no thread beside the training
        transient=True,
        redirect_stderr=sys.stderr.isatty(),
    )
    try:
        with view.live:
            yield view
    finally:
        view.live = None
