"""Counted costs against the published ones and against what must follow from leaving work out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rd_train.cost import macs_per_image, mean_step_macs, relative_cost, step_macs, update_macs
from rd_train.distill import CrossEntropy, LogitDistillation, ResidualDistillation
from rd_train.networks import Network, parse_arch
from rd_train.optimizers import build_optimizer
from rd_train.recipe import Recipe


def on_meta(make, *names):
    with torch.device("meta"):
        return make(*(Network(parse_arch(name)) for name in names))


def without_features(**options):
    return partial(ResidualDistillation, feature_weight=0.0, **options)


@pytest.mark.parametrize(("name", "gmacs"), [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09)])
def test_macs_are_the_published_ones(name, gmacs):
    assert macs_per_image(parse_arch(name), 224) / 1e9 == pytest.approx(gmacs, abs=0.01)


def test_ordinary_training_costs_three_forwards_but_for_the_gradient_of_the_images():
    task = on_meta(CrossEntropy, "plain18")
    stem = 3 * 64 * 49 * 112 * 112
    assert step_macs(task, 224) == 3 * macs_per_image(task.student.arch, 224) - stem
    assert relative_cost(task, 224) == 1.0


def test_a_clean_teacher_forward_costs_a_third():
    task = on_meta(lambda s, t: LogitDistillation(s, t, kd_weight=0.5, kd_temperature=4.0), "plain50", "resnet50")
    assert relative_cost(task, 224) == pytest.approx(1.34, abs=0.04)


def test_splices_through_a_frozen_teacher_compute_no_weight_gradients():
    def cost(**options):
        return step_macs(on_meta(without_features(**options), "plain18", "resnet18"), 224)

    plain = cost(splice_weight=0.0, splice_weight_end=0.0)
    resnet = parse_arch("resnet18")
    whole = macs_per_image(resnet, 224)
    with torch.device("meta"):
        network = Network(resnet)
    # Stage costs by hand: basic blocks at 56, 28, 14 and 7 pixels; each later stage has one projection.
    stage = [4 * 9 * 64 * 64 * 56**2] + [
        (9 * (c // 2) * c + 3 * 9 * c * c + (c // 2) * c) * (56 * 64 // c) ** 2 for c in (128, 256, 512)
    ]
    stem, fc = 3 * 64 * 49 * 112**2, network.fc.weight.numel()
    assert stem + sum(stage) + fc == whole
    # Splice k runs stages k+1..4 and the classifier: forward and gradient of the input, no gradient of weights.
    expected = sum(2 * (sum(stage[k:]) + fc) for k in (1, 2, 3))
    assert cost() - plain == expected


def test_joint_training_adds_an_ordinary_step_of_the_teacher():
    def cost(train_teacher):
        return step_macs(on_meta(without_features(train_teacher=train_teacher), "plain18", "resnet18"), 224)

    assert cost(True) - cost(False) == step_macs(on_meta(CrossEntropy, "resnet18"), 224)


def test_a_random_splice_costs_what_its_kinds_of_step_cost_by_their_probability():
    options = {"splice_probability": 0.6, "splice_weight_end": 0.0, "splice_window": 0.5}
    ours = on_meta(without_features(**options), "plain18", "resnet18")
    parts = [step_macs(ours, 64, splices=splices) for splices in ((), (1,), (2,), (3,))]
    assert parts[0] == step_macs(on_meta(CrossEntropy, "plain18"), 64)
    # p falls from 0.6 along half a cosine over half of the training: 0.15 on average; each splice has a third of it.
    expected = 0.85 * parts[0] + 0.05 * sum(parts[1:])
    assert mean_step_macs(ours, 64) == pytest.approx(expected, rel=1e-9)
    assert step_macs(ours, 64) == parts[0] + sum(part - parts[0] for part in parts[1:])


def test_logit_distillation_costs_a_teacher_forward_in_the_steps_that_have_it():
    options = {"kd_weight": 0.5, "kd_start": 0.5, "kd_probability": 0.3}
    task = on_meta(partial(LogitDistillation, **options), "plain18", "resnet18")
    expected = step_macs(on_meta(CrossEntropy, "plain18"), 64) + 0.15 * macs_per_image(task.teacher.arch, 64)
    assert mean_step_macs(task, 64) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["plain20", "plain50"])
def test_muons_products_are_counted(name, monkeypatch):
    network = Network(parse_arch(name, width=0.25, in_channels=1, classes=10))
    recipe = Recipe(optimizer="muon")
    optimizer = build_optimizer(recipe, CrossEntropy(network))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert update_macs(recipe, CrossEntropy(network)) == counter.get_total_flops() / 2 / recipe.batch_size
    monkeypatch.setattr("rd_train.distributed.world", lambda: 3)
    assert update_macs(recipe, CrossEntropy(network)) == 3 * counter.get_total_flops() / 2 / recipe.batch_size
    assert update_macs(Recipe(optimizer="sgd"), CrossEntropy(network)) == 0
    ordinary = on_meta(CrossEntropy, "plain18")
    assert relative_cost(ordinary, 64, update=step_macs(ordinary, 64) / 4) == 1.25


@pytest.mark.parametrize("trained", [("weight", "bias"), ("bn",), ("bias",)])
def test_counted_without_memory_as_with_it(trained):
    """All products of a step of images, with BN as it is; also where BN alone is trained, and nothing before it."""

    def task():
        student, teacher = (
            Network(parse_arch(name, width=0.25, in_channels=1, classes=10, reparam="branches"))
            for name in ("plain20", "resnet20")
        )
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        return ResidualDistillation(student, teacher).train()

    with FlopCounterMode(display=False) as counter:
        images, labels = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
        task()(images, labels, torch.zeros(()), splices=(1, 2))["loss"].backward()
    with torch.device("meta"):
        meta = task()
    assert step_macs(meta, 16, splices=(1, 2)) == counter.get_total_flops() / 4 > 0


def test_smaller_images_cost_less():
    task = on_meta(CrossEntropy, "plain18")
    half = mean_step_macs(task, 64, lambda progress: 32 if progress < 0.5 else 64)
    assert half == pytest.approx((step_macs(task, 32) + step_macs(task, 64)) / 2)


def test_train_time_branches_cost_their_1x1_convolutions():
    arch = parse_arch("plain20", classes=10)
    with torch.device("meta"):
        tasks = [CrossEntropy(Network(replace(arch, reparam=reparam))) for reparam in ("none", "identity", "branches")]
    plain, identity, branches = (step_macs(task, 32) for task in tasks)
    assert identity == plain  # BN is not counted, here as elsewhere
    blocks = (
        plain - 3 * 32**2 * 3 * 9 * 16 + 32**2 * 3 * 9 * 16 - 3 * 640
    )  # without stem (no gradient of images) and fc
    assert branches - plain == pytest.approx(blocks / 9, rel=1e-9)
    assert relative_cost(tasks[2], 32) == pytest.approx(branches / plain)
