"""Presets and recipe files."""

import re
from dataclasses import fields

import pytest

from rd_deploy.common import UserError
from rd_train.cli import list_presets
from rd_train.networks import ARCH_NAMES
from rd_train.recipe import Recipe
from rd_train.recipe_files import dump_yaml, preset_names, preset_values, read_values


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole(name):
    values = preset_values(name)
    recipe = Recipe(**values)
    assert recipe.arch in ARCH_NAMES
    # One line each in --list, saying data, networks, epochs.
    assert len(recipe.summary) < 130
    assert f"{recipe.epochs} epochs" in recipe.summary


def test_list_names_every_preset_on_a_line_of_its_own():
    lines = list_presets().splitlines()
    assert [line.split()[0] for line in lines] == preset_names()


def test_a_saved_recipe_reads_back(tmp_path):
    recipe = Recipe(arch="plain56", lr=0.025, init="kaiming", size=32)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert Recipe(**read_values(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epocs: 3", "did you mean 'epochs'"),
        ("- 1\n- 2", "must be a mapping"),
        ("lr: [1, 2]", "single value"),
        ("lr: : :", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("arch: 2001-99-99", "not YAML"),
        ("seed: " + "9" * 5000, "not YAML"),
        ('lr: !!int ""', "not YAML"),
        ("compile: !!bool maybe", "not YAML"),
        ("", "is empty"),
        ("a" * 70_000, "bytes"),
    ],
)
def test_bad_recipe_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        preset_values(str(path))


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'fashion-plain56'"):
        preset_values("fashion-plain65")


def test_options_that_presets_name_exist():
    known = {field.name for field in fields(Recipe)}
    for name in preset_names():
        for option in re.findall(r"--([a-z-]+)", preset_values(name)["summary"]):
            assert option.replace("-", "_") in known
