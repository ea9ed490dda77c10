"""A whole run: plan, teacher phase if one is needed, student phase, test, report."""

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from rd_deploy.common import UserError, expanded, one_line, require, write_json, write_text
from rd_deploy.cpus import available_threads
from rd_train import bf16, distributed, report
from rd_train.augment import Augment
from rd_train.build import (
    build_student,
    build_task,
    load_teacher,
    meta_task,
    needs_teacher,
    sizes_of,
    student_arch,
    teacher_arch,
)
from rd_train.checkpoint import Checkpoint, checkpoint_values, load_checkpoint, plain_size, save_checkpoint
from rd_train.context import Context, stop_on_signals, student_checkpoint
from rd_train.cost import macs_per_image, mean_step_macs, relative_cost, update_macs
from rd_train.data import Dataset, check_shares, fixed_sample, load_dataset, steps_per_epoch
from rd_train.distill import CrossEntropy
from rd_train.estimate import PhaseEstimate, measure, print_estimate
from rd_train.evaluation import evaluate, predict, statistics_size
from rd_train.live import View, shown
from rd_train.loop import fit
from rd_train.metrics import TENSORBOARD, tensorboard_writer
from rd_train.names import is_name
from rd_train.networks import Arch, Network, parameter_count, start_as_identity
from rd_train.recipe import RUN_FILES, Recipe, dump_yaml
from rd_train.start import from_start, keeps_classifier, load_start, start_from
from rd_train.state import check_images, saved_preprocessing
from rd_train.teachers import is_published, load_published, settled_name
from rd_train.workers import default_workers

# Seconds within which all machines see a file that was written: NFS remembers for a minute that there was none.
SEEN_WITHIN = 90.0


