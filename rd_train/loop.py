"""The training loop: one flat function per phase, resumable bit by bit on the CPU.

A run has one or two phases: ``teacher`` (only if a frozen teacher has to be trained first) and ``student``. Batches are
a pure function of (seed, epoch, number), schedules of the step: so the state of a phase is just its tensors and counts.
"""

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rd_deploy.common import Stopped, UserError, require, write_text
from rd_train import distributed
from rd_train.audit import gradient_audit
from rd_train.build import sizes_of
from rd_train.checkpoint import Checkpoint, load_plain, save_checkpoint, save_plain
from rd_train.data import Dataset, Meter, batches, derive_seed, steps_per_epoch
from rd_train.evaluation import evaluate, predict, recalibrated
from rd_train.live import View
from rd_train.networks import Network, deployed_state, set_fading
from rd_train.optimizers import build_optimizer
from rd_train.recipe import Recipe
from rd_train.schedules import learning_rate
from rd_train.vary import mixed, resized

CHECK_EVERY = 20  # steps between looks at the loss, which make a GPU wait
STEP_SEED = 0x57E9  # sets the draws of a step apart from those of its batch


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
    view: View = field(default_factory=View)

    def place(self, what: nn.Module | Tensor) -> nn.Module | Tensor:
        """Images or a network on the device, in the memory format; a network before a task aliases it.

        With ``sync_bn``, its BN are those of all processes together.
        """
        if self.recipe.sync_bn and isinstance(what, nn.Module):
            distributed.synchronise_bn(what)
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return what.to(self.device, memory_format=layout)

    def cast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between two steps; a second Ctrl-C stops at once."""
    event = threading.Event()

    def handler(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
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


def vary(images: Tensor, labels: Tensor, size: int, context: Context, generator: np.random.Generator) -> tuple:
    """The images (at ``size`` pixels) and targets of a step, as the recipe mixes them."""
    recipe = context.recipe
    images = resized(images, size)
    if not (recipe.mixup or recipe.cutmix):
        return images, labels
    classes = len(context.dataset.classes)
    return mixed(images, labels, classes, mixup=recipe.mixup, cutmix=recipe.cutmix, generator=generator)


@dataclass(frozen=True)
class Step:
    """A training step that was taken: the task's outcome, the learning rate, and what kind of step it was."""

    result: dict
    rate: float
    size: int
    kind: dict


class Stepper:
    """Training steps of a phase, from a batch to changed weights; what a step does depends on its number alone."""

    def __init__(self, task: nn.Module, epochs: int, context: Context):
        recipe = context.recipe
        self.task, self.context = task, context
        self.optimizer = build_optimizer(recipe, task)
        self.averaged = None
        if recipe.ema:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.averaged = AveragedModel(task.student, multi_avg_fn=average, use_buffers=True)
        # Clipped apart: a learning teacher is moved by its own loss only, so the student's gradient must not scale it.
        self.networks = [[p for p in part.parameters() if p.requires_grad] for part in task.children()]
        per_epoch = steps_per_epoch(context.dataset.train, recipe.batch_size)
        self.total, self.warmup = per_epoch * epochs, round(recipe.warmup_epochs * per_epoch)
        self.run_step = torch.compile(task) if recipe.compile else task
        self.size_at = sizes_of(recipe, context.dataset.preprocessing.size)

    def share(self) -> None:
        """From now on, let gradients be the means over all processes; once the weights are those to start from."""
        self.run_step = distributed.data_parallel(self.task, self.run_step)

    def __call__(
        self, number: int, images: Tensor, labels: Tensor, *, size: int | None = None, kind: dict | None = None
    ) -> Step:
        """Take step ``number`` of ``total`` with images on the CPU and labels on the device.

        ``size`` and ``kind`` (an outcome of the task) are those of the step unless given.
        """
        context, recipe, task = self.context, self.context.recipe, self.task
        schedule = {"kind": recipe.schedule, "warmup": self.warmup}
        rate = learning_rate(number, self.total, peak=recipe.lr, **schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.total, peak=group["initial_lr"], **schedule)
        done = number / self.total
        size = size or self.size_at(done)
        generator = np.random.default_rng(derive_seed(STEP_SEED, recipe.seed, number))
        images, targets = vary(context.place(images), labels, size, context, generator)
        kind = _drawn(task.outcomes(done), generator) if kind is None else kind
        set_fading(task.student, done / recipe.warm_start_window)
        progress = torch.tensor(done, device=context.device)
        with context.cast(), _explained_compilation(recipe):
            result = self.run_step(images, targets, progress, **kind)
        self.optimizer.zero_grad(set_to_none=True)
        with _explained_compilation(recipe):
            result["loss"].backward()
        if recipe.clip_norm:
            norms = [nn.utils.clip_grad_norm_(parameters, recipe.clip_norm) for parameters in self.networks]
            result["terms"]["gradient_norm"] = norms[0]  # the student's, before it is clipped
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(task.student)
        return Step(result, rate, size, kind)


