"""What a phase of training needs to go on, in one file."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train import distributed
from rd_train.checkpoint import load_plain, save_plain
from rd_train.context import Context

LARGEST = 1 << 40  # bytes of a state: the run itself wrote it, however large its networks are


class State:
    """Everything a phase needs to go on: tensors, step, running sums, best epoch, seconds."""

    def __init__(self, context: Context, phase: str, task: nn.Module, optimizer, averaged: AveragedModel | None):
        self.path = context.folder / f"{phase}-state.pt"
        self.task, self.optimizer, self.averaged = task, optimizer, averaged
        self.step, self.seconds, self.images = 0, 0.0, context.dataset.counts
        self.preprocessing = context.dataset.preprocessing
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.counts: dict[str, int] = defaultdict(int)  # of steps; not every kind of step has every term
        self.best: dict = {"epoch": 0, "val_accuracy": -1.0, "val_loss": math.inf}

    def add(self, result: dict, labels: Tensor) -> None:
        """Add a step to the running sums of the epoch (on the device: nothing waits)."""
        entries = {"loss": result["loss"].detach(), **result["terms"]}
        entries["train_accuracy"] = (result["output"].detach().argmax(1) == labels).float().mean()
        for name, value in entries.items():
            self.sums[name] = self.sums[name].to(value.device) + value.double()
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        """Means of the epoch so far over all processes, of each term over the steps that had it."""
        distributed.average(self.sums.values())
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    def agree(self) -> None:
        """Make BN's running statistics those of all processes' images (their means); twice is as good as once.

        And trained weights: equal on equal hardware, on other those by Muon, whose sums are in bf16, drift apart.
        """
        modules = [module for module in (self.task, self.averaged) if module is not None]
        distributed.average(p for module in modules for p in module.parameters() if p.requires_grad)
        for module in modules:
            distributed.average_statistics(module)

    def improves(self, accuracy: float, loss: float) -> bool:
        """Higher validation accuracy; among equals the lower loss."""
        return (accuracy, -loss) > (self.best["val_accuracy"], -self.best["val_loss"])

    def save(self) -> None:
        """Write everything; processes go on when the first one has."""
        if distributed.first():
            save_plain(self.path, self.values())
        distributed.barrier()

    def values(self) -> dict:
        """What is saved: all but a frozen teacher, which the run's ``teacher.pt`` holds."""
        frozen = self._frozen()
        return {
            "task": {name: value for name, value in self.task.state_dict().items() if name not in frozen},
            "optimizer": self.optimizer.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "step": self.step,
            "images": list(self.images),
            "preprocessing": self.preprocessing.to_dict(),
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "best": self.best,
        }

    def _frozen(self) -> dict[str, Tensor]:
        """Of the task's state that of a teacher which does not learn."""
        learns = getattr(self.task, "train_teacher", True)
        state = {} if learns else self.task.state_dict()
        return {name: value for name, value in state.items() if name.startswith("teacher.")}

    def load(self, total: int) -> None:
        """Go on from the saved state, if there is one; a damaged one is a `UserError`."""
        if not self.path.exists():
            return
        values = _read(self.path)
        try:
            self.task.load_state_dict(values["task"] | self._frozen(), strict=True)
            self._load_optimizer(values["optimizer"])
            if self.averaged is not None:
                self.averaged.load_state_dict(values["averaged"], strict=True)
            self.step, self.seconds = int(values["step"]), float(values["seconds"])
            self.best = {name: type(self.best[name])(values["best"][name]) for name in self.best}
            self.sums.update({str(name): torch.as_tensor(value).double() for name, value in values["sums"].items()})
            self.counts.update({str(name): int(value) for name, value in values["counts"].items()})
            if set(self.counts) != set(self.sums) or min(self.counts.values(), default=1) < 1:
                raise ValueError("counts")
            if not 0 <= self.step <= total or any(value.ndim for value in self.sums.values()):
                raise ValueError("step or sums")
        except Exception as error:  # a hostile file can hold anything
            raise UserError(f"training state {self.path} does not fit its recipe; start a new run") from error

    def _load_optimizer(self, state: dict) -> None:
        """Take the momenta; what else the file says of a group (its learning rate, say) is the recipe's business."""
        groups = self.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self.optimizer.load_state_dict(state)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        for parameter, values in self.optimizer.state.items():
            if any(torch.is_tensor(value) and value.shape != parameter.shape for value in values.values()):
                raise ValueError("momentum")


def _read(path: Path) -> object:
    return load_plain(path, "training state", LARGEST)


def saved_preprocessing(folder: Path) -> Preprocessing | None:
    """That of the images of the student whose state is in ``folder``; None without one, or where it lacks that."""
    path = folder / "student-state.pt"
    values = _read(path) if path.exists() else None
    if not isinstance(values, dict) or "preprocessing" not in values:  # earlier versions lack it
        return None
    return Preprocessing.from_dict(values["preprocessing"])


def check_images(folder: Path, counts: tuple[int, ...]) -> None:
    """Refuse to go on in ``folder`` with data of other numbers of images (training, validation, test) than it had."""
    for path in sorted(folder.glob("*-state.pt")):
        values = _read(path)
        found = values.get("images", list(counts)) if isinstance(values, dict) else None  # earlier versions lack it
        found = [found, *counts[1:]] if type(found) is int else found  # or have that of training only
        if not isinstance(found, list) or [type(count) for count in found] != [int] * len(counts):
            raise UserError(f"training state {path} does not fit its recipe; start a new run")
        if tuple(found) != counts:
            theirs, ours = (" + ".join(f"{count:,}" for count in each) for each in (found, counts))
            raise UserError(
                f"the run has {theirs} images (training, validation, test), the data that is there {ours}; "
                "give its own --data-dir"
            )
