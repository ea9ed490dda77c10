"""Recipes: what is not given, and values that make no sense."""

from dataclasses import fields, replace

import pytest

from rd_deploy.common import UserError
from rd_train.data import ENCODED, READERS
from rd_train.recipe import BY_DATA, Recipe


def test_every_entry_is_documented():
    documented = {line.split(":")[0].strip() for line in Recipe.__doc__.splitlines() if ":" in line}
    assert {field.name for field in fields(Recipe)} <= documented


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be from 1"),
        ({"lr": -1.0}, r"lr=-1\.0 must be from"),
        ({"lr": float("nan")}, "lr=nan must be from"),
        ({"lr": float("inf")}, "lr=inf must be from"),
        ({"batch_size": 1}, "batch_size=1 must be from 2"),
        ({"momentum": 1.0}, "momentum"),
        ({"kd_weight": 1.5}, "kd_weight=1.5 must be from 0 to 1"),
        ({"splice_window": 0.0}, "splice_window"),
        ({"seed": 1 << 70}, "seed"),
        ({"threads": 100_000}, "threads"),
        ({"warmup_epochs": 10.0, "epochs": 10}, "less than the 10 epochs"),
        ({"teacher_epochs": 1}, "less than the 1 epochs"),
        ({"method": "jointrd", "splice_weight": 0.1}, "must not exceed"),
        ({"method": "rd", "teacher_mode": "joint"}, "neither with method=kd or rd"),
        ({"splice_probability": 0.0}, "splice_probability"),
        ({"warm_start_window": 1.0}, "warm_start_window"),
        ({"resize_start": 0.0}, "resize_start"),
        ({"mixup": -1.0}, "mixup"),
        ({"warm_start": True, "reparam": "dirac"}, "nor with reparam"),
        ({"method": "jointrd", "warm_start": True, "teacher_mode": "joint"}, "neither with teacher_mode=joint"),
        ({"method": "kd", "teacher_mode": "joint"}, "neither with method=kd"),
        ({"method": "jointrd", "teacher_weights": "x.pt", "teacher_mode": "joint"}, "nor with teacher_weights"),
        ({"start_weights": "x.pt"}, "method=rd with start_weights needs a teacher that knows these classes"),
        ({"start_weights": "x.pt", "method": "kd", "warm_start": True}, "two different starts"),
        ({"workers": -1}, "workers"),
        ({"max_corrupt": -1}, "max_corrupt"),
        ({"clip_norm": "much"}, "clip_norm=much is not a number"),
        ({"epochs": "three"}, "epochs=three is not a whole number"),
        ({"epochs": 3.5}, "not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"lr": 10**400}, "lr is a number of more than 63 bits"),
        ({"epochs": -(10**5000)}, "epochs is a number of more than 63 bits"),
        ({"method": "kd", "kd_weight": 0.0}, "distils nothing; give a kd_weight"),
        ({"momentum": None}, "momentum=None is not a number"),
        ({"method": None}, "method=None is not one of ce, kd, jointrd, rd"),
        ({"data": None}, "data=None is not a text"),
    ],
)
def test_senseless_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Recipe(**values)


def test_what_is_not_given_is_the_methods_own():
    ours, theirs = Recipe(), Recipe(method="jointrd")
    assert (ours.method, ours.teacher_bn, ours.clip_norm) == ("rd", "batch", 1.0)
    assert (ours.splice_weight_end, theirs.splice_weight_end) == (0.0, 0.5)
    assert (ours.optimizer, theirs.optimizer) == ("muon", "sgd")
    assert (theirs.teacher_bn, theirs.clip_norm) == ("eval", 0.0)
    assert (
        Recipe(clip_norm=0, kd_weight=1, teacher_bn="eval").to_dict().items()
        >= {
            "clip_norm": 0.0,
            "kd_weight": 1.0,
            "teacher_bn": "eval",
        }.items()
    )