def fit(phase: str, task: nn.Module, epochs: int, context: Context, *, resume: bool) -> dict:
    """Train ``task`` for ``epochs`` and keep its best student (by validation): ``model.pt``, or ``teacher.pt``.

    Returns ``{"epoch", "val_accuracy", "val_loss"}`` of that student and the ``seconds`` spent. After each epoch, and
    when stopped, all state is in ``{phase}-state.pt``; with ``resume`` the phase goes on from there.
    """
    recipe, split = context.recipe, context.dataset.train
    take = Stepper(task, epochs, context)
    per_epoch, total = steps_per_epoch(split, recipe.batch_size), take.total
    state = State(context, phase, task, take.optimizer, take.averaged)
    if resume:
        state.load(total)
    if not distributed.same_everywhere(state.step):
        raise UserError(f"the processes see different files in {context.folder}; all machines must share that folder")
    if distributed.first():
        _drop_rows_after(context.folder, phase, state.step)
        rows = [row for row in read_rows(context.folder) if row["phase"] == phase]
        context.view.start(phase, epochs, per_epoch, state.step, rows)
    take.share()

    while state.step < total:
        epoch, done = divmod(state.step, per_epoch)
        meter = Meter()
        options = {"seed": recipe.seed, "epoch": epoch, "start": done, "meter": meter}
        loader = batches(split, recipe.batch_size, **options, **distributed.share())
        task.train()
        clock = _Clock(state.seconds, meter, context.device)
        for images, labels in _until_stopped(loader, context.stop):
            clock.begin_step()
            labels = labels.to(context.device)
            step = take(state.step, images, labels)
            state.add(step.result, labels)
            state.step += 1
            clock.end_step(len(labels) * distributed.world())
            stopping, means = _stopping(context, state.step), None
            if state.step % CHECK_EVERY == 0 or stopping:
                means = state.means()
                _check_finite(means, phase, state)
            if distributed.first():
                context.view.step(state.step, clock.rate(), means)
            if stopping and state.step % per_epoch:
                state.seconds = clock.total()
                state.agree()
                state.save()
                _stop(context)
        if state.step < (epoch + 1) * per_epoch:
            if distributed.world() == 1:  # others may be anywhere in their steps: all go on from the last epoch
                state.seconds = clock.total()
                state.save()
            _stop(context)
        try:
            _end_epoch(phase, epoch + 1, step.rate, state, context, clock)
        except UserError:
            if context.stop.wait(1.0):  # likewise; the epoch is repeated from what is saved
                _stop(context)
            raise
    return {**state.best, "seconds": state.seconds}


def _stopping(context: Context, step: int) -> bool:
    """Whether all processes stop after this step; asked rarely where GPUs would have to wait for the answer."""
    if distributed.world() > 1 and context.device.type == "cuda" and step % CHECK_EVERY:
        return False
    return distributed.any_process(context.stop.is_set())


