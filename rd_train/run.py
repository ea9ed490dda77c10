"""A whole run: plan, teacher phase if one is needed, student phase, test, report."""

from dataclasses import replace
from pathlib import Path

import torch

from rd_deploy.bench.environment import available_threads, cpu
from rd_deploy.common import UserError, write_json, write_text
from rd_train import report
from rd_train.build import (
    build_student,
    build_task,
    from_start,
    load_teacher,
    meta_task,
    needs_teacher,
    sizes_of,
    student_arch,
    teacher_arch,
)
from rd_train.checkpoint import Checkpoint, load_checkpoint
from rd_train.cost import macs_per_image, relative_cost
from rd_train.data import Dataset, load_dataset
from rd_train.distill import CrossEntropy
from rd_train.loop import Context, evaluate, fit, stop_on_signals, tensorboard_writer
from rd_train.networks import Arch, Network, parameter_count, start_as_identity
from rd_train.recipe import RUN_FILES, Recipe, dump_yaml
from rd_train.workers import default_workers


def settle(recipe: Recipe) -> Recipe:
    """Replace every ``auto`` and unset entry that depends on the machine, so that a resume does the same sums."""
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU; use --device cpu")
    precision = recipe.precision
    if precision == "auto":
        precision = (
            "bf16" if (torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bf16()) else "fp32"
        )
    # Absolute, so that a run can be resumed from another folder.
    names = ("data_dir", "teacher_weights", "start_weights")
    paths = {name: _absolute(path) for name in names if (path := getattr(recipe, name))}
    threads = recipe.threads or available_threads()
    settled = replace(recipe, device=device, precision=precision, threads=threads, **paths)
    return settled if settled.start_weights is None else from_start(settled)


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve())
    except RuntimeError as error:
        raise UserError(f"no such user: the ~ of {path} has no folder") from error


def _cpu_multiplies_bf16() -> bool:
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(cpu()["flags"]))  # "bf16" is Arm's name


def run(recipe: Recipe, folder: Path, *, resume: bool = False, tensorboard: bool = False) -> dict:
    """Train by a settled recipe in ``folder`` and return what is in its ``result.json``."""
    torch.set_num_threads(recipe.threads)
    start = None if recipe.start_weights is None else load_checkpoint(recipe.start_weights)
    dataset = load_dataset(
        recipe.data,
        recipe.data_dir,
        size=recipe.size,
        limit=recipe.train_limit,
        download=recipe.download,
        like=None if start is None else start.preprocessing,
        split_seed=recipe.split_seed,
        workers=default_workers() if recipe.workers is None else recipe.workers,
        max_corrupt=recipe.max_corrupt,
    )
    try:
        return _run(recipe, dataset, start, folder, resume, tensorboard)
    finally:
        dataset.workers.close()


def _run(
    recipe: Recipe, dataset: Dataset, start: Checkpoint | None, folder: Path, resume: bool, tensorboard: bool
) -> dict:
    arch = student_arch(recipe, dataset.preprocessing.channels, len(dataset.classes))
    teacher = _given_teacher(recipe, dataset, arch)
    plan = print_plan(recipe, dataset, arch, teacher)
    if not resume:
        _clear(folder)
    write_text(folder / "recipe.yaml", dump_yaml(recipe))
    dataset.skipped.record(folder / "skipped.txt", resume=resume)
    writer = tensorboard_writer(folder, resume=resume) if tensorboard else None
    with stop_on_signals() as stop:
        context = Context(
            recipe, dataset, folder, torch.device(recipe.device), recipe.precision == "bf16", stop, writer
        )
        return _phases(context, arch, teacher, start, plan, resume)


def _clear(folder: Path) -> None:
    """Forget an earlier run, after everything that can be wrong with the new one was checked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from error


def _phases(
    context: Context, arch: Arch, teacher: Network | None, start: Checkpoint | None, plan: dict, resume: bool
) -> dict:
    recipe, folder = context.recipe, context.folder
    teacher_seconds = 0.0
    if needs_teacher(recipe) and teacher is None:
        torch.manual_seed(recipe.seed)
        teacher = context.place(Network(teacher_arch(recipe, arch)))
        if recipe.teacher_mode == "frozen":
            task = CrossEntropy(teacher, label_smoothing=recipe.label_smoothing)
            best = fit("teacher", task, recipe.teacher_epochs or recipe.epochs, context, resume=resume)
            teacher_seconds = best["seconds"]
            teacher = load_checkpoint(folder / "teacher.pt").network()
    teacher = None if teacher is None else context.place(teacher)
    torch.manual_seed(recipe.seed)
    student = context.place(build_student(recipe, arch, teacher, start))
    if applied_init(arch, recipe) == "identity":
        start_as_identity(student, context.place(_first_images(recipe, context.dataset)))
    task = build_task(recipe, student, teacher)
    best = fit("student", task, recipe.epochs, context, resume=resume)
    return _finish(context, best, plan, teacher, teacher_seconds)


def _first_images(recipe: Recipe, dataset: Dataset) -> torch.Tensor:
    """A batch of training images, the same for all seeds, by which the BN of an identity start are set."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    return dataset.train.images(order[: recipe.batch_size])


