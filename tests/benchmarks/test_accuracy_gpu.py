"""benchmarks/accuracy/gpu.py without a GPU: its data are rd_train's, its dry run reaches every part."""

import gzip
import importlib.util
import json
import signal
import struct
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import rd_train.plan
import rd_train.run
from rd_deploy.common import Stopped, UserError
from rd_train.augment import Augment
from rd_train.checkpoint import load_checkpoint
from rd_train.data import load_dataset
from rd_train.recipe_files import dump_yaml

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"
sys.path.append(str(FOLDER))  # as the script has it
# By its path: there is a package of that name, too.
spec = importlib.util.spec_from_file_location("accuracy_gpu", FOLDER / "gpu.py")
gpu = sys.modules["accuracy_gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    """A split of 8x8 digits padded to 11x11, shifted by up to 2 and mirrored; and the same on a device."""
    split = load_dataset("digits", size=11, augment=Augment(crop_padding=2, flip=True)).val
    return split, gpu.DeviceSplit.of(split, CPU)


def test_images_on_a_device_are_those_of_the_split(splits):
    host, device = splits
    indices = torch.tensor([3, 0, 179, 3])
    assert torch.allclose(device.images(indices), host.images(indices), atol=1e-6)
    assert torch.equal(device.labels, host.labels)
    assert len(device) == len(host) == 180


def test_augmentation_on_a_device_is_one_of_the_possible_ones(splits):
    host, device = splits
    frame = np.pad(host.preprocessing.frame(host.pixels[:1]), ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = [frame[:, top : top + 11, left : left + 11] for top, left in product(range(5), repeat=2)]
    windows += [window[:, :, ::-1] for window in windows]
    possible = torch.cat([torch.from_numpy(host.preprocessing.normalise(window)) for window in windows])
    found = device.augmented(torch.zeros(2000, dtype=torch.long), seed=5)
    distance = (found[:, None] - possible[None]).abs().amax(dim=(2, 3, 4))
    assert float(distance.amin(dim=1).max()) < 1e-6
    counts = torch.bincount(distance.argmin(dim=1), minlength=50)
    assert counts.min() > 15  # of 40 expected of each
    assert torch.equal(found, device.augmented(torch.zeros(2000, dtype=torch.long), seed=5))
    assert not torch.equal(found, device.augmented(torch.zeros(2000, dtype=torch.long), seed=6))


def test_each_image_has_its_own_window(splits):
    host, device = splits
    plain = gpu.DeviceSplit.of(replace(host, augment=Augment()), CPU)
    indices = torch.tensor([7, 9])
    assert torch.allclose(plain.augmented(indices, 1), host.images(indices), atol=1e-6)
    twice = device.augmented(torch.tensor([4] * 20), 1)
    assert len({image.numpy().tobytes() for image in twice}) > 5


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.command()


def test_dry_run(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    flags = ["--dry", "--out", tmp_path / "runs", "--results", tmp_path / "gpu.json"]
    flags += ["--only", "resnet18-dry-muon02,plain18-dry-rd-tuned"]
    assert call(monkeypatch, *flags) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert (found["complete"], found["card"], len(found["results"])) == (False, "no GPU, a dry run", 4)
    assert {each["precision"] for each in found["results"]} <= {"bf16", "bf16-emulated"}  # autocast, as on a GPU
    assert [row["name"] for row in found["rows"]] == ["resnet18-dry-muon02", "plain18-dry-rd-tuned"]
    checkpoint = load_checkpoint(tmp_path / "runs" / "plain18-dry-rd-tuned-n256-e1-s1" / "model.pt")
    assert (checkpoint.arch.name, checkpoint.preprocessing.size) == ("plain18", 8)
    monkeypatch.setattr(gpu, "train", lambda job: pytest.fail("nothing is left to train"))
    assert call(monkeypatch, *flags) == 0
    capsys.readouterr()
    assert call(monkeypatch, *flags, "--list") == 0
    assert capsys.readouterr().out.count("complete ") == 4


def jobs_of(out: Path) -> list:
    return gpu.Experiment("x", gpu.DECIDE, (18,), 1, 256, gpu.DRY, "-dry").jobs((0, 1), out)


def finish(job):
    job.folder.mkdir(parents=True)
    (job.folder / "recipe.yaml").write_text(dump_yaml(job.recipe()), encoding="utf-8")
    (job.folder / "metrics.jsonl").write_text('{"train_accuracy": 0.5}\n', encoding="utf-8")
    found = {"test_accuracy": 0.5, "val_accuracy": 0.5, "seconds": 1.0, "seed": job.seed, "precision": "bf16"}
    found |= {"step_cost": 1.0, "epochs": 1, "train_images": 256}
    (job.folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


def test_a_stop_leaves_the_rest_for_the_next_call(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path)

    def stopped(job):
        if job is jobs[1]:
            raise Stopped("stopped", code=130)
        finish(job)

    monkeypatch.setattr(gpu, "train", stopped)
    missing = gpu.train_all(jobs, None, lambda missing: None)
    assert list(missing.values()) == [gpu.INTERRUPTED] + ["not begun"] * 10
    monkeypatch.setattr(gpu, "train", finish)
    assert gpu.train_all(jobs, None, lambda missing: None) == {}


def test_the_time_limit_stops(tmp_path, monkeypatch):
    # Whoever listens hears it, but no signal is sent: one ended pytest's process now and then.
    monkeypatch.setattr(gpu.os, "kill", lambda process, number: signal.getsignal(number)(number, None))
    monkeypatch.setattr(gpu, "train", lambda job: finish(job) or gpu.time.sleep(0.3))
    missing = gpu.train_all(jobs_of(tmp_path), 0.001, lambda missing: None)
    assert len(missing) == 11


def test_the_time_limit_never_comes_when_nobody_listens(tmp_path, monkeypatch):
    """However slow its thread is: SIGTERM would end the process that has just finished."""
    listened = []

    def slow(number, sent):
        gpu.time.sleep(0.5)
        listened.append(callable(signal.getsignal(sent)))

    monkeypatch.setattr(gpu.os, "kill", slow)
    monkeypatch.setattr(gpu, "train", lambda job: finish(job) or gpu.time.sleep(0.1))
    assert gpu.train_all(jobs_of(tmp_path)[:1], 0.0005, lambda missing: None) == {}
    assert listened == [True]


def told(monkeypatch, module: ModuleType, name: str) -> None:
    """A SIGTERM comes whenever a run calls this function of a module."""
    function = getattr(module, name)

    def after_a_signal(*arguments):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # whoever listens hears it
        return function(*arguments)

    monkeypatch.setattr(module, name, after_a_signal)


@pytest.mark.parametrize(
    ("module", "moment", "left"),
    [
        (rd_train.plan, "print_plan", [gpu.INTERRUPTED, "not begun"]),
        (rd_train.run, "_finish", ["not begun"]),
    ],
)
def test_a_stop_while_a_run_does_not_look_is_not_lost(tmp_path, monkeypatch, module, moment, left):
    """In its planning, it stops after a step; in its test, it is complete and the next one is not begun."""
    threads, jobs = torch.get_num_threads(), jobs_of(tmp_path)
    told(monkeypatch, module, moment)
    monkeypatch.setattr(rd_train.run.report, "write", lambda *arguments: None)  # slow, and not what this is about
    missing = gpu.train_all([jobs[0], jobs[6]], None, lambda missing: None)
    torch.set_num_threads(threads)
    assert jobs[6].name == jobs[0].name
    assert list(missing.values()) == left


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Stopped("student: loss became NaN", code=1), "student: loss became NaN"),
        (UserError("torch.compile failed (no compiler)"), "torch.compile failed (no compiler)"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory. Tried"),
    ],
)
@pytest.mark.parametrize(
    ("teacher", "student"),
    [("resnet18-dry", "plain18-dry-jointrd-published"), ("resnet18-dry-muon02", "plain18-dry-rd-tuned")],
)
def test_a_run_that_fails_costs_its_own_row_and_its_students(
    tmp_path, monkeypatch, capsys, error, why, teacher, student
):
    def fails(job):
        if job.name == teacher and job.seed == 0:
            raise error
        finish(job)

    monkeypatch.setattr(gpu, "train", fails)
    flags = ["--dry", "--out", tmp_path / "runs", "--results", tmp_path / "gpu.json"]
    assert call(monkeypatch, *flags) == 1
    assert f"{teacher}, seed 0: {why}\n" in capsys.readouterr().out
    missing = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["missing"]
    assert missing[0] == {"name": teacher, "seed": 0, "why": why}
    folder = f"{teacher}-n256-e1-s0"
    students = [job.name for job in jobs_of(tmp_path) if job.teacher == tmp_path / folder]
    assert [each["name"] for each in missing[1:]] == students == [student]
    assert {each["why"] for each in missing[1:]} == {f"its teacher {folder} has no result"}


def test_what_a_run_that_fails_has_compiled_does_not_count_for_the_next(tmp_path, monkeypatch):
    forgotten = []
    monkeypatch.setattr(rd_train.run, "run", lambda *arguments, **options: pytest.fail("it fails"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    with pytest.raises(pytest.fail.Exception):
        gpu.train(jobs_of(tmp_path)[0])
    assert forgotten == [True]


def pixels(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(256, size=(count, 8, 8), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


def idx_folder(folder: Path, seed: int, *, pack=lambda data: data, end: str = "") -> Path:
    """Files under the names of Fashion-MNIST's."""
    folder.mkdir()
    for part, count in (("train", 240), ("t10k", 20)):
        images, labels = pixels(seed, count)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{kind}-ubyte{end}").write_bytes(pack(header + values.tobytes()))
    return folder


@pytest.fixture
def fashion(tmp_path) -> Path:
    return idx_folder(tmp_path / "fashion", 0)


def experiment(*flags):
    return gpu.experiment_of(gpu._parser().parse_args([str(flag) for flag in flags]))


def test_what_a_gpu_would_run_is_valid_and_named_by_its_settings(tmp_path, fashion):
    arrays = {}
    for part, count in (("train", 100), ("val", 20), ("test", 20)):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = pixels(1, count)
    np.savez(tmp_path / "set.npz", **arrays)
    folders = set()
    for flags in (
        ["--data-dir", fashion],
        ["--data-dir", fashion, "--no-compile"],
        ["--data-dir", tmp_path / "set.npz"],
        ["--data-dir", fashion, "--images", 9],
    ):
        jobs = experiment(*flags).jobs((0,), Path("out"))
        folders |= {job.folder for job in jobs}
        for job in jobs:
            assert not job.recipe().unused(), job.name
    assert len(folders) == 4 * (len(gpu.EVERY) * 3 + 2)  # and ours without logits, where it has them
    digests = [
        gpu.digest_of_images(load_dataset(*of)) for of in (("fashion-mnist", fashion), ("npz", f"{tmp_path}/set.npz"))
    ]
    assert Path(f"out/plain18-small-b256-{digests[0]}-rd-n55000-e100-s0") in folders
    assert Path(f"out/resnet50-small-b256-set-{digests[1]}-n55000-e100-s0") in folders
    (job,) = (job for job in jobs if job.name == f"resnet18-small-b256-{digests[0]}")
    page = replace(job, settings=job.settings | {"train_limit": 55_000})
    assert gpu.expected_seconds(page) == pytest.approx(74, rel=0.02)  # what the script says of itself


def test_runs_on_other_images_under_the_same_names_are_others(tmp_path, fashion):
    packed = idx_folder(tmp_path / "packed", 0, pack=gzip.compress, end=".gz")
    other = idx_folder(tmp_path / "kmnist", 1)
    found = {path: experiment("--data-dir", path, "--images", 1234) for path in (fashion, packed, other)}
    assert found[fashion].tag == found[packed].tag != found[other].tag
    assert found[other].what.startswith(f"Fashion-MNIST ({found[other].tag[-8:]}) at 32x32, 1,234 training images, ")


def test_the_committed_command_names_no_places_of_this_machine():
    said = {"--data-dir=/home/x/fashion": "--data-dir=fashion", "/home/x/set.npz": "set.npz", "~/runs": "runs"}
    said |= {each: each for each in ("--dry", "--depths=18,34", "runs/gpu", "--note=a=/b", "--out=runs/gpu")}
    assert {each: gpu.without_places(each) for each in said} == said


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, fashion):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here; --dry"):
        call(monkeypatch, "--out", tmp_path, "--data-dir", fashion)