def _until_stopped(loader: Iterator[tuple[Tensor, Tensor]], stop: threading.Event) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; they end early where the signal that stops the run ended its workers before."""
    try:
        yield from loader
    except UserError:
        if not stop.wait(1.0):  # the signal may reach us last
            raise


def _drawn(outcomes: list[tuple[float, dict]], generator: np.random.Generator) -> dict:
    """One of the kinds of step, drawn by its probability."""
    probabilities = np.array([probability for probability, _ in outcomes])
    return outcomes[generator.choice(len(outcomes), p=probabilities / probabilities.sum())][1]


def _audited(phase: str, task: nn.Module, epoch: int, context: Context) -> dict[str, float]:
    """The gradient audit at the end of an epoch (from 1) on the first batch of it; nothing where none is asked for."""
    recipe = context.recipe
    if phase != "student" or not recipe.audit or not getattr(task, "splices", ()):
        return {}
    loader = batches(context.dataset.train, recipe.batch_size, seed=recipe.seed, epoch=epoch - 1, **distributed.share())
    images, labels = next(loader)
    loader.close()
    task.train()
    with context.cast():
        return gradient_audit(task, context.place(images), labels.to(context.device))


def _end_epoch(phase: str, epoch: int, rate: float, state: "State", context: Context, clock: "_Clock") -> None:
    """Validate, keep the student if it is the best so far, log, save."""
    task, validation = state.task, context.dataset.val
    speeds = clock.speeds()
    row = {"phase": phase, "epoch": epoch, "step": state.step, "lr": rate, **state.means()}
    _check_finite(row, phase, state)
    row |= _audited(phase, task, epoch, context)
    state.agree()
    student = recalibrated(state.averaged.module if state.averaged is not None else task.student, context)
    seen = predict(student, validation, context)
    row["val_accuracy"], row["val_loss"] = seen.accuracy, seen.loss
    joint = getattr(task, "train_teacher", False)
    if joint:
        row["teacher_val_accuracy"], _ = evaluate(task.teacher, validation, context)
    _check_finite(row, phase, state)
    if state.improves(row["val_accuracy"], row["val_loss"]):
        state.best = {"epoch": epoch, "val_accuracy": row["val_accuracy"], "val_loss": row["val_loss"]}
        _save_student(phase, student, context, state.best)
        if joint:
            _save_student("teacher", task.teacher, context, state.best)
    context.dataset.skipped.agree()
    row |= {"corrupt_images": len(context.dataset.skipped), **speeds, "seconds": clock.total()}
    state.seconds = row["seconds"]
    _log(row, context, left_out=len(validation) - len(seen.indices))
    if distributed.first():
        context.view.epoch(row)
    state.sums.clear()
    state.counts.clear()
    state.save()
    if distributed.any_process(context.stop.is_set()):
        _stop(context)


class _Clock:
    """Seconds of a phase over its interruptions; images per second of the epoch, of its loader and of its steps.

    Images are those of all processes.
    """

    def __init__(self, before: float, meter: Meter, device: torch.device):
        self.before, self.started, self.images = before, time.monotonic(), 0
        self.meter, self.cuda = meter, device.type == "cuda"
        self.stepped = 0.0  # seconds of finished steps
        self.begun: float | torch.cuda.Event | None = None
        self.running: deque[tuple] = deque()  # CUDA events around steps that may not be finished yet

    def begin_step(self) -> None:
        """When a batch has come. A GPU works behind the Python code, so its own clock is read."""
        self.begun = self._now()

    def end_step(self, images: int) -> None:
        self.images += images
        if not self.cuda:
            self.stepped += time.monotonic() - self.begun
            return
        self.running.append((self.begun, self._now()))
        while self.running and self.running[0][1].query():
            self._finish_step()

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish_step(self) -> None:
        begun, ended = self.running.popleft()
        ended.synchronize()
        self.stepped += begun.elapsed_time(ended) / 1000

    def speeds(self) -> dict[str, float]:
        """Images per second of the epoch, that the loader could have made, and that the steps alone could have."""
        while self.running:
            self._finish_step()
        return {
            "images_per_second": self.rate(),
            "loader_images_per_second": self.meter.rate() * distributed.world(),
            "model_images_per_second": self.images / max(1e-9, self.stepped),
        }

    def total(self) -> float:
        return self.before + time.monotonic() - self.started

    def rate(self) -> float:
        return self.images / max(1e-9, time.monotonic() - self.started)


@contextlib.contextmanager
def _explained_compilation(recipe: Recipe) -> Iterator[None]:
    """Turn a failing torch.compile (no compiler, say), which only its first calls can do, into one line."""
    try:
        yield
    except RuntimeError as error:
        if not recipe.compile or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UserError(f"torch.compile failed ({reason[:160]}); run with --compile false") from error


class State:
    """Everything a phase needs to go on: tensors, step, running sums, best epoch, seconds."""

    def __init__(self, context: Context, phase: str, task: nn.Module, optimizer, averaged: AveragedModel | None):
        self.path = context.folder / f"{phase}-state.pt"
        self.task, self.optimizer, self.averaged = task, optimizer, averaged
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.counts: dict[str, int] = defaultdict(int)  # of steps; not every kind of step has every term
        self.best: dict = {"epoch": 0, "val_accuracy": -1.0, "val_loss": math.inf}

    def add(self, result: dict, labels: Tensor) -> None:
        """Add a step to the running sums of the epoch (on the device: nothing waits)."""
        entries = {"loss": result["loss"].detach(), **result["terms"]}
        entries["train_accuracy"] = (result["output"].detach().argmax(1) == labels).float().mean()
        for name, value in entries.items():
            self.sums[name] = self.sums[name].to(value.device) + value.double()
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        """Means of the epoch so far over all processes, of each term over the steps that had it."""
        distributed.average(self.sums.values())
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    def agree(self) -> None:
        """Make BN's running statistics those of all processes' images (their means); twice is as good as once."""
        for module in (self.task, self.averaged):
            if module is not None:
                distributed.average_statistics(module)

    def improves(self, accuracy: float, loss: float) -> bool:
        """Higher validation accuracy; among equals the lower loss."""
        return (accuracy, -loss) > (self.best["val_accuracy"], -self.best["val_loss"])

    def save(self) -> None:
        """Write everything; processes go on when the first one has."""
        if distributed.first():
            save_plain(self.path, self.values())
        distributed.barrier()

    def values(self) -> dict:
        """What is saved."""
        return {
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "best": self.best,
        }

    def load(self, total: int) -> None:
        """Go on from the saved state, if there is one; a damaged one is a `UserError`."""
        if not self.path.exists():
            return
        values = load_plain(self.path, "training state")
        try:
            self.task.load_state_dict(values["task"], strict=True)
            self._load_optimizer(values["optimizer"])
            if self.averaged is not None:
                self.averaged.load_state_dict(values["averaged"], strict=True)
            self.step, self.seconds = int(values["step"]), float(values["seconds"])
            self.best = {name: type(self.best[name])(values["best"][name]) for name in self.best}
            self.sums.update({str(name): torch.as_tensor(value).double() for name, value in values["sums"].items()})
            self.counts.update({str(name): int(value) for name, value in values["counts"].items()})
            if set(self.counts) != set(self.sums) or min(self.counts.values(), default=1) < 1:
                raise ValueError("counts")
            if not 0 <= self.step <= total or any(value.ndim for value in self.sums.values()):
                raise ValueError("step or sums")
        except Exception as error:  # a hostile file can hold anything
            raise UserError(f"training state {self.path} does not fit its recipe; start a new run") from error

    def _load_optimizer(self, state: dict) -> None:
        """Take the momenta; what else the file says of a group (its learning rate, say) is the recipe's business."""
        groups = self.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self.optimizer.load_state_dict(state)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        for parameter, values in self.optimizer.state.items():
            if any(torch.is_tensor(value) and value.shape != parameter.shape for value in values.values()):
                raise ValueError("momentum")


