"""A whole run: plan, teacher phase if one is needed, student phase, test, report."""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rd_deploy.common import UserError, printable, require, write_json, write_text
from rd_train import distributed, report
from rd_train.build import (
    build_student,
    build_task,
    meta_task,
    needs_teacher,
    sizes_of,
    teacher_arch,
)
from rd_train.checkpoint import checkpoint_values, load_checkpoint, plain_size, save_checkpoint
from rd_train.context import Context, stop_on_signals, student_checkpoint
from rd_train.cost import mean_step_macs, update_macs
from rd_train.data import Dataset, fixed_sample, steps_per_epoch
from rd_train.distill import CrossEntropy
from rd_train.estimate import PhaseEstimate, measure, print_estimate
from rd_train.evaluation import evaluate, predict, statistics_size
from rd_train.live import View, shown
from rd_train.loop import fit
from rd_train.metrics import TENSORBOARD, tensorboard_writer
from rd_train.networks import Arch, Network, start_as_identity
from rd_train.plan import Plan, applied_init, planned
from rd_train.recipe import RUN_FILES, Recipe
from rd_train.recipe_files import dump_yaml
from rd_train.start import start_from
from rd_train.state import check_images

# Seconds within which all machines see a file that was written: NFS remembers for a minute that there was none.
SEEN_WITHIN = 90.0


def run(
    recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False, tensorboard: bool = False
) -> dict:
    """Train by a settled recipe in ``folder`` and return what is in its ``result.json``.

    ``resume``: go on with the run that is there; ``overwrite``: delete it once nothing is wrong with the new one.
    Neither, and the folder must hold none. Another process that trains there is a `UserError`.
    """
    if tensorboard:
        require("tensorboard", "tensorboard")  # before anything is deleted
    with planned(recipe, folder if resume else None) as plan, _one_run_in(folder):
        if distributed.first():
            print(f"folder   {printable(folder)}", flush=True)
        if resume:
            check_images(folder, plan.dataset.counts)  # before anything there is changed
        distributed.barrier()  # every process has looked into the folder
        writer = None
        if distributed.first():
            if not resume:
                _clear(folder, overwrite)
            distributed.begin()
            _sweep(folder)
            write_text(folder / "recipe.yaml", dump_yaml(recipe))
            writer = tensorboard_writer(folder) if tensorboard else None
        distributed.barrier()
        _check_shared(folder)
        plan.dataset.skipped.record(folder / "skipped.txt", resume=resume, write=distributed.first())
        view = shown(View()) if distributed.first() else contextlib.nullcontext(View())
        with stop_on_signals() as stop, view as shown_view:
            context = _context(recipe, plan, folder, stop, writer=writer, view=shown_view)
            if shown_view.live is not None:
                shown_view.plan(_work(context, plan))
            return _phases(context, plan, resume)


