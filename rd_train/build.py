"""From a recipe to architectures, networks and a task."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.checkpoint import FORMAT, Checkpoint, load_checkpoint, load_plain, load_strictly
from rd_train.distill import CrossEntropy, LogitDistillation, ResidualDistillation
from rd_train.networks import Arch, Network, fade_shortcuts, parse_arch
from rd_train.recipe import Recipe
from rd_train.teachers import (
    check_statistics,
    checked_state,
    is_published,
    parse_published,
    read_state,
    with_counters,
)
from rd_train.vary import growing_size


def student_arch(recipe: Recipe, in_channels: int, classes: int) -> Arch:
    """The architecture that the recipe trains, for images of a data set."""
    options = {name: getattr(recipe, name) for name in ("shortcuts", "stem") if getattr(recipe, name) is not None}
    shape = {"width": recipe.width, "in_channels": in_channels, "classes": classes}
    return parse_arch(recipe.arch, reparam=recipe.reparam, **shape, **options)


def teacher_arch(recipe: Recipe, student: Arch) -> Arch:
    """The teacher's architecture: the student's ResNet, or the named one with the student's stem and width.

    A published one is as it is, but for the number of classes, which its weights say.
    """
    if is_published(recipe.teacher):
        return parse_published(recipe.teacher).arch(student.classes)
    if recipe.teacher == "auto":
        return replace(student.deployed, shortcuts="all")
    return replace(
        parse_arch(recipe.teacher),
        stem=student.stem,
        width=student.width,
        in_channels=student.in_channels,
        classes=student.classes,
    )


def build_student(recipe: Recipe, arch: Arch, teacher: Network | None) -> Network:
    """The student as it starts anew: initialised, or with ``warm_start`` as the teacher, whose shortcuts will fade."""
    if not recipe.warm_start or teacher is None:
        return Network(arch, recipe.init, recipe.init_noise)
    if teacher.arch != replace(arch, shortcuts="all") or arch.shortcuts == "all":
        raise UserError(
            f"warm_start copies the teacher, which must be the ResNet of the plain {arch.name}, "
            f"with its width and stem, not {teacher.arch.name}"
        )
    student = Network(teacher.arch)
    student.load_state_dict(teacher.state_dict())
    fade_shortcuts(student, arch)
    return student


def sizes_of(recipe: Recipe, size: int) -> Callable[[float], int]:
    """The size of training images in pixels, as a function of progress in [0, 1]."""
    return lambda progress: growing_size(progress, size, recipe.resize_start, recipe.resize_window)


def needs_teacher(recipe: Recipe) -> bool:
    """Whether the method has a teacher."""
    return recipe.method != "ce"


def load_teacher(
    path: str | Path, arch: Arch, preprocessing: Preprocessing, classes: list[str], *, named: bool = False
) -> Network:
    """A teacher from a ``model.pt`` (which knows its architecture) or a torchvision-style state_dict of ``arch``.

    A ``model.pt`` must have been trained on the same classes in the same order, and on images normalised alike; with
    ``named`` it must be ``arch``.
    """
    safetensors = Path(path).suffix == ".safetensors"
    values = read_state(path) if safetensors else load_plain(path, "teacher")
    if isinstance(values, dict) and values.get("format") == FORMAT:
        teacher = _same_task(path, load_checkpoint(path), preprocessing, classes)
        if named and (teacher.arch.depth, teacher.arch.shortcuts) != (arch.depth, arch.shortcuts):
            raise UserError(f"teacher {path} is a {teacher.arch.name}, not the {arch.name} asked for")
        return teacher.network()
    network = Network(arch)
    load_strictly(
        network, with_counters(network.state_dict(), checked_state(path, values)), f"teacher {path} (as {arch.name})"
    )
    return network.eval()


def _same_task(path: str | Path, teacher: Checkpoint, preprocessing: Preprocessing, classes: list[str]) -> Checkpoint:
    if teacher.classes != classes:
        raise UserError(f"teacher {path} was trained on other classes ({', '.join(teacher.classes[:3])} ...)")
    check_statistics(f"teacher {path}", (teacher.preprocessing.mean, teacher.preprocessing.std), preprocessing)
    return teacher


def build_task(recipe: Recipe, student: Network, teacher: Network | None) -> nn.Module:
    """The task of the recipe's method."""
    common = {"label_smoothing": recipe.label_smoothing}
    if recipe.method == "ce":
        return CrossEntropy(student, **common)
    kd = {name: getattr(recipe, name) for name in ("kd_weight", "kd_temperature", "kd_start", "kd_probability")}
    if recipe.method == "kd":
        return LogitDistillation(student, teacher, **kd, **common)
    if recipe.method == "jointrd":
        own = {"train_teacher": recipe.teacher_mode == "joint"}
        own |= {"feature_weight": recipe.feature_weight, "feature_reduction": recipe.feature_reduction}
    else:
        probability = recipe.splice_probability if recipe.splices == "one" else None
        own = {"splice_probability": probability, "weights_sum_to_one": True, "feature_weight": 0.0}
        own |= kd
    return ResidualDistillation(
        student,
        teacher,
        splice_weight=recipe.splice_weight,
        splice_weight_end=recipe.splice_weight_end,
        splice_window=recipe.splice_window,
        teacher_bn=recipe.teacher_bn,
        **own,
        **common,
    )


def meta_task(recipe: Recipe, student: Arch, teacher: Arch | None = None) -> nn.Module:
    """The task without memory, for counting its cost; ``teacher`` where it is not the recipe's."""
    with torch.device("meta"):
        network = Network(teacher or teacher_arch(recipe, student)) if needs_teacher(recipe) else None
        return build_task(recipe, build_student(recipe, student, network), network)
