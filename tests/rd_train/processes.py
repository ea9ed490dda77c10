"""Processes that tests train in: started by a fork server that has torch loaded, which saves seconds each time."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from rd_train.recipe import Recipe

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["rd_train.run", "sklearn.datasets", "pytest"])


def environment() -> dict[str, str]:
    """Today's, with this checkout among what Python imports from."""
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def flags(recipe: Recipe) -> list[str]:
    """Those of ``rd-train`` for this recipe."""
    values = {name: value for name, value in recipe.to_dict().items() if value not in (None, "")}
    return [f"--{name}={value}" for name, value in values.items() if value != getattr(Recipe, name)]


def started(
    function: Callable[..., int], out: Path, err: Path, *arguments: object, values: Mapping | None = None
) -> BaseProcess:
    """Run ``function(*arguments)``, which returns the exit code, in a process of one thread; returns the process.

    It writes its stdout and stderr to those files. ``values`` of the environment come besides today's: the fork server
    has kept those of its own start.
    """
    today = {**os.environ, **{name: str(value) for name, value in (values or {}).items()}}
    process = FORK.Process(target=_member, args=(out, err, today, function, arguments), daemon=True)
    process.start()
    return process


def _member(out: Path, err: Path, values: dict, function: Callable[..., int], arguments: tuple) -> None:
    os.environ.update(values)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def run_rd_train(*arguments: str) -> int:
    """The command, as a function for `started`."""
    from rd_train import cli

    sys.argv = ["rd-train", *arguments]
    return cli.main()