def _finish(context: Context, best: dict, plan: dict, teacher: Network | None, teacher_seconds: float) -> dict:
    """Read the test split, once, and write the results."""
    recipe, dataset, folder = context.recipe, context.dataset, context.folder
    student = context.place(load_checkpoint(folder / "model.pt").network())
    if recipe.teacher_mode == "joint" and teacher is not None:
        teacher = context.place(load_checkpoint(folder / "teacher.pt").network())
    result = {
        "test_accuracy": evaluate(student, dataset.test, context)[0],
        "teacher_test_accuracy": None if teacher is None else evaluate(teacher, dataset.test, context)[0],
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
        "test_images": len(dataset.test) - len(dataset.test.corrupt),
        "corrupt_images": len(dataset.skipped),
        **plan,
        "seconds": best["seconds"],
        "teacher_seconds": teacher_seconds,
        "precision": recipe.precision,
        "threads": recipe.threads,
        "torch": str(torch.__version__),
    }
    report.write(folder, recipe, result)
    write_json(folder / "result.json", result)  # last: it says that the run is complete
    return result


def _given_teacher(recipe: Recipe, dataset: Dataset, arch: Arch) -> Network | None:
    if not needs_teacher(recipe) or recipe.teacher_weights is None:
        return None
    named = recipe.teacher != "auto"
    return load_teacher(
        recipe.teacher_weights,
        teacher_arch(recipe, arch),
        dataset.preprocessing,
        dataset.classes,
        named=named,
    )


def applied_init(arch: Arch, recipe: Recipe) -> str:
    """The initialisation that takes effect: blocks with shortcuts are Kaiming either way."""
    if recipe.warm_start and needs_teacher(recipe):
        return "teacher"
    if recipe.start_weights is not None:
        return "start_weights"
    return "kaiming" if arch.shortcuts == "all" else recipe.init


def deployed_parameters(arch: Arch) -> int:
    """Parameters of the network without what it has in training only."""
    with torch.device("meta"):
        return parameter_count(Network(arch.deployed))


def print_plan(recipe: Recipe, dataset: Dataset, arch: Arch, teacher: Network | None) -> dict:
    """Say what will be trained on what and at which cost; returns the figures."""
    size = dataset.preprocessing.size
    task = meta_task(recipe, arch, teacher.arch if teacher is not None else None)
    plan = {
        "parameters": deployed_parameters(arch),
        "macs_per_image": macs_per_image(arch.deployed, size),
        "step_cost": round(relative_cost(task, size, sizes_of(recipe, size)), 4),
    }
    print(
        f"data     {dataset.name}: {len(dataset.train):,} train, {len(dataset.val):,} validation, "
        f"{len(dataset.test):,} test, {len(dataset.classes)} classes, {size}x{size}"
    )
    print(
        f"network  {arch.name}: {plan['parameters']:,} parameters, {plan['macs_per_image']:,} MACs per image, "
        f"init {applied_init(arch, recipe)}"
    )
    cost = f"a step costs {plan['step_cost']:.2f} x a plain cross-entropy step"
    if recipe.start_weights is not None:
        print(f"start    {recipe.start_weights}, with a new classifier of {len(dataset.classes)} classes")
    if needs_teacher(recipe):
        origin = recipe.teacher_weights or ("trained jointly" if recipe.teacher_mode == "joint" else "trained first")
        print(f"teacher  {task.teacher.arch.name} ({origin})")
    print(f"method   {recipe.method}: {cost}; {recipe.epochs} epochs of {recipe.batch_size} images, seed {recipe.seed}")
    if recipe.unused():
        print(f"note     without effect here: {', '.join(recipe.unused())}")
    if recipe.method in ("jointrd", "rd") and arch.shortcuts == "all":
        print("note     the student has shortcuts of its own; residual distillation is meant for plain students")
    print(f"machine  {recipe.device}, {recipe.threads} threads, {recipe.precision}", flush=True)
    return plan
