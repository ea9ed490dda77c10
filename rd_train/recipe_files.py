"""Recipes as YAML files: presets, which name what differs from the defaults, and those of runs, which name all."""

from dataclasses import fields
from importlib import resources
from pathlib import Path

import yaml

from rd_deploy.common import UserError, check_file, nearest
from rd_train.recipe import Recipe

PRESETS = resources.files("rd_train") / "recipes"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset_values(name: str) -> dict:
    """The entries of a preset, or of a recipe file if ``name`` ends in .yaml; names are checked, values are not yet."""
    if name.endswith((".yaml", ".yml")):
        return read_values(name)
    if name not in preset_names():
        raise UserError(
            f"unknown preset '{name}'{nearest(name, preset_names())}; or give a recipe file ending in .yaml"
        )
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def read_values(path: str | Path) -> dict:
    """The entries of a recipe file; anything but a mapping of known names to scalars is a `UserError`."""
    path = check_file(path, "recipe", max_bytes=1 << 16)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML's constructors let others through: IndexError of !!int "", KeyError of !!bool x
        raise UserError(f"recipe {path} is not YAML ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of names to values")
    known = {field.name for field in fields(Recipe)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"recipe {path}: unknown entry '{name}'{nearest(str(name), known)}")
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(f"recipe {path}: {name} must be a single value")
    return values


def dump_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, in the order of its definition; read back by `read_values`."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)
