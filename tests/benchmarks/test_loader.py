"""The benchmark of loading: both sides get the same images, and what it finds is written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import loader

from rd_deploy.common import UserError
from rd_train.data import load_dataset


@pytest.fixture
def small(monkeypatch):
    for name, value in {"WIDTH": 60, "HEIGHT": 45, "BATCH": 4}.items():
        monkeypatch.setattr(loader, name, value)


def test_photographs_are_as_rough_as_photographs():
    image = np.asarray(loader.photograph(np.random.default_rng(0)).convert("L"), np.float64)
    power = np.abs(np.fft.fft2(image - image.mean()))[1 : loader.HEIGHT // 4, 0] ** 2
    slope = np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0]
    assert slope == pytest.approx(-2, abs=0.5)


@pytest.mark.parametrize("decoder", loader.DECODERS)
def test_both_give_batches_of_the_same_kind(tmp_path, small, decoder):
    loader.write_folders(tmp_path, 9)
    dataset = load_dataset("folder", tmp_path)
    assert loader.ours(dataset)() == loader.theirs(tmp_path, 0, decoder)() == 8
    loader.write_folders(tmp_path / "more", 13)
    with pytest.raises(UserError, match="different numbers of images"):  # which cannot be compared
        loader.measure(tmp_path / "more", dataset, 0, decoder, 0.0)


def test_what_was_measured_is_written(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loader.py", f"--results={tmp_path / 'x.json'}", "--images=8", "--workers=1"])
    monkeypatch.setattr(loader, "measure", lambda *arguments: {"decoder": arguments[3]})
    threads = torch.get_num_threads()
    assert loader.command() == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["decoder"] for row in found["results"]] == ["Pillow", "torchvision.io"]
    assert (found["images"], found["workers"]) == (8, 1)
    assert found["environment"]["cpu"]["model"]
