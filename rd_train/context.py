"""What every part of a run shares: recipe, data, folder, device, and whether it is to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rd_train import bf16, distributed
from rd_train.checkpoint import Checkpoint
from rd_train.data import Dataset, batches
from rd_train.live import View
from rd_train.networks import Network, deployed_state
from rd_train.recipe import Recipe


@dataclass
class Context:
    """What every phase of a run shares."""

    recipe: Recipe
    dataset: Dataset
    folder: Path
    device: torch.device
    stop: threading.Event
    writer: object | None = None  # TensorBoard's SummaryWriter
    view: View = field(default_factory=View)

    def place(self, what: nn.Module | Tensor) -> nn.Module | Tensor:
        """Images or a network on the device, in the memory format; a network before a task aliases it.

        With ``sync_bn``, its BN are those of all processes together. Nothing waits for images of `batches`.
        """
        if self.recipe.sync_bn and isinstance(what, nn.Module):
            distributed.synchronise_bn(what)
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return what.to(self.device, memory_format=layout, non_blocking=True)

    def batches(self, epoch: int, **options) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's training batches of an epoch (from 0), with ``options`` of `rd_train.data.batches`."""
        recipe, pinned = self.recipe, self.device.type == "cuda"
        order = {"seed": recipe.seed, "epoch": epoch}
        return batches(self.dataset.train, recipe.batch_size, pinned=pinned, **order, **distributed.share(), **options)

    def cast(self) -> contextlib.AbstractContextManager:
        """bf16 where the recipe says so; the precision ``auto`` must have been settled before."""
        enabled = self.recipe.precision in ("bf16", bf16.EMULATED)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between two steps; a second Ctrl-C stops at once."""
    event = threading.Event()

    def handler(number: int, frame: object) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def student_checkpoint(network: Network, context: Context, best: dict) -> Checkpoint:
    """A network of the run as it is kept."""
    dataset, recipe = context.dataset, context.recipe.to_dict()
    return Checkpoint(
        network.arch, deployed_state(network), dataset.preprocessing, dataset.classes, recipe, provenance=dict(best)
    )
