"""The training loop: one flat function per phase, resumable bit by bit on the CPU.

A run has one or two phases: ``teacher`` (only if a frozen teacher has to be trained first) and ``student``. Batches are
a pure function of (seed, epoch, number), schedules of the step: so the state of a phase is just its tensors and counts.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from rd_deploy.common import Stopped, UserError, require, write_text
from rd_train.build import build_optimizer
from rd_train.checkpoint import Checkpoint, load_plain, save_checkpoint, save_plain
from rd_train.data import Dataset, Split, batches, steps_per_epoch
from rd_train.networks import Network
from rd_train.recipe import Recipe
from rd_train.schedules import learning_rate

EVAL_BATCH = 500
CHECK_EVERY = 20  # steps between looks at the loss, which make a GPU wait


@dataclass
class Context:
    """What every phase of a run shares."""

    recipe: Recipe
    dataset: Dataset
    folder: Path
    device: torch.device
    autocast: bool
    stop: threading.Event
    writer: object | None = None  # TensorBoard's SummaryWriter

    def to_device(self, module: nn.Module) -> nn.Module:
        """Place a network; before it is aliased by a task (see `frozen_view`)."""
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return module.to(self.device, memory_format=layout)

    def cast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between two steps; a second Ctrl-C stops at once."""
    event, received = threading.Event(), []

    def handler(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


@torch.no_grad()
def evaluate(network: Network, split: Split, context: Context) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy of a network on a whole split."""
    network.eval()
    correct, loss = 0, 0.0
    for images, labels in batches(split, EVAL_BATCH, seed=0, epoch=0, train=False):
        labels = labels.to(context.device)
        with context.cast():
            logits = network(_place(images, context))
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
    return correct / len(split), loss / len(split)


def _place(images: Tensor, context: Context) -> Tensor:
    layout = torch.channels_last if context.recipe.channels_last else torch.contiguous_format
    return images.to(context.device, memory_format=layout)


def fit(phase: str, task: nn.Module, epochs: int, context: Context, *, resume: bool) -> dict:
    """Train ``task`` for ``epochs`` and keep its best student (by validation) in ``{phase}.pt``.

    Returns ``{"epoch", "val_accuracy", "val_loss"}`` of that student and the ``seconds`` spent. After each epoch, and
    when stopped, all state is in ``{phase}-state.pt``; with ``resume`` the phase goes on from there.
    """
    recipe, dataset, folder = context.recipe, context.dataset, context.folder
    optimizer = build_optimizer(recipe, task)
    averaged = AveragedModel(task.student, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = _State(context, phase, task, optimizer, averaged)
    if resume:
        state.load()
    _drop_rows_after(folder / "metrics.jsonl", phase, state.step)
    per_epoch = steps_per_epoch(dataset.train, recipe.batch_size)
    total, started = per_epoch * epochs, time.monotonic() - state.seconds
    run_step = torch.compile(task) if recipe.compile else task

    while state.step < total:
        epoch, done = divmod(state.step, per_epoch)
        loader = batches(dataset.train, recipe.batch_size, seed=recipe.seed, epoch=epoch, train=True, start=done)
        bar = tqdm(
            loader,
            total=per_epoch,
            initial=done,
            disable=None,
            leave=False,
            unit="step",
            desc=f"{phase} {epoch + 1}/{epochs}",
        )
        task.train()
        epoch_started, epoch_first = time.monotonic(), done
        for images, labels in bar:
            rate = learning_rate(
                state.step,
                total,
                peak=recipe.lr,
                kind=recipe.schedule,
                warmup=round(recipe.warmup_epochs * per_epoch),
                milestones=(0.5, 0.75),
                gamma=0.1,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            labels = labels.to(context.device)
            with context.cast():
                result = run_step(
                    _place(images, context), labels, torch.tensor(state.step / total, device=context.device)
                )
            optimizer.zero_grad(set_to_none=True)
            result["loss"].backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            if averaged is not None:
                averaged.update_parameters(task.student)

            state.add(result, labels)
            state.step += 1
            state.seconds = time.monotonic() - started
            if state.step % CHECK_EVERY == 0 or context.stop.is_set():
                means = state.means()
                _check_finite(means, phase, state)
                rate_now = (state.step - epoch * per_epoch - epoch_first) * recipe.batch_size
                bar.set_postfix_str(_brief(means, rate_now / (time.monotonic() - epoch_started)))
            if context.stop.is_set() and state.step % per_epoch:
                state.save()
                _stop(context)
        bar.close()

        means = state.means()
        _check_finite(means, phase, state)
        seconds = time.monotonic() - epoch_started
        student = averaged.module if averaged is not None else task.student
        accuracy, val_loss = evaluate(student, dataset.val, context)
        row = {
            "phase": phase,
            "epoch": epoch + 1,
            "step": state.step,
            "lr": rate,
            **means,
            "val_accuracy": accuracy,
            "val_loss": val_loss,
        }
        if getattr(task, "train_teacher", False):
            row["teacher_val_accuracy"] = evaluate(task.teacher, dataset.val, context)[0]
        _check_finite(row, phase, state)
        row["images_per_second"] = (per_epoch - epoch_first) * recipe.batch_size / seconds
        row["seconds"] = state.seconds = time.monotonic() - started
        if state.improves(accuracy, val_loss):
            state.best = {"epoch": epoch + 1, "val_accuracy": accuracy, "val_loss": val_loss}
            _save_student(phase, student, context, state.best)
            if getattr(task, "train_teacher", False):
                _save_student("teacher", task.teacher, context, state.best)
        _log(row, context)
        state.sums.clear()
        state.save()
        if context.stop.is_set():
            _stop(context)
    return {**state.best, "seconds": state.seconds}


class _State:
    """Everything a phase needs to go on: tensors, step, running sums, best epoch, seconds."""

    def __init__(self, context: Context, phase: str, task: nn.Module, optimizer, averaged: AveragedModel | None):
        self.path = context.folder / f"{phase}-state.pt"
        self.task, self.optimizer, self.averaged = task, optimizer, averaged
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.best: dict = {"epoch": 0, "val_accuracy": -1.0, "val_loss": math.inf}

    def add(self, result: dict, labels: Tensor) -> None:
        """Add a step to the running sums of the epoch (on the device: nothing waits)."""
        entries = {"loss": result["loss"].detach(), **result["terms"]}
        entries["train_accuracy"] = (result["output"].detach().argmax(1) == labels).float().mean()
        for name, value in entries.items():
            self.sums[name] = self.sums[name].to(value.device) + value.double()
        self.sums["steps"] += 1

    def means(self) -> dict[str, float]:
        """Means of the epoch so far."""
        steps = float(self.sums["steps"])
        return {name: float(value) / steps for name, value in self.sums.items() if name != "steps"}

    def improves(self, accuracy: float, loss: float) -> bool:
        """Higher validation accuracy; among equals the lower loss."""
        return (accuracy, -loss) > (self.best["val_accuracy"], -self.best["val_loss"])

    def save(self) -> None:
        values = {
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "best": self.best,
        }
        save_plain(self.path, values)

    def load(self) -> None:
        """Go on from the saved state, if there is one; a damaged one is a `UserError`."""
        if not self.path.exists():
            return
        values = load_plain(self.path, "training state")
        try:
            self.task.load_state_dict(values["task"], strict=True)
            self.optimizer.load_state_dict(values["optimizer"])
            if self.averaged is not None:
                self.averaged.load_state_dict(values["averaged"], strict=True)
            self.step, self.seconds, self.best = int(values["step"]), float(values["seconds"]), dict(values["best"])
            self.sums.update(values["sums"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"training state {self.path} does not fit its recipe; start a new run") from error


def _check_finite(values: dict, phase: str, state: _State) -> None:
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        kept = f"last good state: {state.path}" if state.path.exists() else "no epoch was finished"
        raise Stopped(
            f"{phase}: {bad[0]} became NaN or infinite before step {state.step}; {kept}; "
            "try a lower --lr, --clip_norm 1 or more --warmup_epochs",
            code=1,
        )


def _stop(context: Context) -> None:
    raise Stopped(f"stopped; go on with: rd-train --resume {context.folder}", code=130)


def _save_student(phase: str, network: Network, context: Context, best: dict) -> None:
    dataset, recipe = context.dataset, context.recipe.to_dict()
    checkpoint = Checkpoint(
        network.arch, network.state_dict(), dataset.preprocessing, dataset.classes, recipe, provenance=dict(best)
    )
    save_checkpoint(context.folder / ("model.pt" if phase == "student" else "teacher.pt"), checkpoint)


def _brief(means: dict[str, float], images_per_second: float) -> str:
    return f"loss {means['loss']:.3f} acc {means['train_accuracy']:.1%} {images_per_second:.0f} img/s"


def _log(row: dict, context: Context) -> None:
    with (context.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if context.writer is not None:
        for name, value in row.items():
            if isinstance(value, float):
                context.writer.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        context.writer.flush()
    terms = " ".join(f"{name} {value:.3f}" for name, value in row.items() if name.endswith(("ce", "kd", "feature")))
    print(
        f"{row['phase']} epoch {row['epoch']}: loss {row['loss']:.3f} ({terms}) train {row['train_accuracy']:.2%} "
        f"val {row['val_accuracy']:.2%} {row['images_per_second']:.0f} img/s",
        flush=True,
    )


def _drop_rows_after(path: Path, phase: str, step: int) -> None:
    """Forget what was logged after the saved state, so that a resumed log equals an uninterrupted one."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        whole = [line for line in lines if line.endswith("}")]
        kept = [line for line in whole if (row := json.loads(line))["phase"] != phase or row["step"] <= step]
        if kept != lines:
            write_text(path, "".join(line + "\n" for line in kept))


def tensorboard_writer(folder: Path) -> object:
    """TensorBoard's writer for a run."""
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")