def settle(recipe: Recipe, *, named: Collection[str] = (), begun: bool = False) -> Recipe:
    """Replace every ``auto`` and unset entry that depends on the machine, so that a resume does the same sums.

    With several processes, all get what the first one has. ``named``: see `from_start`. ``begun``: the recipe is that
    of a run to go on with, which has its teacher, knows what it started from, and may do without these.
    """
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU; use --device cpu")
    precision = recipe.precision
    multiplies = bf16.gpu_multiplies_bf16() if device == "cuda" else bf16.cpu_multiplies_bf16()
    if precision == "auto":
        precision = "bf16" if multiplies else "fp32"
    elif precision == "bf16" and device == "cpu" and not multiplies:
        precision = bf16.EMULATED
    # Absolute, so that a run can be resumed from another folder.
    starts = recipe.start_weights is not None and not begun
    published = starts and is_name(recipe.start_weights)
    names = ["data_dir"] if begun else ["data_dir", "teacher_weights", "start_weights"]
    given = {name: path for name in names if (path := getattr(recipe, name)) is not None}
    paths = {name: str(expanded(name, path).resolve()) for name, path in given.items()}
    threads = recipe.threads or max(1, available_threads() // distributed.processes_here())
    if fetched_teacher(recipe) and not begun:
        paths["teacher"] = settled_name(recipe.teacher)
    if published:
        paths["start_weights"] = settled_name(recipe.start_weights)
    settled = replace(recipe, device=device, precision=precision, threads=threads, **paths)
    if starts:
        with distributed.one_per_machine_first(published):
            settled = from_start(settled, named)
    if distributed.world() == 1:
        return settled
    return Recipe(**yaml.safe_load(distributed.of_first(dump_yaml(settled))))


@dataclass(frozen=True)
class _Plan:
    """What is to be trained, by what, on what: everything that can be wrong with it was checked.

    ``teacher`` where one is given; ``start``: the checkpoint to fine-tune, which a run to go on with has behind it;
    ``figures`` go into the result.
    """

    dataset: Dataset
    arch: Arch
    teacher: Network | None
    start: Checkpoint | None
    figures: dict


def run(
    recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False, tensorboard: bool = False
) -> dict:
    """Train by a settled recipe in ``folder`` and return what is in its ``result.json``.

    ``resume``: go on with the run that is there; ``overwrite``: delete it once nothing is wrong with the new one.
    Neither, and the folder must hold none. Another process that trains there is a `UserError`.
    """
    if tensorboard:
        require("tensorboard", "tensorboard")  # before anything is deleted
    with _planned(recipe, folder if resume else None) as plan, _one_run_in(folder):
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
def _planned(recipe: Recipe, begun: Path | None = None) -> Iterator[_Plan]:
    """The plan of a run, which is printed, and how it multiplies; its data set's workers end with it.

    ``begun``: the folder of the run to go on with.
    """
    torch.set_num_threads(recipe.threads)
    distributed.device(recipe.device)  # too few GPUs are told first
    start = like = None
    if recipe.start_weights is not None:
        like = None if begun is None else saved_preprocessing(begun)
        if like is None:  # nothing is saved: the weights are needed, too
            start = load_start(recipe.start_weights)
            like = start.preprocessing
    with distributed.one_per_machine_first(recipe.download):
        dataset = load_dataset(
            recipe.data,
            recipe.data_dir,
            size=recipe.size,
            limit=recipe.train_limit,
            download=recipe.download,
            augment=augmentation(recipe),
            like=like,
            split_seed=recipe.split_seed,
            workers=default_workers() if recipe.workers is None else recipe.workers,
            max_corrupt=recipe.max_corrupt,
        )
    try:
        check_shares(len(dataset.train), recipe.batch_size, distributed.world())
        arch = student_arch(recipe, dataset.preprocessing.channels, len(dataset.classes))
        with distributed.one_per_machine_first(fetched_teacher(recipe)):
            teacher = _given_teacher(recipe, dataset, arch, begun)
        plan = _Plan(dataset, arch, teacher, start, print_plan(recipe, dataset, arch, teacher, start))
        with computing(recipe):
            yield plan
    finally:
        dataset.workers.close()


@contextlib.contextmanager
def told_of_memory() -> Iterator[None]:
    """What torch's allocators say, of the GPU and of the CPU, as a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(one_line(error)[:160]) from error
        raise


@contextlib.contextmanager
def computing(recipe: Recipe) -> Iterator[None]:
    """Let torch compute as a settled recipe says."""
    with told_of_memory(), bf16.products(emulated=recipe.precision == bf16.EMULATED), products_of_fp32(recipe):
        yield


@contextlib.contextmanager
def products_of_fp32(recipe: Recipe) -> Iterator[None]:
    """On a GPU in fp32, let products be of fp32, where torch's convolutions are TF32 by default: 10 bits of 23."""
    backends = [torch.backends.cudnn, torch.backends.cuda.matmul] if recipe.device == "cuda" else []
    before = {backend: backend.allow_tf32 for backend in backends if recipe.precision == "fp32"}
    for backend in before:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in before.items():
            backend.allow_tf32 = allowed


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


def _context(recipe: Recipe, plan: _Plan, folder: Path, stop: threading.Event, **options) -> Context:
    return Context(recipe, plan.dataset, folder, distributed.device(recipe.device), stop, **options)


def dry_run(recipe: Recipe, folder: Path) -> list[PhaseEstimate]:
    """Print the plan of a run, and what it will take by a few timed steps of each phase; nothing is written."""
    phases = []
    with _planned(recipe) as plan, stop_on_signals() as stop:
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


def _teacher_epochs(recipe: Recipe, plan: _Plan) -> int:
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


def _phases(context: Context, plan: _Plan, resume: bool) -> dict:
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


def _work(context: Context, plan: _Plan) -> dict[str, float]:
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


def _student_task(context: Context, plan: _Plan) -> nn.Module:
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


def _finish(context: Context, best: dict, plan: _Plan, teacher_seconds: float) -> dict:
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


def _given_teacher(recipe: Recipe, dataset: Dataset, arch: Arch, begun: Path | None) -> Network | None:
    """The teacher that the run does not train; that of a run to go on with is in its folder."""
    if not needs_teacher(recipe) or (recipe.teacher_weights is None and not fetched_teacher(recipe)):
        return None
    if begun is not None and (begun / "teacher.pt").exists():
        return load_teacher(begun / "teacher.pt", teacher_arch(recipe, arch), dataset.preprocessing, dataset.classes)
    if is_published(recipe.teacher):
        return load_published(recipe.teacher, recipe.teacher_weights, dataset.preprocessing, len(dataset.classes))
    named = recipe.teacher != "auto"
    return load_teacher(
        recipe.teacher_weights,
        teacher_arch(recipe, arch),
        dataset.preprocessing,
        dataset.classes,
        named=named,
    )


def fetched_teacher(recipe: Recipe) -> bool:
    """Whether the teacher's weights come from a library's hub."""
    return needs_teacher(recipe) and is_published(recipe.teacher) and recipe.teacher_weights is None


def applied_init(arch: Arch, recipe: Recipe) -> str:
    """The initialisation that takes effect: blocks with shortcuts are Kaiming either way."""
    if recipe.warm_start and needs_teacher(recipe):
        return "teacher"
    if recipe.start_weights is not None:
        return "start_weights"
    return "kaiming" if arch.shortcuts == "all" else recipe.init


def augmentation(recipe: Recipe) -> Augment:
    """How training images are varied."""
    return Augment(crop_padding=recipe.crop_padding, flip=recipe.flip, smallest_crop=recipe.smallest_crop)


def deployed_parameters(arch: Arch) -> int:
    """Parameters of the network without what it has in training only."""
    with torch.device("meta"):
        return parameter_count(Network(arch.deployed))


def print_plan(recipe: Recipe, dataset: Dataset, arch: Arch, teacher: Network | None, start: Checkpoint | None) -> dict:
    """Say what will be trained on what and at which cost; returns the figures."""
    size = dataset.preprocessing.size
    task = meta_task(recipe, arch, teacher.arch if teacher is not None else None)
    update = update_macs(recipe, task)
    plan = {
        "parameters": deployed_parameters(arch),
        "macs_per_image": macs_per_image(arch.deployed, size),
        "step_cost": round(relative_cost(task, size, sizes_of(recipe, size), update), 4),
    }
    print(
        f"data     {dataset.name}: {len(dataset.train):,} train, {len(dataset.val):,} validation, "
        f"{len(dataset.test):,} test, {len(dataset.classes)} classes, {size}x{size}"
    )
    for note in dataset.notes:
        print(f"note     {note}")
    print(
        f"network  {arch.name}: {plan['parameters']:,} parameters, {plan['macs_per_image']:,} MACs per image, "
        f"init {applied_init(arch, recipe)}"
        + ("" if arch.reparam == "none" else f", reparam {arch.reparam} (folded at export)")
    )
    cost = f"a step costs {plan['step_cost']:.2f} x a plain cross-entropy step"
    if recipe.start_weights is not None:
        own = start is not None and keeps_classifier(start, dataset.classes)
        classifier = (
            "its classifier, which knows these classes"
            if own
            else f"a new classifier of {len(dataset.classes)} classes"
        )
        print(f"start    {recipe.start_weights}{'' if start is None else f', with {classifier}'}")
    if needs_teacher(recipe):
        origin = recipe.teacher_weights or ("trained jointly" if recipe.teacher_mode == "joint" else "trained first")
        if is_published(recipe.teacher):
            origin = " from ".join(filter(None, (recipe.teacher, recipe.teacher_weights)))
        print(f"teacher  {task.teacher.arch.name} ({origin})")
    print(f"method   {recipe.method}: {cost}; {recipe.epochs} epochs of {recipe.batch_size} images, seed {recipe.seed}")
    if recipe.unused():
        print(f"note     without effect here: {', '.join(recipe.unused())}")
    if recipe.method in ("jointrd", "rd") and arch.shortcuts == "all":
        print("note     the student has shortcuts of its own; residual distillation is meant for plain students")
    processes = f"{distributed.world()} processes, " if distributed.world() > 1 else ""
    print(f"machine  {processes}{recipe.device}, {recipe.threads} threads, {recipe.precision}", flush=True)
    return plan
