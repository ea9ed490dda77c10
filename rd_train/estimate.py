"""What a run will take, found out before it starts (``--dry``): real steps are measured, nothing is written."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from torch import Tensor, nn

from rd_deploy.common import Stopped, UserError
from rd_train.checkpoint import checkpoint_values, plain_size
from rd_train.context import Context, student_checkpoint
from rd_train.cost import mean_step_macs, step_macs, update_macs
from rd_train.data import Meter, Split, steps_per_epoch
from rd_train.evaluation import evaluation_size, predict
from rd_train.html_report import THUMBNAIL, WORST
from rd_train.live import in_words
from rd_train.loop import Stepper
from rd_train.recipe import Recipe
from rd_train.state import State

STEPS = 5
LONGEST = 60.0  # seconds a phase: slow steps, or those of a slow loader, are timed until then, at least one


@dataclass(frozen=True)
class PhaseEstimate:
    """What a phase of a run takes.

    ``step_seconds``: mean over its kinds of step, or what the loader takes for its images where that is longer;
    ``seconds``: of all epochs, with validation; ``test_seconds``: of its network on the test split; ``memory``: most
    bytes of tensors at once in a training step; ``disk``: bytes of its files; ``timed``: steps that were timed.
    """

    name: str
    epochs: int
    steps: int
    step_seconds: float
    seconds: float
    test_seconds: float
    memory: int
    disk: int
    timed: int


def measure(name: str, task: nn.Module, meta: nn.Module, epochs: int, context: Context) -> PhaseEstimate:
    """Take a few steps of a phase, spread over its training, and one batch of its validation.

    ``meta``: the same task on the meta device, by which kinds of step and image sizes are weighed.
    """
    recipe, dataset = context.recipe, context.dataset
    take = Stepper(task, epochs, context)
    memory = _memory_of_a_step(take, meta, *_first_batch(dataset.train, recipe))
    meter = Meter()
    stream = _endless(context, meter)
    seconds, macs, timed = _timed_steps(take, meta, stream)
    stream.close()  # waits for the batches that are being made: whole ones are what the meter counts
    full = dataset.preprocessing.size
    own = seconds / macs * (mean_step_macs(meta, full, take.size_at) + update_macs(recipe, meta))
    # The few steps would hardly wait for a loader that was ahead of them: so each is measured by itself.
    step_seconds = max(own, min(recipe.batch_size, len(dataset.train)) / meter.rate())
    per_image = _evaluation_seconds(task, context)
    steps = steps_per_epoch(dataset.train, recipe.batch_size)
    audit = 2 * step_seconds if recipe.audit and getattr(task, "splices", ()) else 0.0  # a forward, two backwards
    validated = len(dataset.val) * (2 if getattr(task, "train_teacher", False) else 1) + recipe.recalibrate
    epoch = steps * step_seconds + audit + validated * per_image
    disk = _files(name, take, context)
    test = len(dataset.test) * per_image
    return PhaseEstimate(name, epochs, steps, step_seconds, epochs * epoch, test, memory, disk, timed)


def _first_batch(split: Split, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A training batch, for which the loader starts its workers; none is prepared ahead."""
    indices = torch.arange(min(recipe.batch_size, len(split)))
    return split.augmented(indices, recipe.seed), split.labels[indices]


