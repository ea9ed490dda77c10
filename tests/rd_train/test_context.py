"""What the parts of a run share."""

import threading
from itertools import islice

import pytest
import torch

from rd_train.context import Context
from rd_train.data import batches, load_dataset
from rd_train.recipe import Recipe


@pytest.mark.parametrize(("device", "pinned"), [("cpu", 0), ("cuda", 4)])
def test_training_batches_are_those_of_the_recipe_and_pinned_for_a_gpu(tmp_path, monkeypatch, device, pinned):
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: made.append(x) or x)  # which needs a GPU
    dataset = load_dataset("digits", limit=200)
    context = Context(Recipe(batch_size=50, seed=3), dataset, tmp_path, torch.device(device), threading.Event())
    found = list(context.batches(1, start=2))
    assert len(made) == pinned
    for ours, expected in zip(found, islice(batches(dataset.train, 50, seed=3, epoch=1), 2, None), strict=True):
        assert all(map(torch.equal, ours, expected))