def _check_finite(values: dict, phase: str, state: State) -> None:
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        kept = f"last good state: {state.path}" if state.path.exists() else "no epoch was finished"
        raise Stopped(
            f"{phase}: {bad[0]} became NaN or infinite before step {state.step}; {kept}; "
            "try a lower --lr (--muon-lr of kernels by Muon), --clip-norm 1 or more --warmup-epochs",
            code=1,
        )


def _stop(context: Context) -> None:
    raise Stopped(f"stopped; go on with: rd-train --resume {context.folder}", code=130)


def student_checkpoint(network: Network, context: Context, best: dict) -> Checkpoint:
    """A network of the run as it is kept."""
    dataset, recipe = context.dataset, context.recipe.to_dict()
    return Checkpoint(
        network.arch, deployed_state(network), dataset.preprocessing, dataset.classes, recipe, provenance=dict(best)
    )


def _save_student(phase: str, network: Network, context: Context, best: dict) -> None:
    path = context.folder / ("model.pt" if phase == "student" else "teacher.pt")
    if distributed.first():
        save_checkpoint(path, student_checkpoint(network, context, best))


def _terms(means: dict) -> str:
    terms = " ".join(f"{name} {value:.3f}" for name, value in means.items() if name.endswith(("ce", "kd", "feature")))
    return f"loss {means['loss']:.3f} ({terms})"


def _log(row: dict, context: Context, left_out: int) -> None:
    if not distributed.first():
        return
    with (context.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if context.writer is not None:
        for name, value in row.items():
            if isinstance(value, float):
                context.writer.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        context.writer.flush()
    print(
        f"{row['phase']} epoch {row['epoch']}: {_terms(row)} train {row['train_accuracy']:.2%} "
        f"val {row['val_accuracy']:.2%}{f' ({left_out} corrupt images left out)' if left_out else ''} "
        f"{row['images_per_second']:.0f} img/s; {_bottleneck(row)}",
        flush=True,
    )


def _bottleneck(row: dict) -> str:
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


def _drop_rows_after(folder: Path, phase: str, step: int) -> None:
    """Forget what was logged after the saved state, so that a resumed log equals an uninterrupted one."""
    kept = [row for row in read_rows(folder) if row["phase"] != phase or row["step"] <= step]
    if (folder / "metrics.jsonl").exists():
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def tensorboard_writer(folder: Path, *, resume: bool) -> object:
    """TensorBoard's writer for a run; steps that a resumed run repeats are logged twice, with the same values."""
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    if not resume:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return SummaryWriter(folder / "tensorboard")
