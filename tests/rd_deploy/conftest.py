"""What the tests of ``rd-export`` share."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def rd_export(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder: (exit code, stdout, stderr)."""
    from rd_deploy import cli_export

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rd-export", *map(str, arguments)])
        code = cli_export.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def digits():
    """The checkpoint of an untrained network that knows the digits' classes and preprocessing."""
    from rd_deploy.random_weights import random_network
    from rd_train.checkpoint import Checkpoint
    from rd_train.data import load_dataset
    from rd_train.networks import parse_arch

    dataset = load_dataset("digits")
    arch = parse_arch("plain20", width=0.25, in_channels=1, classes=10)
    state = random_network(arch, dataset.preprocessing.size).state_dict()
    recipe = {"data": "digits", "data_dir": None, "size": None}
    return Checkpoint(arch, state, dataset.preprocessing, dataset.classes, recipe, {"epoch": 3})


@pytest.fixture
def model(tmp_path, digits) -> Path:
    """That checkpoint in a file, alone in its folder."""
    from rd_train.checkpoint import save_checkpoint

    path = tmp_path / "run" / "model.pt"
    path.parent.mkdir()
    save_checkpoint(path, digits)
    return path
