"""How fast an epoch is, on a stand-in for a GPU."""

import pytest
import torch

from rd_train.clock import Clock
from rd_train.data import Meter


def test_on_a_gpu_steps_are_timed_by_its_own_clock(monkeypatch):
    """Python is two steps ahead of a GPU that takes 40 ms for a step."""
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.number = len(recorded)
            recorded.append(self)

        def query(self) -> bool:
            return self.number < len(recorded) - 4

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return 40.0 * (other.number - self.number)

    monkeypatch.setattr("torch.cuda.Event", Event)
    meter = Meter()
    clock = Clock(0.0, meter, torch.device("cuda"))
    for _ in range(10):
        clock.begin_step()
        clock.end_step(32)
    assert len(clock.running) == 2  # the others were added up on the way
    assert clock.speeds()["model_images_per_second"] == pytest.approx(32 / 0.04)
