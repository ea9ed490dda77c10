"""What a network makes of a split: predictions, accuracy, and the statistics that it is evaluated with."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rd_train import distributed
from rd_train.context import Context
from rd_train.data import Split, evaluation_batches, fixed_sample
from rd_train.networks import Network
from rd_train.recipe import Recipe


def evaluation_size(recipe: Recipe) -> int:
    """Images of a batch that is evaluated: it holds no gradients."""
    return min(500, 2 * recipe.batch_size)


def statistics_size(recipe: Recipe) -> int:
    """Images of a batch by which BN statistics are set: of several processes, each makes all of it."""
    return min(recipe.batch_size, 128)


@dataclass(frozen=True)
class Predictions:
    """What a network made of the images of a split, in the split's order, on the CPU.

    ``indices``: which images, int64 (N,); ``labels`` and ``predicted``: int64 (N,); ``confidence`` and ``truth``:
    probabilities of the predicted and of the true class, float32 (N,); ``loss``: mean cross-entropy.
    """

    indices: Tensor
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    truth: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return int((self.predicted == self.labels).sum()) / len(self.labels)

    @property
    def mean_class_accuracy(self) -> float:
        """The mean of the accuracies of the classes that have images, in [0, 1]: what transfer sets are measured by."""
        images = torch.bincount(self.labels)
        right = torch.bincount(self.labels[self.predicted == self.labels], minlength=len(images))
        return float((right[images > 0].double() / images[images > 0]).mean())


def joined(parts: list[Predictions]) -> Predictions:
    """Of several splits, as if they were one; ``indices`` are those of each."""
    counts = [len(part.labels) for part in parts]
    tensors = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("indices", "labels", "predicted", "confidence", "truth")
    ]
    return Predictions(
        *tensors, sum(part.loss * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    )


@torch.no_grad()
def predict(network: Network, split: Split, context: Context) -> Predictions:
    """Run a network over a whole split but for its corrupt images, once.

    Processes share the images among them; each gets all predictions.
    """
    network.eval()
    loss, found = 0.0, torch.zeros((len(split), 4), dtype=torch.float64)  # looked at, predicted, confidence, truth
    for images, indices in evaluation_batches(split, evaluation_size(context.recipe), **distributed.share()):
        if not len(indices):
            continue
        labels = split.labels[indices].to(context.device)
        with context.cast():
            logits = network(context.place(images))
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        probabilities, predicted = logits.float().softmax(1), logits.argmax(1)
        both = probabilities.gather(1, torch.stack([predicted, labels], 1))
        columns = torch.ones_like(predicted), predicted, *both.unbind(1)
        found[indices] = torch.stack([column.double() for column in columns], 1).cpu()
    [loss] = distributed.totals([loss])
    found = distributed.total(found)
    indices = found[:, 0].nonzero().flatten()
    _, predicted, confidence, truth = found[indices].unbind(1)
    labels = split.labels[indices]
    return Predictions(indices, labels, predicted.long(), confidence.float(), truth.float(), loss / len(indices))


def evaluate(network: Network, split: Split, context: Context) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy of a network on a whole split."""
    seen = predict(network, split, context)
    return seen.accuracy, seen.loss


@torch.no_grad()
def recalibrated(network: Network, context: Context) -> Network:
    """A copy whose BN statistics are the means over batches of ``recipe.recalibrate`` training images, unvaried.

    Those that training leaves behind lag behind the weights, and are those of augmented or mixed images. The images are
    always the same. Without ``recalibrate``, the network itself.
    """
    recipe, split = context.recipe, context.dataset.train
    if not recipe.recalibrate:
        return network
    network = copy.deepcopy(network).eval()
    for bn in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
        bn.reset_running_stats()
        bn.momentum, bn.training = None, True  # None: the mean of all batches
    chosen = fixed_sample(split, max(2, recipe.recalibrate))
    # Of sizes as equal as can be, since all batches weigh the same in the mean; none of a single image.
    count = min(math.ceil(len(chosen) / statistics_size(recipe)), len(chosen) // 2)
    for indices in chosen.tensor_split(count):
        with context.cast():
            network(context.place(split.images(indices)))
    for bn in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
        bn.momentum = 0.1
    return network.eval()
