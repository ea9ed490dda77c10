"""The training loop: one flat function per phase, resumable bit by bit on the CPU.

A run has one or two phases: ``teacher`` (only if a frozen teacher has to be trained first) and ``student``. Batches are
a pure function of (seed, epoch, number), schedules of the step: so the state of a phase is just its tensors and counts.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rd_deploy.common import Stopped, UserError
from rd_train import distributed
from rd_train.audit import gradient_audit
from rd_train.build import sizes_of
from rd_train.checkpoint import load_checkpoint, save_checkpoint
from rd_train.clock import Clock
from rd_train.context import Context, student_checkpoint
from rd_train.data import Meter, derive_seed, steps_per_epoch
from rd_train.evaluation import evaluate, predict, recalibrated
from rd_train.metrics import drop_rows_after, keep, read_rows, say
from rd_train.networks import Network, set_fading
from rd_train.optimizers import build_optimizer
from rd_train.recipe import Recipe
from rd_train.schedules import learning_rate
from rd_train.state import State
from rd_train.vary import mixed, resized

CHECK_EVERY = 20  # steps between looks at the loss, which make a GPU wait, and at what other processes skipped
GO_ON, SAVE, STOP = range(3)  # what processes may want after a step
STEP_SEED = 0x57E9  # sets the draws of a step apart from those of its batch


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
    """A training step that was taken: the task's outcome, the learning rates by name, and what kind of step it was."""

    result: dict
    rates: dict[str, float]
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
        self.run_step = _compiled(task) if recipe.compile else task
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
        scheduled = partial(learning_rate, number, self.total, kind=recipe.schedule, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled(peak=group["initial_lr"])
        names = ("lr", "muon_lr") if recipe.optimizer == "muon" else ("lr",)
        rates = {name: scheduled(peak=getattr(recipe, name)) for name in names}
        done = number / self.total
        size = size or self.size_at(done)
        generator = np.random.default_rng(derive_seed(STEP_SEED, recipe.seed, number))
        # Drawn first: what mixing draws depends on how many images this process has.
        kind = _drawn(task.outcomes(done), generator) if kind is None else kind
        images, targets = vary(context.place(images), labels, size, context, generator)
        set_fading(task.student, done / recipe.warm_start_window)
        progress = torch.full((), done, device=context.device)  # no copy, for which a GPU would wait
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
        return Step(result, rates, size, kind)


def fit(phase: str, task: nn.Module, epochs: int, context: Context, *, resume: bool) -> dict:
    """Train ``task`` for ``epochs`` and keep its best student (by validation): ``model.pt``, or ``teacher.pt``.

    Returns ``{"epoch", "val_accuracy", "val_loss"}`` of that student and the ``seconds`` spent. After each epoch, every
    ``recipe.save_minutes`` and when stopped, all state is in ``{phase}-state.pt``; with ``resume`` the phase goes on
    from there.
    """
    recipe, split = context.recipe, context.dataset.train
    take = Stepper(task, epochs, context)
    per_epoch, total = steps_per_epoch(split, recipe.batch_size), take.total
    state = State(context, phase, task, take.optimizer, take.averaged)
    if resume:
        state.load(total)
        state.best = _kept(_student_path(phase, context), state.best)
    if not distributed.same_everywhere(state.step):
        raise UserError(f"the processes see different files in {context.folder}; all machines must share that folder")
    if distributed.first():
        drop_rows_after(context.folder, phase, state.step)
        rows = [row for row in read_rows(context.folder) if row["phase"] == phase]
        context.view.start(phase, epochs, per_epoch, state.step, rows)
    take.share()

    while state.step < total:
        epoch, done = divmod(state.step, per_epoch)
        meter = Meter()
        loader = context.batches(epoch, start=done, meter=meter)
        task.train()
        clock, saved = Clock(state.seconds, meter, context.device), time.monotonic()
        for images, labels in _until_stopped(loader, context.stop):
            clock.begin_step()
            labels = labels.to(context.device, non_blocking=True)
            step = take(state.step, images, labels)
            state.add(step.result, labels)
            state.step += 1
            clock.end_step(len(labels) * distributed.world())
            due = time.monotonic() - saved > 60 * recipe.save_minutes
            wanted, means = _wanted(context, state.step, due), None
            if wanted != GO_ON or state.step % CHECK_EVERY == 0:
                means = state.means()
                _check_finite(means, phase, state)
            if distributed.first():
                context.view.step(state.step, clock.rate(), means)
            if wanted != GO_ON and state.step % per_epoch:
                _check_finite(_of_weights(task), phase, state)
                state.seconds = clock.total()
                if wanted == STOP:
                    state.agree()
                state.save()
                if wanted == STOP:
                    _stop(context)
                saved = time.monotonic()
            if state.step % CHECK_EVERY == 0:
                context.dataset.skipped.agree()
        if state.step < (epoch + 1) * per_epoch:
            if distributed.world() == 1:  # others may be anywhere in their steps: all go on from the last epoch
                state.seconds = clock.total()
                state.save()
            _stop(context)
        try:
            _end_epoch(phase, epoch + 1, step.rates, state, context, clock)
        except UserError:
            if context.stop.wait(1.0):  # likewise; the epoch is repeated from what is saved
                _stop(context)
            raise
    return {**state.best, "seconds": state.seconds}


def _wanted(context: Context, step: int, due: bool) -> int:
    """What all processes do after this step: what any of them wants most, where saving is up to the first.

    Asked rarely where GPUs would have to wait for the answer.
    """
    if distributed.world() > 1 and context.device.type == "cuda" and step % CHECK_EVERY:
        return GO_ON
    if context.stop.is_set():
        return distributed.highest(STOP)
    return distributed.highest(SAVE if due and distributed.first() else GO_ON)


@torch.no_grad()
def _of_weights(task: nn.Module) -> dict[str, float]:
    """A sum that is not finite where a weight is not."""
    return {"a weight": float(sum(p.abs().sum(dtype=torch.float64) for p in task.parameters()))}


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
    loader = context.batches(epoch - 1)
    images, labels = next(loader)
    loader.close()
    task.train()
    with context.cast():
        return gradient_audit(task, context.place(images), labels.to(context.device))


def _end_epoch(phase: str, epoch: int, rates: dict, state: State, context: Context, clock: Clock) -> None:
    """Validate, keep the student if it is the best so far, log, save."""
    task, validation = state.task, context.dataset.val
    speeds = clock.speeds()
    row = {"phase": phase, "epoch": epoch, "step": state.step, **rates, **state.means()}
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
    context.dataset.skipped.agree()  # too many in all end the run: before anything of the epoch is kept
    if state.improves(row["val_accuracy"], row["val_loss"]):
        state.best = {"epoch": epoch, "val_accuracy": row["val_accuracy"], "val_loss": row["val_loss"]}
        if joint:  # first: a run that goes on takes a model.pt of this epoch for a whole one (`_kept`)
            _save_student("teacher", task.teacher, context, state.best)
        _save_student(phase, student, context, state.best)
    row |= {"corrupt_images": len(context.dataset.skipped), **speeds, "seconds": clock.total()}
    state.seconds = row["seconds"]
    keep(row, context)
    state.sums.clear()
    state.counts.clear()
    state.save()
    say(row, left_out=len(validation) - len(seen.indices))  # last: a terminal that is gone costs no epoch
    if distributed.first():
        context.view.epoch(row)
    if distributed.any_process(context.stop.is_set()):
        _stop(context)


def _compiled(task: nn.Module) -> Callable:
    """The task under torch.compile, which compiles each kind of step by itself, and again as images grow.

    (Twice, and more where a map grows from a single pixel.) Beyond its limit it would run what is left uncompiled, and
    only a warning would say so: here that is an error.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(task.kinds()))
    config.fail_on_recompile_limit_hit = True
    return torch.compile(task)


@contextlib.contextmanager
def _explained_compilation(recipe: Recipe) -> Iterator[None]:
    """Turn a failing torch.compile (no compiler, say), which only its first calls can do, into one line."""
    try:
        yield
    except Exception as error:
        if not recipe.compile or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(line for line in str(error).splitlines() if line.strip())
        if type(error).__name__ == "FailOnRecompileLimitHit":
            reason = f"more than {torch._dynamo.config.recompile_limit} compilations of one function"
        raise UserError(f"torch.compile failed ({reason[:160]}); run with --compile false") from error


def _check_finite(values: dict, phase: str, state: State) -> None:
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise Stopped(
            f"{phase}: {bad[0]} became NaN or infinite before step {state.step}; start anew with a lower --lr "
            "(or --muon-lr), --clip-norm 1 or more --warmup-epochs",
            code=1,
        )


def _stop(context: Context) -> None:
    raise Stopped(f"stopped; go on with: rd-train --resume {context.folder}", code=130)


def _student_path(phase: str, context: Context) -> Path:
    return context.folder / ("model.pt" if phase == "student" else "teacher.pt")


def _kept(path: Path, best: dict) -> dict:
    """What is known of the best network: by its file where that is of a later epoch than the saved state knows.

    Then the run ended between the two. It repeats the epoch, whose sums may be others on another machine, and the
    network in the file would be called one that it replaced.
    """
    if not path.exists():
        return best
    there = load_checkpoint(path).provenance
    known = {name: there.get(name) for name in best} if isinstance(there, dict) else {}
    if any(type(value) is not type(best[name]) for name, value in known.items()):
        raise UserError(f"{path} does not say which epoch it is of; start a new run")
    return known if known["epoch"] > best["epoch"] else best


def _save_student(phase: str, network: Network, context: Context, best: dict) -> None:
    path = _student_path(phase, context)
    if distributed.first():
        save_checkpoint(path, student_checkpoint(network, context, best))
