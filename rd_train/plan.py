"""What a run will do, before it does it: its settled recipe, data, networks and cost, checked and printed."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from rd_deploy.common import UserError, expanded, told_of_memory
from rd_deploy.cpus import available_threads
from rd_deploy.preprocessing import Preprocessing
from rd_train import bf16, distributed
from rd_train.augment import Augment
from rd_train.build import (
    load_teacher,
    meta_task,
    needs_teacher,
    sizes_of,
    student_arch,
    teacher_arch,
)
from rd_train.checkpoint import Checkpoint
from rd_train.cost import macs_per_image, relative_cost, update_macs
from rd_train.data import Dataset, check_shares, load_dataset, steps_per_epoch
from rd_train.names import is_name
from rd_train.networks import Arch, Network, parameter_count
from rd_train.recipe import Recipe
from rd_train.recipe_files import dump_yaml
from rd_train.start import from_start, keeps_classifier, load_start
from rd_train.state import saved_preprocessing
from rd_train.teachers import is_published, load_published, settled_name
from rd_train.workers import default_workers

FEW_STEPS = 10  # an epoch: so few that the batch is probably a mistake


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
class Plan:
    """What is to be trained, by what, on what: everything that can be wrong with it was checked.

    ``teacher`` where one is given; ``start``: the checkpoint to fine-tune, which a run to go on with has behind it;
    ``figures`` go into the result.
    """

    dataset: Dataset
    arch: Arch
    teacher: Network | None
    start: Checkpoint | None
    figures: dict


@contextlib.contextmanager
def planned(recipe: Recipe, begun: Path | None = None) -> Iterator[Plan]:
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
        dataset = data_of(recipe, like)
    try:
        check_shares(len(dataset.train), recipe.batch_size, distributed.world())
        arch = student_arch(recipe, dataset.preprocessing.channels, len(dataset.classes))
        with distributed.one_per_machine_first(fetched_teacher(recipe)):
            teacher = _given_teacher(recipe, dataset, arch, begun)
        plan = Plan(dataset, arch, teacher, start, print_plan(recipe, dataset, arch, teacher, start))
        with computing(recipe):
            yield plan
    finally:
        dataset.workers.close()


def data_of(recipe: Recipe, like: Preprocessing | None) -> Dataset:
    """The data set of a settled recipe; ``like``: the preprocessing of a network that there is already."""
    return load_dataset(
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


@contextlib.contextmanager
def computing(recipe: Recipe) -> Iterator[None]:
    """Let torch compute as a settled recipe says."""
    with told_of_memory(), bf16.products(emulated=recipe.precision == bf16.EMULATED), on_gpu(recipe):
        yield


@contextlib.contextmanager
def on_gpu(recipe: Recipe) -> Iterator[None]:
    """Set torch's GPU backends for a settled recipe, and put back what they were.

    fp32 is fp32, where torch's convolutions are TF32 by default: 10 bits of 23. Where shapes stay, which growing images
    change, cuDNN times its algorithms for each.
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32, convolutions.benchmark
    if recipe.device == "cuda":
        if recipe.precision == "fp32":
            convolutions.allow_tf32 = products.allow_tf32 = False
        convolutions.benchmark = recipe.resize_start == 1
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32, convolutions.benchmark = before


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
    unused = recipe.unused() + ["sync_bn (one process)"] * (recipe.sync_bn and distributed.world() == 1)
    if unused:
        print(f"note     without effect here: {', '.join(unused)}")
    if recipe.method in ("jointrd", "rd") and arch.shortcuts == "all":
        print("note     the student has shortcuts of its own; residual distillation is meant for plain students")
    steps = steps_per_epoch(dataset.train, recipe.batch_size)
    if steps < FEW_STEPS:
        print(f"note     {steps} step{'s' * (steps > 1)} an epoch: a smaller --batch-size takes more of them")
    if recipe.threads > available_threads():
        print(f"note     {recipe.threads} threads on {available_threads()} CPUs wait for each other: take fewer")
    processes = f"{distributed.world()} processes, " if distributed.world() > 1 else ""
    print(f"machine  {processes}{recipe.device}, {recipe.threads} threads, {recipe.precision}", flush=True)
    return plan
