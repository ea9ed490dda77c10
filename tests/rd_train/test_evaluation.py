"""Predictions of a whole split, and BN statistics recomputed for it."""

from dataclasses import replace

import pytest
import torch

from rd_train.context import Context
from rd_train.data import fixed_sample, load_dataset
from rd_train.evaluation import Predictions, evaluate, predict, recalibrated
from rd_train.networks import Network, parse_arch
from rd_train.recipe import Recipe

RECIPE = Recipe(method="ce", width=0.25, batch_size=50, precision="fp32", device="cpu", threads=1)


def test_predictions_are_those_of_the_network(tmp_path):
    dataset = load_dataset("digits")
    torch.manual_seed(0)
    network = Network(parse_arch("plain20", width=0.25, in_channels=1, classes=10))
    seen = predict(network, dataset.val, Context(RECIPE, dataset, tmp_path, torch.device("cpu"), None))
    with torch.no_grad():
        logits = network.eval()(dataset.val.images(torch.arange(len(dataset.val)))).double()
    assert torch.equal(seen.predicted, logits.argmax(1))
    assert torch.equal(seen.labels, dataset.val.labels)
    probabilities = torch.exp(logits - logits.logsumexp(1, keepdim=True))
    torch.testing.assert_close(seen.confidence.double(), probabilities.max(1).values, rtol=1e-4, atol=1e-6)
    truth = probabilities[torch.arange(len(logits)), dataset.val.labels]
    torch.testing.assert_close(seen.truth.double(), truth, rtol=1e-4, atol=1e-6)
    assert seen.loss == pytest.approx(-float(truth.log().mean()), rel=1e-4)


def test_recalibration_takes_the_statistics_of_clean_training_images(tmp_path):
    recipe = replace(RECIPE, recalibrate=100, mixup=1.0)
    dataset = load_dataset("digits", limit=100)
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), None)
    torch.manual_seed(0)
    network = Network(parse_arch("plain20", width=0.25, in_channels=1, classes=10), "dirac")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy = recalibrated(network, context)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    images = dataset.train.images(torch.arange(100))
    first = torch.nn.functional.conv2d(images, network.conv1.weight, padding=1)
    # Two batches of 50 in an order of their own: their mean is that of all images, their variances differ a little.
    torch.testing.assert_close(copy.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.bn1.running_var, first.var((0, 2, 3)), rtol=0.02, atol=1e-3)
    assert evaluate(copy, dataset.val, context)[0] >= 0
    assert recalibrated(network, replace_recipe(context, recalibrate=0)) is network


def test_all_recalibrated_batches_weigh_the_same(tmp_path):
    recipe = replace(RECIPE, recalibrate=52, batch_size=50)  # not 50 images and 2, of which each would count 25 times
    dataset = load_dataset("digits", limit=100)
    context = Context(recipe, dataset, tmp_path, torch.device("cpu"), None)
    torch.manual_seed(0)
    copy = recalibrated(Network(parse_arch("plain20", width=0.25, in_channels=1, classes=10), "dirac"), context)
    images = dataset.train.images(fixed_sample(dataset.train, 52))
    first = torch.nn.functional.conv2d(images, copy.conv1.weight, padding=1)
    torch.testing.assert_close(copy.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def replace_recipe(context: Context, **changes) -> Context:
    return replace(context, recipe=replace(context.recipe, **changes))


def test_the_mean_over_classes_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 3])  # of class 1 there is no image
    predicted = torch.tensor([0, 0, 0, 2, 2, 3, 0])
    some = torch.rand(7)
    seen = Predictions(torch.arange(7), labels, predicted, some, some, 0.5)
    assert seen.mean_class_accuracy == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert seen.mean_class_accuracy != pytest.approx(seen.accuracy)
