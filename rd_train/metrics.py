"""The log of a run: ``metrics.jsonl``, a line an epoch, and the same for the terminal and TensorBoard."""

import json
import os
from pathlib import Path

from rd_deploy.common import UserError, write_text
from rd_train import distributed
from rd_train.context import Context

TENSORBOARD = "tensorboard"  # the folder of its logs in a run's


def keep(row: dict, context: Context) -> None:
    """Keep the row of an epoch, by the first process; on the disk before the state that comes after it."""
    if not distributed.first():
        return
    with (context.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if context.writer is not None:
        for name, value in row.items():
            if isinstance(value, float):
                context.writer.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        context.writer.flush()


def say(row: dict, left_out: int) -> None:
    """Print the row of an epoch, by the first process; ``left_out``: corrupt images of validation."""
    if not distributed.first():
        return
    print(
        f"{row['phase']} epoch {row['epoch']}: {terms(row)} train {row['train_accuracy']:.2%} "
        f"val {row['val_accuracy']:.2%}{f' ({left_out} corrupt images left out)' if left_out else ''} "
        f"{row['images_per_second']:.0f} img/s; {bottleneck(row)}",
        flush=True,
    )


def terms(means: dict) -> str:
    """The loss and what it consists of, in words."""
    found = " ".join(f"{name} {value:.3f}" for name, value in means.items() if name.endswith(("ce", "kd", "feature")))
    return f"loss {means['loss']:.3f} ({found})"


def bottleneck(row: dict) -> str:
    """Which of loader and model is the slower, in words."""
    loader, model = row["loader_images_per_second"], row["model_images_per_second"]
    slower = "loader" if loader < model else "model"
    return f"loader {loader:.0f} img/s, model {model:.0f} img/s: the {slower} is the bottleneck"


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``; a damaged line is a `UserError`, but for a last one that was cut short."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        # Killed while it wrote the last line: the epoch of that line was not saved either.
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged; start a new run") from error
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) and "phase" in row for row in rows):
        raise UserError(f"{path} holds lines that are no rows of a run; start a new run")
    return rows


def drop_rows_after(folder: Path, phase: str, step: int) -> None:
    """Forget what was logged after the saved state, so that a resumed log equals an uninterrupted one."""
    kept = [row for row in read_rows(folder) if row["phase"] != phase or row["step"] <= step]
    if (folder / "metrics.jsonl").exists():
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def tensorboard_writer(folder: Path) -> object:
    """TensorBoard's writer for a run; steps that a resumed run repeats are logged twice, with the same values."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / TENSORBOARD)
