"""From recipes to architectures, teachers and optimisers."""

import pytest
import torch
import torchvision

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.build import load_teacher, meta_task, student_arch, teacher_arch
from rd_train.checkpoint import Checkpoint, save_checkpoint
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe

PREPROCESSING = Preprocessing(size=8, resize=8, channels=1, mean=(0.3,), std=(0.4,))
CLASSES = ["a", "b", "c"]
ARCH = parse_arch("resnet20", width=1 / 8, in_channels=1, classes=3)


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.pt"
    save_checkpoint(path, Checkpoint(ARCH, Network(ARCH).state_dict(), PREPROCESSING, CLASSES))
    return path


def test_architectures_follow_the_recipe_and_the_data():
    student = student_arch(Recipe(arch="plain18", stem="small", width=0.5, shortcuts="projection"), 1, 7)
    assert (student.name, student.stem, student.widths[0], student.in_channels, student.classes) == (
        "plain18-projection", "small", 32, 1, 7,
    )  # fmt: skip
    teacher = teacher_arch(Recipe(teacher="resnet34"), student)
    assert (teacher.name, teacher.stem, teacher.width, teacher.in_channels) == ("resnet34", "small", 0.5, 1)
    assert teacher_arch(Recipe(), student).name == "resnet18"


def test_a_teacher_of_the_same_task_is_taken(teacher):
    network = load_teacher(teacher, ARCH, PREPROCESSING, CLASSES, named=True)
    assert network.arch == ARCH
    assert not network.training


def test_a_teacher_of_another_task_is_refused(teacher):
    with pytest.raises(UserError, match="other classes"):
        load_teacher(teacher, ARCH, PREPROCESSING, ["c", "b", "a"])
    other = Preprocessing(size=8, resize=8, channels=1, mean=(0.5,), std=(0.4,))
    with pytest.raises(UserError, match="normalised otherwise"):
        load_teacher(teacher, ARCH, other, CLASSES)
    deeper = parse_arch("resnet56", width=1 / 8, in_channels=1, classes=3)
    with pytest.raises(UserError, match="is a resnet20, not the resnet56"):
        load_teacher(teacher, deeper, PREPROCESSING, CLASSES, named=True)


def test_torchvision_weights_older_than_the_batch_counter_load(tmp_path):
    weights = {name: value for name, value in torchvision.models.resnet18(num_classes=3).state_dict().items()
               if not name.endswith("num_batches_tracked")}  # fmt: skip
    torch.save(weights, tmp_path / "old.pth")
    arch = parse_arch("resnet18", classes=3)
    network = load_teacher(tmp_path / "old.pth", arch, PREPROCESSING, CLASSES)
    assert torch.equal(network.fc.weight, weights["fc.weight"])
    with pytest.raises(UserError, match="as resnet34"):
        load_teacher(tmp_path / "old.pth", parse_arch("resnet34", classes=3), PREPROCESSING, CLASSES)


def test_ours_is_the_papers_loss_unless_one_splice_is_drawn():
    arch = parse_arch("plain20", width=1 / 8)
    ours, theirs, one = (
        meta_task(Recipe(**options), arch)
        for options in (
            {"splices": "all", "kd_weight": 0.0},
            {"method": "jointrd", "feature_weight": 0},
            {"splice_probability": 0.3, "kd_weight": 0.0},
        )
    )
    assert ours.outcomes(0.1) == theirs.outcomes(0.1) == [(1.0, {"splices": (1, 2)})]
    assert sum(p for p, o in one.outcomes(0.0) if not o["splices"]) == pytest.approx(0.7)
    assert (ours.feature_weight, ours.kd_weight, theirs.kd_weight) == (0, 0, 0)
    assert ours._view[0].bn1.running_mean is None  # batch statistics
    assert theirs._view[0].bn1.running_mean is not None
