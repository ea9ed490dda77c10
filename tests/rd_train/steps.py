"""Training steps that tests look at."""

import threading
from pathlib import Path

import torch

from rd_train.context import Context
from rd_train.data import batches, load_dataset
from rd_train.distill import CrossEntropy
from rd_train.loop import Stepper
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe


def stepped(recipe: Recipe, folder: Path) -> Stepper:
    """A small plain network that has taken the first step of eight, on digits, by cross-entropy in batches of 50."""
    dataset = load_dataset("digits", limit=200)
    images, labels = next(batches(dataset.train, 50, seed=0, epoch=0))
    network = Network(parse_arch("plain20", width=0.25, in_channels=1, classes=10))
    context = Context(recipe, dataset, folder, torch.device("cpu"), threading.Event())
    take = Stepper(CrossEntropy(network).train(), 2, context)
    take(0, images, labels)
    return take
