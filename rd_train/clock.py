"""The clock of an epoch: how fast it is, its loader alone and its steps alone."""

import time
from collections import deque

import torch

from rd_train import distributed
from rd_train.data import Meter


class Clock:
    """Seconds of a phase over its interruptions; images per second of the epoch, of its loader and of its steps.

    Images are those of all processes. Copying a step's images to a GPU is part of the step.
    """

    def __init__(self, before: float, meter: Meter, device: torch.device):
        self.before, self.started, self.images = before, time.monotonic(), 0
        self.meter, self.cuda = meter, device.type == "cuda"
        self.stepped = 0.0  # seconds of finished steps
        self.begun: float | torch.cuda.Event | None = None
        self.running: deque[tuple] = deque()  # CUDA events around steps that may not be finished yet

    def begin_step(self) -> None:
        """When a batch has come. A GPU works behind the Python code, so its own clock is read."""
        self.begun = self._now()

    def end_step(self, images: int) -> None:
        self.images += images
        if not self.cuda:
            self.stepped += time.monotonic() - self.begun
            return
        self.running.append((self.begun, self._now()))
        while self.running and self.running[0][1].query():
            self._finish_step()

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish_step(self) -> None:
        begun, ended = self.running.popleft()
        ended.synchronize()
        self.stepped += begun.elapsed_time(ended) / 1000

    def speeds(self) -> dict[str, float]:
        """Images per second of the epoch, that the loader could have made, and that the steps alone could have."""
        while self.running:
            self._finish_step()
        return {
            "images_per_second": self.rate(),
            "loader_images_per_second": self.meter.rate() * distributed.world(),
            "model_images_per_second": self.images / max(1e-9, self.stepped),
        }

    def total(self) -> float:
        return self.before + time.monotonic() - self.started

    def rate(self) -> float:
        return self.images / max(1e-9, time.monotonic() - self.started)