@pytest.mark.parametrize(
    ("values", "weight", "start", "probability"),
    [
        ({}, 0.5, 0.5, 0.6),
        ({"arch": "plain34", "optimizer": "sgd", "init": "kaiming"}, 0.5, 0.5, 0.6),
        ({"arch": "plain44"}, 0.0, 0.5, 0.6),
        ({"arch": "plain56", "kd_weight": 0.9}, 0.9, 0.5, 0.6),
        ({"kd_weight": 0.0}, 0.0, 0.5, 0.6),
        ({"kd_start": 0.2, "kd_probability": 1.0}, 0.5, 0.2, 1.0),
        ({"method": "kd"}, 0.5, 0.0, 1.0),
        ({"method": "kd", "arch": "plain56"}, 0.5, 0.0, 1.0),
    ],
)
def test_rd_distils_logits_of_short_chains_in_part_of_the_steps_and_kd_of_all_in_all(
    values, weight, start, probability
):
    recipe = Recipe(**values)
    assert (recipe.kd_weight, recipe.kd_start, recipe.kd_probability) == (weight, start, probability)
    assert recipe.unused() == []


@pytest.mark.parametrize(
    ("data", "usual"),
    [
        ("digits", (1, False, 1.0)),
        ("fashion-mnist", (2, True, 1.0)),
        ("idx", (2, False, 1.0)),
        ("npz", (2, False, 1.0)),
        ("cifar10", (4, True, 1.0)),
        ("cifar100", (4, True, 1.0)),
        *((name, (0, True, 0.08)) for name in ("folder", "webdataset", "mit67", "caltech101")),
    ],
)
def test_images_are_varied_as_is_usual_for_the_data(data, usual):
    """By hand, from the table in docs/training-reference.md."""
    recipe = Recipe(data=data)
    assert (recipe.crop_padding, recipe.flip, recipe.smallest_crop) == usual
    assert Recipe(data=data, flip=not usual[1], crop_padding=0).to_dict().items() >= {
        "flip": not usual[1], "crop_padding": 0, "smallest_crop": usual[2],
    }.items()  # fmt: skip
    assert set(BY_DATA) == {*READERS, *ENCODED}


def test_options_without_effect_are_named():
    assert Recipe(init="dirac").unused() == []
    assert all(Recipe(method=method).unused() == [] for method in ("ce", "kd", "jointrd", "rd"))
    assert Recipe(method="ce", splice_window=0.3, kd_weight=0.9).unused() == ["splice_window", "kd_weight"]
    assert Recipe(method="jointrd", init="kaiming", init_noise=0.2).unused() == ["init_noise"]
    assert Recipe(method="jointrd", teacher_mode="joint", teacher_epochs=3).unused() == ["teacher_epochs"]
    assert Recipe(splice_weight=0.0).unused() == []
    assert Recipe(splice_weight=0.0, splice_weight_end=0.5).unused() == ["splice_weight_end"]
    assert Recipe(method="kd", audit=True, splice_probability=0.1).unused() == ["splice_probability", "audit"]
    assert Recipe(method="ce", warm_start=True, warm_start_window=0.3).unused() == ["warm_start", "warm_start_window"]
    assert Recipe(method="rd", splice_weight_end=0.1, feature_weight=0.5).unused() == ["feature_weight"]
    assert Recipe(warm_start=True, init="kaiming").unused() == ["init"]
    options = {"init": "dirac", "reparam": "dirac"}
    assert Recipe(arch="resnet20", **options).unused() == list(options)
    assert Recipe(arch="resnet20", shortcuts="none", **options).unused() == []
    assert Recipe(splices="all", splice_probability=0.5).unused() == ["splice_probability"]
    assert Recipe(splice_probability=0.5).unused() == []
    assert Recipe(method="jointrd", splices="all").unused() == ["splices"]
    assert Recipe(resize_window=0.2).unused() == ["resize_window"]
    assert Recipe(muon_lr=0.01, kd_weight=0.5, kd_start=0.5, kd_probability=0.1).unused() == []
    assert Recipe(method="ce", optimizer="muon", muon_lr=0.01).unused() == []
    assert Recipe(method="ce", muon_lr=0.01, muon_decay=0.0).unused() == ["muon_lr", "muon_decay"]
    without = ["kd_temperature", "kd_start", "kd_probability"]
    given = {"kd_temperature": 2.0, "kd_start": 0.3, "kd_probability": 0.1}
    assert Recipe(kd_weight=0.0, **given).unused() == Recipe(arch="plain56", **given).unused() == without
    assert Recipe(method="jointrd", **given).unused() == without
    assert Recipe(workers=2, max_corrupt=0, split_seed=1).unused() == ["split_seed", "workers", "max_corrupt"]
    assert Recipe(data="caltech101", workers=2, max_corrupt=0, split_seed=1).unused() == []
    assert Recipe(start_weights="x.pt", method="ce", init="kaiming", init_noise=0.2).unused() == ["init", "init_noise"]