@contextlib.contextmanager
def _one_run_in(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, by its first process, against another run; a held one is a `UserError`."""
    if not distributed.first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"another rd-train is training in {folder}; wait for it, or choose another --out") from error
    except OSError:  # network file systems lock no folders (NFS: no file that is open for reading); runs go there, too
        pass
    try:
        yield
    finally:
        os.close(handle)


def _check_shared(folder: Path) -> None:
    """Refuse a folder that is not the same for all processes, which the student's phase would find out, hours later.

    The first one has just written a file there: a copy of the folder has another time of that.
    """
    written = int(distributed.of_first(str(_written(folder / "recipe.yaml"))))
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := _written(folder / "recipe.yaml") == written) and time.monotonic() < deadline:
        time.sleep(0.2)
    if distributed.any_process(not seen):
        raise UserError(f"the processes see different files in {folder}; all machines must share that folder")


def _written(path: Path) -> int:
    """When a file was written last, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _context(recipe: Recipe, plan: Plan, folder: Path, stop: threading.Event, **options) -> Context:
    return Context(recipe, plan.dataset, folder, distributed.device(recipe.device), stop, **options)


def dry_run(recipe: Recipe, folder: Path) -> list[PhaseEstimate]:
    """Print the plan of a run, and what it will take by a few timed steps of each phase; nothing is written."""
    phases = []
    with planned(recipe) as plan, stop_on_signals() as stop:
        print(f"folder   {printable(folder)}", flush=True)
        context, teacher = _context(recipe, plan, folder, stop), plan.teacher
        if needs_teacher(recipe) and teacher is None:
            teacher = _new_teacher(context, plan.arch)
            if epochs := _teacher_epochs(recipe, plan):
                task = CrossEntropy(teacher, label_smoothing=recipe.label_smoothing)
                phases.append(measure("teacher", task, _meta_teacher(teacher.arch), epochs, context))
        meta = meta_task(recipe, plan.arch, None if teacher is None else teacher.arch)
        task = _student_task(context, replace(plan, teacher=teacher))
        phases.append(measure("student", task, meta, recipe.epochs, context))
        if plan.teacher is not None:
            kept = plain_size(checkpoint_values(student_checkpoint(plan.teacher, context, {})))
            phases[-1] = replace(phases[-1], disk=phases[-1].disk + kept)
        print_estimate(phases, context)
    return phases


def _teacher_epochs(recipe: Recipe, plan: Plan) -> int:
    """Epochs of the teacher's own phase; 0 where it is given, learns with the student, or is not needed."""
    own_phase = needs_teacher(recipe) and plan.teacher is None and recipe.teacher_mode == "frozen"
    return (recipe.teacher_epochs or recipe.epochs) if own_phase else 0


def check_new(folder: Path) -> None:
    """Refuse a folder that holds a run, or a part of one."""
    present = [name for name in (*RUN_FILES, TENSORBOARD) if os.path.lexists(folder / name)]
    if present:
        raise UserError(f"{folder} already holds {present[0]}; --resume {folder}, --overwrite, or another --out")


def _clear(folder: Path, overwrite: bool) -> None:
    """Forget an earlier run, after everything that can be wrong with the new one was checked."""
    if not overwrite:
        check_new(folder)  # once more: reading the data has taken its time
    try:
        if (folder / TENSORBOARD).is_dir() and not (folder / TENSORBOARD).is_symlink():
            shutil.rmtree(folder / TENSORBOARD)
        for name in (*RUN_FILES, TENSORBOARD):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def _sweep(folder: Path) -> None:
    """Remove what a run that was killed had begun to write, by the names that `atomic_path` gives."""
    for name in RUN_FILES:
        for path in folder.glob(f".{name}.{'?' * 8}{Path(name).suffix}"):
            with contextlib.suppress(OSError):
                path.unlink()


def _phases(context: Context, plan: Plan, resume: bool) -> dict:
    recipe, folder, teacher = context.recipe, context.folder, plan.teacher
    teacher_seconds = 0.0
    if teacher is not None and distributed.first() and not (folder / "teacher.pt").exists():
        save_checkpoint(folder / "teacher.pt", student_checkpoint(teacher, context, {}))
    if needs_teacher(recipe) and teacher is None:
        teacher = _new_teacher(context, plan.arch)
        if epochs := _teacher_epochs(recipe, plan):
            task = CrossEntropy(teacher, label_smoothing=recipe.label_smoothing)
            best = fit("teacher", task, epochs, context, resume=resume)
            teacher_seconds = best["seconds"]
            teacher = load_checkpoint(folder / "teacher.pt").network()
    plan = replace(plan, teacher=teacher)
    best = fit("student", _student_task(context, plan), recipe.epochs, context, resume=resume)
    return _finish(context, best, plan, teacher_seconds)


def _work(context: Context, plan: Plan) -> dict[str, float]:
    """Multiply-accumulates of each phase, but for the batch size: what the time that is left is shared out by."""
    recipe, size = context.recipe, context.dataset.preprocessing.size
    sizes, steps = sizes_of(recipe, size), steps_per_epoch(context.dataset.train, recipe.batch_size)
    meta = meta_task(recipe, plan.arch, None if plan.teacher is None else plan.teacher.arch)
    phases = {"student": (recipe.epochs, meta)}
    if epochs := _teacher_epochs(recipe, plan):
        phases["teacher"] = (epochs, _meta_teacher(meta.teacher.arch))
    return {
        name: epochs * steps * (mean_step_macs(task, size, sizes) + update_macs(recipe, task))
        for name, (epochs, task) in phases.items()
    }


def _meta_teacher(arch: Arch) -> CrossEntropy:
    """The task of the teacher's phase without memory, for counting."""
    with torch.device("meta"):
        return CrossEntropy(Network(arch))


def _new_teacher(context: Context, arch: Arch) -> Network:
    torch.manual_seed(context.recipe.seed)
    return context.place(Network(teacher_arch(context.recipe, arch)))


def _student_task(context: Context, plan: Plan) -> nn.Module:
    """The task of the student's phase, from the student's initialisation on."""
    recipe = context.recipe
    teacher = None if plan.teacher is None else context.place(plan.teacher)
    torch.manual_seed(recipe.seed)
    if plan.start is None:
        student = build_student(recipe, plan.arch, teacher)
    else:
        student = start_from(plan.start, plan.arch, context.dataset.classes)
    student = context.place(student)
    if applied_init(plan.arch, recipe) == "identity":
        start_as_identity(student, context.place(_first_images(recipe, context.dataset)), recipe.init_noise)
    task = build_task(recipe, student, teacher)
    for name, part in task.named_children():
        if name not in ("student", "teacher"):  # connectors; the networks were placed before the task aliased them
            context.place(part)
    return task


def _first_images(recipe: Recipe, dataset: Dataset) -> torch.Tensor:
    """A batch of training images, the same for all seeds and processes, for the BN of an identity start."""
    return dataset.train.images(fixed_sample(dataset.train, statistics_size(recipe)))


def _finish(context: Context, best: dict, plan: Plan, teacher_seconds: float) -> dict:
    """Read the test split, once, and write the results."""
    recipe, dataset, folder, teacher = context.recipe, context.dataset, context.folder, plan.teacher
    student = context.place(load_checkpoint(folder / "model.pt").network())
    if recipe.teacher_mode == "joint" and teacher is not None:
        teacher = context.place(load_checkpoint(folder / "teacher.pt").network())
    seen = predict(student, dataset.test, context)
    taught = None if teacher is None else evaluate(teacher, dataset.test, context)[0]
    dataset.skipped.agree()
    result = {
        "test_accuracy": seen.accuracy,
        "mean_class_accuracy": seen.mean_class_accuracy,
        "teacher_test_accuracy": taught,
        "val_accuracy": best["val_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "method": recipe.method,
        "init": applied_init(student.arch, recipe),
        "arch": student.arch.name,
        "start_weights": recipe.start_weights,
        "teacher_weights": recipe.teacher_weights,
        "feature_weight": recipe.feature_weight if recipe.method == "jointrd" else None,
        "ema": recipe.ema,
        "reparam": student.arch.reparam,
        "data": dataset.name,
        "train_images": len(dataset.train),
        "test_images": len(seen.indices),
        "corrupt_images": len(dataset.skipped),
        **plan.figures,
        "seconds": best["seconds"],
        "teacher_seconds": teacher_seconds,
        "precision": recipe.precision,
        "threads": recipe.threads,
        "processes": distributed.world(),
        "torch": str(torch.__version__),
    }
    if distributed.first():
        report.write(folder, recipe, result, dataset, seen)
        write_json(folder / "result.json", result)  # last: it says that the run is complete
    return result