def _endless(context: Context, meter: Meter) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, epoch after epoch."""
    for epoch in count():
        yield from context.batches(epoch, meter=meter)


def _timed_steps(take: Stepper, meta: nn.Module, stream: Iterator) -> tuple[float, float, int]:
    """Seconds, MACs per image and number of some steps, while further batches are made but not waited for."""
    context, begun = take.context, monotonic()
    seconds, macs, timed = 0.0, 0.0, 0
    while timed < STEPS and (timed == 0 or monotonic() - begun < LONGEST):
        number = int(take.total * (timed + 0.5) / STEPS)
        images, labels = next(stream)
        start = monotonic()
        step = take(number, images, labels.to(context.device))
        _wait(context)
        seconds += monotonic() - start
        macs += step_macs(meta, step.size, **step.kind) + update_macs(context.recipe, meta)
        timed += 1
        if context.stop.is_set():
            raise Stopped("stopped; nothing was written", code=130)
    return seconds, macs, timed


def _wait(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def _evaluation_seconds(task: nn.Module, context: Context) -> float:
    """Seconds an image of evaluation takes, by one batch of the validation split."""
    part = _First(context.dataset.val, evaluation_size(context.recipe))
    if context.device.type == "cuda":  # cuDNN tries its algorithms when it meets a shape for the first time
        predict(task.student, part, context)
        _wait(context)
    start = monotonic()
    predict(task.student, part, context)
    task.train()
    return (monotonic() - start) / len(part)


class _First:
    """The first images of a split, as a split."""

    def __init__(self, split: Split, limit: int):
        self.labels, self.images = split.labels[:limit], split.images
        self.corrupt, self.ahead = split.corrupt, split.ahead

    def __len__(self) -> int:
        return len(self.labels)


def _memory_of_a_step(take: Stepper, meta: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Most bytes that tensors take at once in the largest kind of step, at full size.

    A step before it allocates the momentum, and lets libraries choose their kernels.
    """
    context, size = take.context, take.context.dataset.preprocessing.size
    kind = max(take.task.kinds(), key=lambda kind: step_macs(meta, size, **kind))

    def step() -> None:
        take(0, images, labels.to(context.device), size=size, kind=kind)
        _wait(context)

    step()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    take.optimizer.zero_grad(set_to_none=True)  # the profiler does not see memory freed that it did not see allocated
    return _held(take) + images.nbytes + _allocated_by(step)


def _held(take: Stepper) -> int:
    """Bytes that a phase holds all along: weights and statistics, momentum, moving average."""
    modules = [take.task, *([] if take.averaged is None else [take.averaged])]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for state in take.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def _allocated_by(step: Callable[[], None]) -> int:
    """The most that steps on the CPU hold above what was held before, by the profiler's account of the allocator.

    Two steps: the second one starts with the gradients of the first, as all but the first step of a training do.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise reports missing GPUs on stderr
    profiler = torch.profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    if not changes:
        raise UserError("torch's profiler recorded no allocations, so a step's memory is not known; leave --dry away")
    return int(max(0, np.cumsum(changes).max()))


def _files(name: str, take: Stepper, context: Context) -> int:
    """Bytes of the phase's state and of the networks that it keeps, as they would be written."""
    state = State(context, name, take.task, take.optimizer, take.averaged)
    kept = [take.task.student, *([take.task.teacher] if getattr(take.task, "train_teacher", False) else [])]
    networks = [plain_size(checkpoint_values(student_checkpoint(network, context, state.best))) for network in kept]
    return plain_size(state.values()) + sum(networks)


def report_bytes(phases: list[PhaseEstimate], context: Context) -> int:
    """Bytes of what is written for people, rounded up: curves, pictures of mistakes, a row an epoch, one a class."""
    preprocessing = context.dataset.preprocessing
    picture = 400 + preprocessing.channels * min(preprocessing.size, THUMBNAIL) ** 2
    rows = sum(phase.epochs for phase in phases)
    drawn = 200_000 + (200_000 if context.recipe.audit else 0)
    return drawn + WORST * picture * 4 // 3 + 1_500 * rows + 200 * len(context.dataset.classes)


def print_estimate(phases: list[PhaseEstimate], context: Context) -> None:
    """Time, memory and disk, a line each."""
    for phase in phases:
        print(
            f"{phase.name:8} {phase.epochs} epochs of {phase.steps} steps, {phase.step_seconds:.3g} s a step "
            f"({phase.timed} timed): {in_words(phase.seconds)}"
        )
    print(f"time     {in_words(sum(phase.seconds + phase.test_seconds for phase in phases))} in all")
    memory = max(phase.memory for phase in phases)
    where = "on the GPU" if context.device.type == "cuda" else "beside Python, its libraries and the data set"
    print(f"memory   {memory / 2**20:,.0f} MiB at most in a training step, {where}")
    disk, free = sum(phase.disk for phase in phases) + report_bytes(phases, context), _free_bytes(context.folder)
    largest = max(phase.disk for phase in phases)  # written beside the old one before it replaces that
    print(f"disk     {disk / 1e6:,.1f} MB in {context.folder}, where {free / 1e9:,.1f} GB are free")
    if free < disk + largest:
        print("note     that is not enough: each file is written beside the old one before it replaces it")
    print("note     a dry run: nothing was written", flush=True)


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free