@pytest.mark.parametrize(
    ("values", "noise"),
    [
        ({}, 0.1),
        ({"init": "dirac", "reparam": "identity"}, 0.1),
        ({"reparam": "dirac"}, 0.1),
        ({"reparam": "skip"}, 0.3),
        ({"reparam": "identity"}, 0.3),
        ({"reparam": "branches"}, 0.3),
        ({"reparam": "branches", "init_noise": 0.2}, 0.2),
        ({"init": "kaiming", "reparam": "identity"}, 0.1),
        ({"start_weights": "x.pt", "method": "ce"}, 0.1),
    ],
)
def test_the_noise_goes_by_what_it_is_added_to(values, noise):
    recipe = Recipe(**values)
    assert recipe.init_noise == noise
    assert "init_noise" not in recipe.unused()
    assert replace(recipe) == recipe


@pytest.mark.parametrize(
    ("values", "reparam", "noise"),
    [
        ({"arch": "plain34"}, "none", 0.1),
        ({"arch": "plain44"}, "identity", 0.3),
        ({"arch": "plain50", "method": "ce", "optimizer": "muon"}, "identity", 0.3),
        ({"arch": "plain50", "method": "ce"}, "none", 0.1),
        ({"arch": "plain56", "method": "jointrd"}, "none", 0.1),
        ({"arch": "plain56", "optimizer": "sgd"}, "none", 0.1),
        ({"arch": "plain56", "reparam": "none"}, "none", 0.1),
        ({"arch": "plain56", "init_noise": 0.2}, "identity", 0.2),
        ({"arch": "plain56", "init": "kaiming"}, "none", 0.1),
        ({"arch": "plain56", "warm_start": True}, "none", 0.1),
        ({"arch": "plain56", "method": "ce", "optimizer": "muon", "start_weights": "x.pt"}, "none", 0.1),
        ({"arch": "resnet56"}, "none", 0.1),
        ({"arch": "resnet56", "shortcuts": "none"}, "identity", 0.3),
        ({"arch": "plain56", "shortcuts": "all"}, "none", 0.1),
        ({"arch": "no network"}, "none", 0.1),
    ],
)
def test_a_long_chain_that_starts_as_the_identity_keeps_it_in_branches(values, reparam, noise):
    recipe = Recipe(**values)
    assert (recipe.reparam, recipe.init_noise) == (reparam, noise)
    assert not {"reparam", "init_noise"} & {*recipe.unused()}
    assert replace(recipe) == recipe


def test_a_warm_start_without_effect_has_none_on_the_branches():
    recipe = Recipe(arch="plain56", method="ce", optimizer="muon", warm_start=True)
    assert recipe.reparam == "identity"
    assert recipe.unused() == ["warm_start"]


def test_a_warm_start_goes_with_branches_only_where_there_is_none():
    with pytest.raises(UserError, match="nor with reparam"):
        Recipe(warm_start=True, reparam="identity")
    assert Recipe(method="ce", warm_start=True, reparam="identity").unused() == ["warm_start"]
    assert Recipe(shortcuts="all", reparam="identity").unused() == ["reparam"]
