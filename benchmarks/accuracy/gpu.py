"""The table of accuracy at full width on a GPU: ResNet-18, 34, 50 and plain networks with a 3x3 stem, 32x32 images.

    python benchmarks/accuracy/gpu.py --data-dir FOLDER_OR_FILE.npz [--minutes 25] [--depths 18,34,50] [--list]
    python benchmarks/accuracy/gpu.py --dry        everything once, tiny, on the CPU

``--data-dir``: the folder of Fashion-MNIST's IDX files, or a file for `--data npz`. A row is a run of rd-train with its
recipe, tasks and checkpoints, so that rd-export takes its model.pt; it differs in that all images lie on the card as
bytes and are shifted, mirrored and normalised there. (So a run begun here goes on here: rd-train would go on too, but
with other draws of the augmentation.) Complete rows are skipped, interrupted ones go on, ``--minutes`` stops between
two steps, as Ctrl-C and SIGTERM do. A digest of the data names every run, so that ``--list`` reads them, too. ``--dry``
has bf16 autocast, as the CPU does it, and no torch.compile, which would take minutes: the first GPU tries that out. Not
run on a GPU yet: what follows is arithmetic.

A training step of ResNet-18 on a 32x32 image takes 1.66 G multiply-accumulates (`rd_train.cost`), so an epoch of 55,000
images 183 TFLOP: 0.74 s at a quarter of the 989 TFLOP/s that an H100 has in dense bf16. Its convolutions write 0.61 M
values an image, 1.2 MB in bf16; with BN and ReLU fused about ten passes over them in both directions are 12 MB an image
or 0.7 TB an epoch, 0.27 s at three quarters of 3.35 TB/s. Together 1.0 s an epoch; 214 steps of 256 images leave Python
5 ms each in it. 100 epochs: about 2 minutes by cross-entropy and by rd (1.3 times the arithmetic, with Muon's), plus
compiling for a minute. ResNet-50: 3.89 G, 428 TFLOP, 1.7 s and 1.5 s for wider maps: 5 to 6 minutes. ``--list`` says
the first part, from the count, for each run.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from experiments import DECIDE, EVERY, OURS_ALONE, Experiment
from runner import INTERRUPTED, Job, asked, check, parser_of, told_to_stop
from table import report, say, state
from torch import Tensor

import rd_train.plan
import rd_train.run
from rd_deploy.bench.environment import packages
from rd_deploy.common import Stopped, UserError, one_line, run_command, write_json
from rd_train.build import meta_task, student_arch
from rd_train.context import stop_on_signals
from rd_train.cost import mean_step_macs, update_macs
from rd_train.data import Dataset, MemorySplit, load_dataset

PEAK, UTILISATION = 989e12, 0.25  # dense bf16 of an H100 SXM; the share that is expected of it
GPU = {"stem": "small", "batch_size": 256, "lr": 0.2, "warmup_epochs": 5.0, "threads": 8}
GPU |= {"device": "cuda", "precision": "bf16", "compile": True}
DRY = {"stem": "small", "width": 1 / 16, "batch_size": 64, "size": 8, "warmup_epochs": 0.2, "threads": 2}
DRY |= {"device": "cpu", "precision": "bf16", "data": "digits"}


@dataclass(frozen=True)
class DeviceSplit(MemorySplit):
    """A split whose images lie framed on a device, uint8 (N, C, H + 2p, W + 2p), p the padding of the augmentation."""

    framed: Tensor
    moments: Tensor  # mean and deviation of each channel, (2, C, 1, 1), there, too

    @classmethod
    def of(cls, split: MemorySplit, device: torch.device) -> "DeviceSplit":
        """The split's images on a device."""
        pad = split.augment.crop_padding
        framed = np.pad(split.preprocessing.frame(split.pixels), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        images = torch.from_numpy(framed).permute(0, 3, 1, 2).contiguous().to(device)
        record = split.preprocessing
        moments = torch.tensor([record.mean, record.std], device=device)[:, :, None, None]
        return cls(split.pixels, split.labels, record, split.augment, images, moments)

    def images(self, indices: Tensor) -> Tensor:
        centre = torch.full((len(indices),), self.augment.crop_padding, device=self.framed.device)
        return self._cut(indices, centre, centre, None)

    def augmented(self, indices: Tensor, seed: int, part: slice = slice(None)) -> Tensor:
        """Shifted and mirrored as `shift_and_flip` does it, with draws of the device's own."""
        generator = torch.Generator(self.framed.device).manual_seed(seed)
        draw = {"generator": generator, "device": self.framed.device}
        top, left = torch.randint(2 * self.augment.crop_padding + 1, (2, len(indices)), **draw)
        mirrored = torch.rand(len(indices), **draw) < 0.5 if self.augment.flip else None
        return self._cut(indices[part], top[part], left[part], None if mirrored is None else mirrored[part])

    def _cut(self, indices: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None) -> Tensor:
        """float32 (B, C, size, size): a window of each image, mirrored or not, normalised."""
        size, device = self.preprocessing.size, self.framed.device
        pixel, channels = torch.arange(size, device=device), torch.arange(self.framed.shape[1], device=device)
        columns = pixel.expand(len(indices), size)
        if mirrored is not None:
            columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
        rows, columns = top[:, None] + pixel, left[:, None] + columns
        pinned = indices.pin_memory() if device.type == "cuda" else indices  # so that nothing waits for the device
        number = pinned.to(device, non_blocking=True)[:, None, None, None]
        cut = self.framed[number, channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
        mean, std = self.moments
        return (cut.float() / 255 - mean) / std


@contextlib.contextmanager
def _in_runs(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Runs of rd_train in this process have ``value`` under a name of one of its modules."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def data_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Runs of rd_train in this process find their data on a device."""

    def load(*arguments: object, **options: object) -> Dataset:
        dataset = load_dataset(*arguments, **options)
        if not isinstance(dataset.train, MemorySplit):
            raise UserError(f"data set {dataset.name} is not held in memory; give Fashion-MNIST or an npz file")
        parts = {part: DeviceSplit.of(getattr(dataset, part), device) for part in ("train", "val", "test")}
        return replace(dataset, **parts)

    return _in_runs(rd_train.plan, "load_dataset", load)


def stops_kept(told: list[int]) -> contextlib.AbstractContextManager[None]:
    """Runs of rd_train in this process stop if they were told to before they listen; ``told`` also has what came later.

    A run listens from the end of its planning to its own end, but looks only between two steps: without this it would
    train to its end after a stop in its planning, and the next one after a stop in its test.
    """

    @contextlib.contextmanager
    def listen() -> Iterator[threading.Event]:
        stop = threading.Event()
        try:
            with stop_on_signals() as stop:
                if told:
                    stop.set()
                yield stop
        finally:  # by now signals go to ``told`` again: none falls between
            if stop.is_set():
                told.append(signal.SIGTERM)

    return _in_runs(rd_train.run, "stop_on_signals", listen)


def digest_of_images(dataset: Dataset) -> str:
    """The first digits of a SHA-256 over all images and labels of a data set that is held in memory."""
    found = hashlib.sha256()
    for split in (dataset.train, dataset.val, dataset.test):
        found.update(f"{split.pixels.shape}".encode())
        found.update(np.ascontiguousarray(split.pixels))
        found.update(split.labels.numpy())
    return found.hexdigest()[:8]


def experiment_of(options: argparse.Namespace) -> Experiment:
    """What the options ask for; data that cannot be read are a `UserError`."""
    if options.dry:
        return Experiment("a dry run", DECIDE, (18,), 1, 256, DRY, "-dry", (0, 1))
    path = options.data_dir
    npz = path is not None and path.suffix == ".npz"
    name, label = ("npz", path.name) if npz else ("fashion-mnist", "Fashion-MNIST")
    settings = GPU | {"data": name, "compile": options.compile} | ({"data_dir": str(path)} if path else {})
    # Any IDX files may lie under Fashion-MNIST's names: without a digest the runs on others would count as those on it.
    digest = digest_of_images(load_dataset(name, path))
    what = f"{label} ({digest}) at 32x32, {options.images:,} training images, full width, 3x3 stem, batches of 256"
    tag = f"-small-b256{f'-{path.stem}' if npz else ''}-{digest}{'' if options.compile else '-eager'}"
    return Experiment(what, (*EVERY, OURS_ALONE), options.depths, options.epochs, options.images, settings, tag)


def expected_seconds(job: Job) -> float:
    """The arithmetic of a run at `UTILISATION` of `PEAK`; maps, compiling and evaluation come besides."""
    recipe = job.recipe()
    task = meta_task(recipe, student_arch(recipe, 1, 10))
    macs = mean_step_macs(task, recipe.size) + update_macs(recipe, task)
    return 2 * macs * recipe.train_limit * recipe.epochs / (PEAK * UTILISATION)


def train(job: Job) -> None:
    """One run, from where it stands; raises `Stopped` where it was told to or where its loss is NaN."""
    job.check_folder()
    recipe = rd_train.plan.settle(job.recipe())
    if (lock := job.lock()) is None:
        raise UserError("another process trains it")
    try:
        if job.complete():  # by another process meanwhile
            return
        job.record_start()
        rd_train.run.run(recipe, job.folder, resume=job.begun(), overwrite=True)
    finally:
        lock.close()
        torch.compiler.reset()  # the next network is another one: nothing of this one must count as its recompilation


def train_all(jobs: list[Job], minutes: float | None, finished) -> dict[Path, str]:
    """Train what is not complete, in this order; a run that fails costs itself and its students only.

    ``finished`` is called after each run that ended. Returns, by folder, why a run without a result has none.
    """
    missing = {job.folder: INTERRUPTED if job.begun() else "not begun" for job in jobs if job.result() is None}
    with told_to_stop() as told, stops_kept(told), _stopped_after(minutes):
        for job in [job for job in jobs if job.folder in missing]:
            if told:
                break
            if job.teacher and not (job.teacher / "result.json").exists():
                missing[job.folder] = f"its teacher {job.teacher.name} has no result"
                continue
            try:
                train(job)
                del missing[job.folder]
            except Stopped as stop:
                missing[job.folder] = INTERRUPTED if stop.code == 130 else one_line(stop)
                if stop.code == 130:
                    break
            except (UserError, MemoryError, torch.OutOfMemoryError) as error:
                missing[job.folder] = one_line(error)[:200] or "not enough memory"
            if job.folder in missing:
                print(f"{job.name}, seed {job.seed}: {missing[job.folder]}", flush=True)
            finished(missing)
    return missing


@contextlib.contextmanager
def _stopped_after(minutes: float | None) -> Iterator[None]:
    """SIGTERM to this process when the time is over; never after, when nobody may listen any more."""
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be about to send it


def without_places(argument: str) -> str:
    """An argument of the command line as it is committed: of a path outside the checkout its last part."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if value.startswith(("/", "~", "..")) else argument


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, "runs/gpu", "runs/accuracy-gpu.json", several=False)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--depths", type=lambda text: tuple(map(int, text.split(","))), default=(18, 34, 50))
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), help="those to train")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--images", type=int, default=55_000, help="training images")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next call goes on")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--dry", action="store_true", help="everything once, tiny, on the CPU")
    parser.add_argument("--list", action="store_true", help="say what would run and what is there, and stop")
    return parser


def command() -> int:
    """Train what is missing and write the JSON; exit code 1 while a run that was asked for is missing."""
    parser = _parser()
    options = parser.parse_args()
    if options.dry:
        options.epochs = None
    experiment = experiment_of(options)
    jobs = experiment.jobs(experiment.seeds, options.out)
    check(parser, options, {job.name for job in jobs}, set(experiment.seeds))
    wanted = asked(jobs, options, options.seeds or experiment.seeds)
    if options.list:
        print("\n".join(f"{state(job):10} {expected_seconds(job):6.0f} s {job.folder}" for job in wanted))
        return 0
    device = torch.device("cpu" if options.dry else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; --dry tries everything on the CPU")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU, a dry run"
    about = {"card": card, "cuda": torch.version.cuda, "packages": packages()}
    about["command"] = " ".join(["python", "benchmarks/accuracy/gpu.py", *map(without_places, sys.argv[1:])])

    def write(missing: dict[Path, str]) -> dict:
        found = report("gpu", experiment, jobs, missing, options) | about
        write_json(options.results, found)
        return found

    started = time.monotonic()
    with data_on(device):
        found = write(train_all(wanted, options.minutes, write))
    say(found)
    print(f"{time.monotonic() - started:.0f} s; wrote {options.results}{'' if found['complete'] else ', incomplete'}")
    return int(any(job.result() is None for job in wanted))


if __name__ == "__main__":
    sys.exit(run_command("gpu", command))
