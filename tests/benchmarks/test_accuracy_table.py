"""The benchmark of accuracy: its rows are recipes that mean something, its runner loses nothing, its sums are right."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "accuracy"
sys.path += [str(FOLDER), str(ROOT / "benchmarks")]  # as the scripts have it

import accuracy_tables
import committed
import experiments
import fashion
import runner
import summary
import table
from experiments import OUR_ROW, PLAIN, RESNET, RESNET_TUNED, SEEDS, Experiment, ablations

from rd_deploy.common import UserError
from rd_train.checkpoint import load_checkpoint
from rd_train.cli import _parse, _recipe
from rd_train.recipe import Recipe
from rd_train.recipe_files import dump_yaml, preset_values
from rd_train.run import run

OUT = Path("runs/table")
EXPERIMENTS = experiments.experiments()
TINY = Experiment("digits", (RESNET_TUNED, OUR_ROW), (20,), epochs=2, train_images=256, tag="-tiny")
TINY = replace(TINY, settings={"width": 0.25, "data": "digits", "size": 8, "warmup_epochs": 0.2})

# Stands for rd-train: writes what a run writes, saves its state and ends with 130 on SIGTERM.
FAKE = """
import json, pathlib, signal, sys, time
options = sys.argv[1:]
if options[0] == "--resume":
    folder = pathlib.Path(options[1])
    flags = json.loads((folder / "flags.json").read_text())
else:
    folder = pathlib.Path(options[options.index("--out") + 1])
    flags = dict(option[2:].split("=", 1) for option in options if "=" in option)
    (folder / "flags.json").write_text(json.dumps(flags))
with (folder / "starts").open("a") as file:
    file.write(f"{options[0]} {time.monotonic()}\\n")
def stop(*_):
    (folder / "student-state.pt").write_text("state")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(folder / "listens").touch()
if options[0] != "--resume":
    usual = {"data": "fashion-mnist", "kd_start": 0.5, "kd_probability": 0.6}
    lines = [f"{name.replace('-', '_')}: {value}\\n" for name, value in (usual | flags).items()]
    (folder / "recipe.yaml").write_text("".join(lines))
if flags["arch"] == "plain32":
    print("student: loss became NaN; try a lower --lr")
    sys.exit(1)
if "teacher-weights" in flags and not pathlib.Path(flags["teacher-weights"]).exists():
    sys.exit("no teacher")
if flags["arch"] == "plain110" and options[0] != "--resume":
    time.sleep(60)
(folder / "model.pt").write_text("model")
found = {"test_accuracy": 0.9, "seconds": 1.0, "seed": int(flags["seed"]), "teacher_weights": "x"}
found |= {"step_cost": 1.0, "epochs": 2, "train_images": 256, "precision": "fp32", "val_accuracy": 0.8}
(folder / "metrics.jsonl").write_text('{"train_accuracy": 0.5}\\n{"train_accuracy": 0.7}\\n')
(folder / "result.json").write_text(json.dumps(found))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script = tmp_path / "rd_train.py"
    script.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(runner, "RD_TRAIN", (sys.executable, "-S", str(script)))
    return tmp_path / "runs"


def starts(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "starts").read_text(encoding="utf-8").splitlines()]


# --- experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_a_recipe_of_its_own_with_a_folder_of_its_own(name):
    jobs = EXPERIMENTS[name].jobs((0, 1), OUT)
    recipes = []
    for job in jobs:
        preset, *flags = job.flags()
        recipes.append(_recipe(_parse(list(flags), preset_values(preset))))
        assert replace(job.recipe(), summary="") == recipes[-1]  # the command line says the same as the settings
        assert not recipes[-1].unused(), job.name
        assert (recipes[-1].method == "ce") == (recipes[-1].teacher_weights is None)
        assert recipes[-1].arch.startswith("resnet") == job.name.startswith("resnet")
    assert len({job.folder for job in jobs}) == len(set(map(repr, recipes))) == len(jobs)
    for field in ("size", "epochs", "batch_size", "lr", "clip_norm", "train_limit", "width", "stem"):
        values = {("ablation", "clip_norm"): 2, ("rates", "lr"): 3, ("main", "epochs"): 3}.get((name, field), 1)
        assert len({getattr(recipe, field) for recipe in recipes}) == values, field


def test_experiments_share_folders_only_where_they_share_everything():
    found = {}
    for experiment in EXPERIMENTS.values():
        for job in experiment.jobs((0,), OUT):
            assert found.setdefault(job.folder, job.recipe()) == job.recipe()
    counts = Counter(job.folder for name in ("main", "depth") for job in EXPERIMENTS[name].jobs((0,), OUT))
    assert sum(count == 2 for count in counts.values()) == 10  # both ResNets, plain, ours and the former at 20 and 56


def test_names_of_folders_that_results_exist_under():
    folders = {job.folder.name for job in EXPERIMENTS["main"].jobs((0,), OUT)}
    rows = ["resnet{}", "resnet{}-kd", "plain{}-ce-kaiming", "plain{}-kd", "plain{}-jointrd-published"]
    rows += ["plain{}-jointrd-options", "plain{}-rd", "plain{}-ce-identity"]
    rows += ["resnet{}-muon02", "plain{}-rd-muon", "plain{}-ce-identity-muon", "plain{}-ce-kaiming-muon02"]
    rows += ["plain{}-ce-start-muon02", "plain{}-rd-tuned", "plain{}-rd-tuned-teacher-twice"]
    names = {f"{row.format(depth)}-n20000-e10-s0" for row in rows for depth in (20, 56)}
    twice = ["resnet{}-muon02-twice", "plain{}-ce-start-muon02-twice", "plain{}-rd-tuned-twice"]
    names |= {f"{row.format(depth)}-n20000-e20-s0" for row in twice for depth in (20, 56)}
    names |= {f"plain{depth}-ce-start-muon02-longer-n20000-e12-s0" for depth in (20, 56)}
    assert folders == names | {"plain20-rd-tuned-alone-n20000-e10-s0"}


def test_a_row_stands_where_it_differs_from_what_it_varies():
    main = EXPERIMENTS["main"]
    assert main.depths_of(experiments.OURS_ALONE) == [20]  # 56 distils no logits anyway
    ours, alone = (main.job(row, 20, 0, OUT) for row in (OUR_ROW, experiments.OURS_ALONE))
    assert (ours.recipe().kd_weight, alone.recipe().kd_weight) == (0.5, 0.0)
    assert all(main.depths_of(row) == [20, 56] for row in main.rows if row != experiments.OURS_ALONE)


def test_rows_that_decide_come_first_and_after_their_teacher():
    jobs = EXPERIMENTS["main"].jobs((0, 1, 2), OUT)
    assert [job.must for job in jobs] == [True] * 36 + [False] * 81
    for each in EXPERIMENTS.values():
        jobs = each.jobs((0, 1, 2), OUT)
        for number, job in enumerate(jobs):
            assert job.teacher is None or job.teacher in [other.folder for other in jobs[:number]]


def test_ours_is_taught_by_the_resnet_of_its_own_optimiser_and_others_by_that_of_sgd():
    for experiment in EXPERIMENTS.values():
        for row, depth in itertools.product(experiment.rows, experiment.depths):
            resnet = RESNET_TUNED if row.name.startswith(OUR_ROW.name) else RESNET
            longer = row in (experiments.OURS_TAUGHT_LONGER, experiments.OURS_TWICE)
            resnet = experiments.RESNET_TWICE if longer else resnet
            teacher = None if row.settings["method"] == "ce" else experiment.job(resnet, depth, 1, OUT).folder
            assert experiment.job(row, depth, 1, OUT).teacher == teacher, row.name
    assert all(OUR_ROW.settings[name] == RESNET_TUNED.settings[name] for name in experiments.MUON)


def test_an_ablation_takes_one_lever_out_each():
    ours = {"method": "rd", "init": "identity", "init_noise": 0.2, "kd_weight": 0.5, "kd_temperature": 2.0}
    ours |= {"weight_decay": 1e-4, "optimizer": "muon"}
    found = {row.name.removeprefix("plain{}-rd-tuned-without-"): row.settings for row in ablations(ours)}
    losses = {"teacher-bn", "splices", "splice-weight", "splice-weight-end", "kd-weight"}
    assert set(found) == losses | {"init", "clip-norm", "optimizer", "reparam", "weight-decay"}
    ours |= {"reparam": "identity"}  # rd-train adds it at this depth, and would not without the start or Muon
    assert found["init"] == {key: ours[key] for key in ours if key != "init_noise"} | {"init": "kaiming"}
    assert found["optimizer"] == ours | {"optimizer": "sgd"}
    assert found["kd-weight"] == {key: ours[key] for key in ours if key != "kd_temperature"} | {"kd_weight": 0.0}
    assert found["weight-decay"] == {key: ours[key] for key in ours if key != "weight_decay"}
    assert found["teacher-bn"] == ours | {"teacher_bn": "eval"}
    assert found["reparam"] == ours | {"reparam": "none"}
    assert all(row.teacher == RESNET_TUNED for row in ablations(ours))


def test_every_setting_of_ours_has_an_ablation_or_belongs_to_one():
    names = [row.name for row in ablations()]
    covered = {name.removeprefix("plain{}-rd-tuned-without-").replace("-", "_") for name in names}
    assert set(experiments.OURS) <= covered | experiments.PARAMETERS
    assert {"optimizer", "reparam"} <= covered  # without Muon; without the branches that rd-train adds


@pytest.mark.parametrize("arch", ["plain20", "plain44"])  # without branches and with them
def test_ours_without_splices_and_logits_is_cross_entropy_from_the_same_start(tmp_path, arch):
    shared = {**experiments.SHARED, **experiments.OURS, "arch": arch, "width": 0.25, "epochs": 1, "batch_size": 50}
    shared |= {"train_limit": 100, "size": 8, "precision": "fp32", "device": "cpu", "warmup_epochs": 0.5}
    weights = []
    for method in ({"splice_weight": 0.0, "kd_weight": 0.0}, {"method": "ce"}):
        run(Recipe(**shared | method), tmp_path / str(len(weights)))
        weights.append(load_checkpoint(tmp_path / str(len(weights)) / "model.pt").state_dict)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert experiments.PLAIN_START.name in [row.name for row in ablations()]


def test_glyphs_are_named_by_their_file(tmp_path):
    names = []
    for content in (b"one", b"two"):
        (tmp_path / "glyphs.npz").write_bytes(content)
        found = experiments.experiments(tmp_path / "glyphs.npz")["glyphs"]
        names.append({job.folder for job in found.jobs((0,), OUT)})
    assert not names[0] & names[1]


def test_the_older_benchmark_of_one_seed():
    options = Namespace(out=OUT, epochs20=3, epochs56=1, seed=0)
    for job in fashion.students(options):
        recipe = _recipe(_parse(job.flags()[1:], preset_values(job.preset)))
        assert not recipe.unused()
        assert (recipe.batch_size, recipe.lr, recipe.clip_norm, recipe.threads) == (64, 0.05, 1.0, 1)
        teacher = f"runs/table/resnet{recipe.arch[5:]}-e{recipe.epochs}-s0/model.pt"
        assert recipe.teacher_weights == (None if recipe.method == "ce" else teacher)


# --- the runner


def test_students_wait_for_their_teacher_and_nothing_runs_twice(fake):
    jobs = replace(EXPERIMENTS["depth"], rows=(RESNET_TUNED, PLAIN, OUR_ROW), depths=(20,)).jobs((0, 1), fake)
    jobs = [jobs[1], *jobs[:1], *jobs[2:]]  # a student first
    assert jobs[0].teacher == jobs[1].folder
    seen = []
    assert runner.run_all(jobs, 3, finished=lambda missing: seen.append(dict(missing))) == {}
    assert runner.run_all(jobs, 3) == {}
    assert all(starts(job.folder) == ["fashion-plain20"] for job in jobs)
    assert len(seen) == 6
    assert seen[-1] == {}
    found = {"name": "plain20-rd-tuned", "test_accuracy": 0.9, "seconds": 1.0, "seed": 0}
    found |= {"step_cost": 1.0, "epochs": 2, "train_images": 256, "precision": "fp32", "val_accuracy": 0.8}
    found |= {"last_train_accuracy": 0.7, "device": None}
    (start,) = jobs[0].result()["trained"]
    assert (start["commit"], start["cpu"]) == (runner.git_commit(), runner.cpu()["model"])
    assert {**jobs[0].result(), "settings": None} == found | {"settings": None, "trained": [start]}
    assert jobs[0].difference(jobs[0].result()["settings"]) is None


def test_a_run_that_fails_is_said_and_stops_no_other(fake, capsys):
    jobs = replace(EXPERIMENTS["depth"], depths=(32, 44)).jobs((0,), fake)
    missing = runner.run_all(jobs, 2)
    plain = [job.folder for job in jobs if "plain32" in job.name]
    assert missing == dict.fromkeys(plain, "ended with 1: student: loss became NaN; try a lower --lr")
    assert "plain32-rd-tuned, seed 0: ended with 1" in capsys.readouterr().out
    assert all(job.result() for job in jobs if job.folder not in missing)


def test_a_student_without_its_teacher_is_said(fake):
    job = TINY.job(OUR_ROW, 20, 0, fake)
    assert runner.run_all([job], 1) == {job.folder: "its teacher resnet20-tiny-muon02-n256-e2-s0 has no result"}


def resnet_plain_ours(out: Path) -> list[runner.Job]:
    """At depth 110, whose plain network the stand-in trains for a minute."""
    return [EXPERIMENTS["depth"].job(row, 110, 0, out) for row in (RESNET_TUNED, PLAIN, OUR_ROW)]


def assert_goes_on(jobs: list[runner.Job]) -> None:
    jobs.pop()  # ours, which would take its minute
    assert runner.run_all(jobs, 1) == {}
    assert starts(jobs[1].folder) == ["fashion-plain20", "--resume"]


def test_the_time_limit_stops_a_run_that_goes_on(fake, monkeypatch):
    jobs = resnet_plain_ours(fake)
    listens = jobs[1].folder / "listens"
    clock = SimpleNamespace(
        monotonic=lambda: 61.0 if listens.exists() else 0.0, sleep=time.sleep, strftime=time.strftime
    )
    monkeypatch.setattr(runner, "time", clock)
    missing = runner.run_all(jobs, 1, minutes=1)
    assert missing == {jobs[1].folder: runner.INTERRUPTED, jobs[2].folder: "not begun"}
    assert_goes_on(jobs)


STOPPED = """
import sys
from pathlib import Path
script, out, *folders = sys.argv[1:]
sys.path += folders
import experiments, runner
runner.RD_TRAIN = (sys.executable, "-S", script)
jobs = [experiments.experiments()["depth"].job(row, 110, 0, Path(out))
        for row in (experiments.RESNET_TUNED, experiments.PLAIN, experiments.OUR_ROW)]
missing = runner.run_all(jobs, 1)
print([missing.get(job.folder) for job in jobs])
"""


def test_a_signal_stops_runs_that_go_on(fake):
    """In a process of its own: a signal at the wrong time must not end pytest's."""
    jobs = resnet_plain_ours(fake)
    command = [sys.executable, "-c", STOPPED, runner.RD_TRAIN[-1], fake, ROOT, FOLDER, ROOT / "benchmarks"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        while not (jobs[1].folder / "listens").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0].splitlines()[-1]
    assert process.returncode == 0
    assert said == str([None, runner.INTERRUPTED, "not begun"])
    assert_goes_on(jobs)


def test_results_of_another_machine_count_and_a_teacher_that_is_needed_is_trained_again(fake, tmp_path, capsys):
    rows = [RESNET_TUNED, PLAIN, OUR_ROW]
    jobs = [EXPERIMENTS["depth"].job(row, 20, 0, fake) for row in rows]
    assert runner.run_all(jobs[:2], 1) == {}
    options = Namespace(out=fake, seeds=(0,), epochs=None, only=None, note="", workers=1, earlier=[])
    experiment = replace(EXPERIMENTS["depth"], rows=tuple(rows), depths=(20,))
    former = table.report("depth", experiment, jobs, {}, options)
    former["results"][0]["test_accuracy"] = 0.8
    path = tmp_path / "depth.json"
    path.write_text(json.dumps(former))
    here = [replace(job, folder=tmp_path / "here" / job.folder.name) for job in jobs]
    here[2] = replace(here[2], teacher=here[0].folder)
    known = table.with_earlier(here, table.read_earlier([path]))
    again = "earlier, trained again for its students"
    assert [table.state(job, runner.to_train(known)) for job in known] == [again, "earlier", "not begun"]
    assert runner.run_all(known[:2], 1) == {}  # there is nothing to train
    assert not (tmp_path / "here").exists()
    assert runner.run_all(known, 1) == {}
    assert [job.folder.exists() for job in known] == [True, False, True]
    options.earlier = [path]
    found = table.report("depth", experiment, known, {}, options)
    assert [run["test_accuracy"] for run in found["results"]] == [0.8, 0.9, 0.9]
    origin = {"file": "depth.json", **{key: former[key] for key in ("date", "commit", "machine", "note")}}
    assert [run.get("from") for run in found["results"]] == [origin, origin, None]
    assert found["command"].endswith("--earlier depth.json")
    assert [[start["commit"] for start in run["trained"]] for run in found["results"]] == [[runner.git_commit()]] * 3
    found["results"][2]["teacher_test_accuracy"] = 0.9  # of a ResNet with 0.8 in the table
    (said,) = accuracy_tables._other_teachers(found)
    assert said.endswith("that of the ResNet in the table, and by how many points: plain20-rd-tuned seed 0 +10.00.")
    # A third machine keeps where each comes from; a run of other settings, given or by default, is not taken.
    (tmp_path / "third.json").write_text(json.dumps(found))
    third = table.with_earlier(jobs, table.read_earlier([tmp_path / "third.json"]))
    assert [job.earlier["from"]["file"] for job in third] == ["depth.json", "depth.json", "third.json"]
    other = replace(here[1], settings={**here[1].settings, "lr": 0.05})
    assert table.with_earlier([other], table.read_earlier([path]))[0].earlier is None
    assert "plain20-ce-kaiming, seed 0: not taken from depth.json: with lr=0.1, not lr=0.05" in capsys.readouterr().out
    former["results"][0]["settings"]["momentum"] = 0.8
    path.write_text(json.dumps(former))
    # One of the same name in another file (of another size, say) hides none.
    both = table.with_earlier(jobs[:1], table.read_earlier([tmp_path / "third.json", path]))
    assert both[0].earlier["from"]["file"] == "depth.json"
    assert table.with_earlier(here[:1], table.read_earlier([path]))[0].earlier is None


@pytest.mark.parametrize("tag", ["", "-glyphs-12345678"])
def test_what_ours_was_before_is_a_row_of_another_name(tmp_path, fake, tag, capsys):
    experiment = replace(EXPERIMENTS["main"], rows=(RESNET_TUNED, experiments.OURS_ALONE, OUR_ROW), tag=tag)
    resnet, alone, ours = (experiment.job(row, 20, 0, fake) for row in experiment.rows)
    former = result(ours.name, 0, 0.9, settings=alone.recipe().to_dict())
    head = {"date": "2030-01-01", "commit": "c", "machine": {"cpu": "CPU"}, "note": ""}
    (tmp_path / "earlier.json").write_text(json.dumps(head | {"results": [former]}))
    known = table.with_earlier([resnet, alone, ours], table.read_earlier([tmp_path / "earlier.json"]))
    assert [job.earlier and job.earlier["name"] for job in known] == [None, alone.name, None]
    assert alone.name == f"plain20{tag}-rd-tuned-alone"
    assert "not taken from earlier.json: with kd_weight=0.0, not kd_weight=0.5" in capsys.readouterr().out


def test_results_from_before_an_entry_was_there_did_as_then(fake):
    def older(job: runner.Job) -> dict:
        return {name: value for name, value in job.recipe().to_dict().items() if name not in runner.IN_ALL_STEPS}

    by_sgd = EXPERIMENTS["levers"].job(experiments.MORE[0], 56, 0, fake)  # with logit distillation
    assert by_sgd.difference(older(by_sgd)) is None
    ours = TINY.job(OUR_ROW, 20, 0, fake)
    assert ours.difference(older(ours)).startswith("of another version, without kd_start")


def test_a_teacher_is_held_against_the_resnet_that_taught_the_row():
    scores = {"resnet20": 0.8, "resnet20-muon02": 0.9}
    taught = {"plain20-rd-muon": "resnet20", "plain20-rd-tuned": "resnet20-muon02"}
    results = [result(name, 0, score) for name, score in scores.items()]
    results += [result(name, 0, 0.7, teacher_test_accuracy=scores[teacher]) for name, teacher in taught.items()]
    document = {"results": results, "rows": summary.summary(EXPERIMENTS["main"], results)}
    assert accuracy_tables._other_teachers(document) == []
    for student in results[2:]:
        student["teacher_test_accuracy"] += 0.01
    (said,) = accuracy_tables._other_teachers(document)
    assert said.endswith(" points: plain20-rd-muon seed 0 +1.00, plain20-rd-tuned seed 0 +1.00.")


@pytest.mark.parametrize("text", ["{", "\xff", "[]", "[" * 100_000, '{"results": 1}'])
def test_earlier_files_that_are_none_are_refused(text, tmp_path):
    path = tmp_path / "old.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="no results with their settings"):
        table.read_earlier([path])


def earlier_file(path: Path, **changes) -> Path:
    """A file with one result; ``changes`` of it, or of the document where they are of its head."""
    head = {"date": "2030-01-01", "commit": "abc", "note": "", "machine": {"cpu": "CPU"}}
    found = result("resnet20", 0, 0.9) | {"settings": {"lr": 0.1}}
    for name, value in changes.items():
        (head if name in head else found)[name] = value
    path.write_text(json.dumps({**head, "results": [found]}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("settings", "precision", "val_accuracy", "step_cost", "seconds", "epochs")),
        *({name: math.nan} for name in ("test_accuracy", "seconds", "teacher_test_accuracy")),
        {"settings": {"lr": -1}}, {"test_accuracy": 1.5}, {"test_accuracy": True}, {"seed": 0.5}, {"epochs": "10"},
        {"last_train_accuracy": "x"}, {"trained": 1}, {"machine": {}}, {"machine": 1}, {"date": []}, {"name": [1]},
    ],
)  # fmt: skip
def test_earlier_results_that_no_table_can_be_made_of_are_refused(changes, tmp_path):
    assert len(table.read_earlier([earlier_file(tmp_path / "right.json")])) == 1
    with pytest.raises(UserError, match="no results with their settings"):
        table.read_earlier([earlier_file(tmp_path / "wrong.json", **changes)])


@pytest.mark.parametrize(
    ("name", "value"), [("shortcuts", "all"), ("start_weights", "x.pt"), ("teacher", "resnet110"), ("stem", "small")]
)
def test_a_run_of_another_network_or_start_is_another_run(tmp_path, name, value):
    job = EXPERIMENTS["main"].job(PLAIN, 20, 0, tmp_path)
    same = job.recipe().to_dict()
    assert job.difference(same) is None
    said = job.difference({**same, "method": "kd", name: value}) if name == "teacher" else None
    assert said or job.difference({**same, name: value}) == f"with {name}={value}, not {name}={same[name]}"


def test_the_cost_of_a_row_that_is_not_at_the_deepest_says_of_which_depth_it_is():
    results = [*accuracies("resnet56", 0.8), *accuracies("resnet20", 0.8), result("resnet20-kd", 0, 0.8, threads=2)]
    results[1]["seconds"], results[2]["step_cost"] = 9.0, 1.34
    results.append(result("resnet56", 1, 0.8, seconds=2_000.0))
    document = {"results": results, "rows": summary.summary(EXPERIMENTS["main"], results)}
    lines = accuracy_tables._by_depth(accuracy_tables._rows(document), seconds=True).splitlines()
    assert lines[2].endswith("| 1.50 | - | 4 to 2,000 |")
    assert lines[3].endswith("| 1.34 (depth 20) | 1.50 | 4 |")
    assert accuracy_tables._more_threads(document) == ["- By more than one thread: resnet20-kd seed 0 (2)."]


def test_a_row_of_twice_the_epochs_costs_twice():
    (ours,) = accuracies("plain56-rd-tuned", 0.8)
    twice = result("resnet56-muon02-twice", 0, 0.8, epochs=4, step_cost=1.01)
    resnets = [result("resnet56", 0, 0.8, step_cost=1.01), result("resnet56-muon02", 0, 0.8, step_cost=1.03)]
    rows = summary.summary(EXPERIMENTS["main"], [ours, twice, *resnets])
    lines = accuracy_tables._by_depth([row | {"took": "1"} for row in rows]).splitlines()[2:]
    assert lines == [
        "| ResNet, cross-entropy | 80.00 (1) | 1.01 | - |",
        "| ResNet, cross-entropy by Muon | 80.00 (1) | 1.03 | - |",
        "| ResNet, cross-entropy by Muon, twice the epochs | 80.00 (1) | 2.02 | - |",
        "| plain, ours | 80.00 (1) | 1.50 | 1.03 |",
    ]
    (pair,) = (pair for pair in summary.comparisons(rows) if pair["against"] == "resnet-twice")
    assert (pair["ours"], pair["holds"]) == ("plain56-rd-tuned", {})  # nothing was asked against it
    assert committed.cost_of(rows[2]) == 2.02
    del rows[3]["cost"]  # as in files of before
    assert committed.cost_of(rows[3]) == 1.50


def test_an_error_in_between_leaves_no_training_behind(fake):
    jobs = resnet_plain_ours(fake)

    def finished(missing):
        while not (jobs[1].folder / "listens").exists():
            time.sleep(0.05)
        raise OSError("a full disk")

    with pytest.raises(OSError, match="a full disk"):
        runner.run_all([jobs[1], jobs[0]], 2, finished=finished)
    assert (jobs[1].folder / "student-state.pt").exists()  # it was told to stop


def test_ours_is_what_rd_train_does():
    settings = {name: getattr(Recipe(), name) for name in experiments.OURS}
    assert settings == experiments.OURS


def test_committed_results_can_be_gone_on_with():
    """The ResNets' at least: what is ours may have changed since."""
    path = max((ROOT / "benchmarks" / "results").glob("*/*-accuracy-main.json"), key=lambda each: each.name)
    jobs = [job for job in EXPERIMENTS["main"].jobs(SEEDS, OUT) if job.name in ("resnet20", "resnet56")]
    assert all(job.earlier for job in table.with_earlier(jobs, table.read_earlier([path])))


def test_every_committed_file_can_be_gone_on_with():
    count = 0
    for path in (ROOT / "benchmarks" / "results").glob("*/*-accuracy-*.json"):
        document = json.loads(path.read_text())
        if "experiment" in document and all("settings" in run for run in document["results"]):  # of table.py
            assert len(table.read_earlier([path])) == len(document["results"])
            count += 1
    assert count >= 10


def test_no_time_means_no_training(fake):
    jobs = TINY.jobs((0,), fake)
    assert set(runner.run_all(jobs, 1, minutes=0).values()) == {"not begun"}
    assert not fake.exists()


def test_a_run_that_another_process_trains_is_left_alone(fake):
    job = TINY.job(RESNET_TUNED, 20, 0, fake)
    job.folder.mkdir(parents=True)
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(); time.sleep(60)"
    )
    command = [sys.executable, "-S", "-c", holder, str(job.folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert runner.run_all([job], 1) == {job.folder: "another process trains it"}
        other.kill()
    assert not (job.folder / "starts").exists()
    assert runner.run_all([job], 1) == {}


def test_a_run_by_another_teacher_is_another_run(fake):
    """What one row differs from another in may be its teacher alone."""
    job = TINY.job(OUR_ROW, 20, 0, fake)
    for row in (RESNET, experiments.RESNET_TUNED, OUR_ROW):
        assert runner.run_all([TINY.job(row, 20, 0, fake)], 1) == {}
    settings = job.result()["settings"]
    assert settings["teacher_weights"] == f"{job.teacher.name}/model.pt"  # no path of this machine
    assert job.difference(settings) is None
    other = replace(job, teacher=TINY.job(RESNET, 20, 0, fake).folder)
    said = "taught by resnet20-tiny-muon02-n256-e2-s0, not resnet20-tiny-n256-e2-s0"
    assert other.difference(settings) == said
    with pytest.raises(UserError, match=f"holds a run {said}"):
        other.check_folder()
    del settings["teacher_weights"]  # as results had it before
    assert other.difference(settings) is None


def test_a_folder_of_other_settings_is_refused(fake):
    job = TINY.job(OUR_ROW, 20, 0, fake)
    job.folder.mkdir(parents=True)
    same = replace(job.recipe(), device="cpu", precision="bf16", threads=1, data_dir="/elsewhere")
    (job.folder / "recipe.yaml").write_text(dump_yaml(same), encoding="utf-8")
    job.check_folder()
    (job.folder / "recipe.yaml").write_text(dump_yaml(replace(same, precision="bf16-emulated")), encoding="utf-8")
    job.check_folder()
    (job.folder / "recipe.yaml").write_text(dump_yaml(replace(same, precision="fp32")), encoding="utf-8")
    with pytest.raises(UserError, match="a run with precision=fp32, not precision=bf16 as"):
        runner.run_all([job], 1)
    (job.folder / "recipe.yaml").write_text(dump_yaml(replace(same, init="kaiming")), encoding="utf-8")
    with pytest.raises(
        UserError, match="a run with init=kaiming, not init=identity as plain20-tiny-rd-tuned has now: move"
    ):
        runner.run_all([job], 1)
    older = "".join(line for line in dump_yaml(same).splitlines(True) if not line.startswith("init_noise"))
    (job.folder / "recipe.yaml").write_text(older, encoding="utf-8")
    with pytest.raises(UserError, match=r"of another version, without init_noise, not init_noise=0\.2 as"):
        runner.run_all([replace(job, settings=job.settings | {"init_noise": 0.2})], 1)


# --- the summary


def result(name, seed, accuracy, **others):
    found = {"name": name, "seed": seed, "test_accuracy": accuracy, "epochs": 2, "train_images": 1280}
    found |= {"step_cost": 1.5, "seconds": 4.0, "val_accuracy": accuracy - 0.01, "precision": "bf16"}
    return found | others


def accuracies(name, *values):
    return [result(name, seed, value) for seed, value in enumerate(values)]


RESNETS = {"resnet20": 1.01, "resnet20-muon02": 1.03}  # what a step of each costs


def test_the_summary_is_mean_and_deviation_over_seeds():
    resnets = [result(name, 0, 0.5, epochs=4, step_cost=cost) for name, cost in RESNETS.items()]
    results = [*accuracies("plain20-rd-tuned", 0.80, 0.82, 0.81), *resnets, *accuracies("plain20-rd-muon", 0.7)]
    _, single, former, row = summary.summary(EXPERIMENTS["depth"], results)
    assert (row["mean"], row["std"]) == pytest.approx((0.81, 0.01))
    assert (row["seeds"], row["plain_steps"], single["std"]) == ([0, 1, 2], 30.0, None)
    teachers = [(each["teacher"], each["teacher_cost"]) for each in (row, former, single)]  # of twice their epochs
    assert teachers == [("resnet20-muon02", 2.06), ("resnet20", 2.02), (None, None)]
    assert (row["depth"], row["key"], row["label"]) == (20, "ours", "plain, ours")
    assert row["validation"] == pytest.approx(0.80)
    assert row["training"] is None


def test_the_table_of_rates_shows_what_chose_and_the_fit():
    by_muon = [("resnet56-muon", 0.88), ("resnet56-muon02", 0.89), ("resnet56-muon008", 0.87)]
    by_muon += [("plain56-rd-muon", 0.91), ("plain56-rd-muon002", 0.92)]
    results = [result(name, 0, accuracy, last_train_accuracy=0.95) for name, accuracy in by_muon]
    rows = summary.summary(EXPERIMENTS["rates"], [result("resnet56", 0, 0.9), *results])
    former = "plain, ours from the former start, taught by the ResNet by SGD"
    assert accuracy_tables._rates(rows).splitlines()[2:] == [
        "| ResNet, cross-entropy | 89.00 | 90.00 | - |",
        "| ResNet, cross-entropy by Muon, rate 0.004 | 87.00 | 88.00 | 95.00 |",
        "| ResNet, cross-entropy by Muon, rate 0.02 | 88.00 | 89.00 | 95.00 |",
        "| ResNet, cross-entropy by Muon, rate 0.008 | 86.00 | 87.00 | 95.00 |",
        f"| {former}, rate 0.004 | 90.00 | 91.00 | 95.00 |",
        f"| {former}, rate 0.002 | 91.00 | 92.00 | 95.00 |",
    ]
    assert EXPERIMENTS["rates"].seeds == (0,)


def test_the_interval_is_students():
    # The textbook's: for n = 3 and 95%, t = 4.302653.
    low, high = summary.t_interval([0.01, 0.02, 0.03])
    assert (low, high) == pytest.approx((0.02 - 4.302653 * 0.01 / math.sqrt(3), 0.02 + 4.302653 * 0.01 / math.sqrt(3)))


def compared(ours, resnet, published):
    results = accuracies("plain56-rd-tuned", *ours) + accuracies("resnet56", *resnet)
    results += accuracies("resnet56-muon02", *resnet)
    results += accuracies("plain56-jointrd-published", *published)
    pairs = summary.comparisons(summary.summary(EXPERIMENTS["main"], results))
    assert all(pair["ours"] == "plain56-rd-tuned" for pair in pairs)
    return {pair["against"]: pair for pair in pairs}


@pytest.mark.parametrize(
    ("ours", "goal", "must"),
    [((0.90, 0.91, 0.9), True, True), ((0.898, 0.908, 0.9), False, True), ((0.896, 0.906, 0.896), False, False)],
)
def test_what_is_asked_of_ours_against_the_resnet(ours, goal, must):
    pairs = compared(ours, (0.90, 0.91, ours[2] + 0.90 - ours[0]), (0.5, 0.5, 0.5))
    for pair in (pairs["resnet"], pairs["resnet-tuned"]):
        assert pair["holds"] == {"goal": goal, "must": must}
        assert pair["mean"] == pytest.approx(ours[0] - 0.90)


def test_over_twice_the_epochs_ours_is_asked_to_equal_the_resnet_over_as_many():
    ours = accuracies("plain20-rd-tuned-twice", 0.93, 0.94, 0.95)
    resnets = [accuracies("resnet20-muon02-twice", 0.931, 0.941, 0.951), accuracies("resnet20-muon02", 0.9, 0.9, 0.9)]
    found = [*ours, *(run for runs in resnets for run in runs)]
    (pair,) = (
        pair for pair in summary.comparisons(summary.summary(EXPERIMENTS["main"], found)) if pair["against"] != "lever"
    )
    assert (pair["ours"], pair["other"]) == ("plain20-rd-tuned-twice", "resnet20-muon02-twice")
    assert pair["holds"] == {"goal": False, "must": True}


def test_ours_must_be_above_the_published_by_more_than_the_spread():
    for difference, holds in ((0.011, True), (0.009, False)):  # the seeds of both spread by 0.01
        ours = (0.90, 0.91, 0.92)
        pair = compared(ours, (0.9, 0.9, 0.9), [value - difference for value in ours])["published"]
        assert pair["spread"] == pytest.approx(0.01)
        assert pair["holds"] == {"must": holds}
    pair = compared((0.90, 0.91), (0.5, 0.5), (0.5, 0.5))["published"]
    assert (pair["holds"], bool(pair["interval"])) == ({}, True)  # two seeds decide nothing


def test_unlike_precisions_are_said_and_not_judged():
    ours = accuracies("plain56-rd-tuned", 0.90, 0.91)
    fp32 = [found | {"precision": "fp32"} for found in accuracies("resnet56", 0.8, 0.8)]
    rows = summary.summary(EXPERIMENTS["main"], [*ours, *fp32])
    (pair,) = pairs = summary.comparisons(rows)
    assert (pair["holds"], pair["precisions"]) == ({}, [["bf16"], ["fp32"]])
    assert pair["mean"] == pytest.approx(0.105)
    said = verdicts({"results": [*ours, *fp32]}, pairs)
    assert said == [
        "| 56 | plain, ours | the ResNet by SGD | +10.50 (two seeds: no interval), bf16 against fp32 "
        "| 0: +10.00, 1: +11.00 |"
    ]
    more = accuracies("resnet20", 0.8, 0.8)
    rows = accuracy_tables._by_depth(summary.summary(EXPERIMENTS["main"], [*ours, *fp32, *more]))
    assert "| ResNet, cross-entropy | 80.00 ± 0.00 (2) | 80.00 ± 0.00 (2) fp32 |" in rows
    assert rows.count("fp32") == 1


def test_a_gpu_is_another_precision():
    ours = [found | {"device": "cuda"} for found in accuracies("plain56-rd-tuned", 0.9, 0.91, 0.9)]
    resnet = [found | {"device": "cpu"} for found in accuracies("resnet56", 0.8, 0.8, 0.8)]
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], ours + resnet))
    assert (pair["holds"], pair["precisions"]) == ({}, [["bf16 on a GPU"], ["bf16"]])
    resnet = [found | {"device": "cuda"} for found in resnet]
    rows = summary.summary(EXPERIMENTS["main"], ours + resnet)
    assert not any(row["other_precision"] for row in rows)
    assert summary.comparisons(rows)[0]["holds"]


def test_emulated_bf16_is_bf16_and_is_counted():
    ours = [found | {"precision": "bf16-emulated"} for found in accuracies("plain56-rd-tuned", 0.9, 0.91, 0.9)]
    resnet = accuracies("resnet56", 0.8, 0.8, 0.8)
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], ours + resnet))
    assert (pair["precisions"], bool(pair["holds"])) == (None, True)
    document = {"results": [*ours, *resnet], "what": "W"}
    document["rows"] = summary.summary(EXPERIMENTS["main"], document["results"])
    said = accuracy_tables._line(document, "sources A", "x.json", "accuracy.md")
    assert said.startswith(
        "W; 2 epochs, bf16 · 6 results, 3 emulated (e) · sources A · [JSON](x.json) · [how to read](accuracy.md"
    )
    text = accuracy_tables._by_depth(accuracy_tables._rows(document))
    assert ("90.33 ± 0.58 (3, 3 e)" in text, "80.00 ± 0.00 (3) |" in text) == (True, True)


def verdicts(document: dict, pairs: list[dict]) -> list[str]:
    """The lines of what pairs say, without the header."""
    return accuracy_tables._verdicts(document, pairs).splitlines()[2:]


def test_seeds_of_which_one_side_is_emulated_are_marked_and_so_is_what_they_decide():
    ours, resnet = accuracies("plain56-rd-tuned", 0.9, 0.91, 0.9), accuracies("resnet56", 0.8, 0.8, 0.8)
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], ours + resnet))
    for number, each in ((0, ours), (1, ours), (1, resnet)):  # of seed 1 both
        each[number]["precision"] = "bf16-emulated"
    (said,) = verdicts({"results": ours + resnet}, [pair])
    assert said.endswith(" | 0e: +10.00, 1: +11.00, 2: +10.00 | yes (e) | yes (e) |")
    resnet[0]["precision"] = "bf16-emulated"
    (said,) = verdicts({"results": ours + resnet}, [pair])
    assert said.endswith(" | 0: +10.00, 1: +11.00, 2: +10.00 | yes | yes |")


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ((0.90, 0.90, 0.90), ["yes", "yes"]), ((0.89, 0.92, 0.90), ["yes, unsure", "yes, unsure"]),
        ((0.898, 0.898, 0.898), ["**no**", "yes"]), ((0.88, 0.91, 0.90), ["**no**, unsure", "**no**, unsure"]),
        ((0.88, 0.88, 0.88), ["**no**", "**no**"]), ((0.88, 0.88), []),
    ],
)  # fmt: skip
def test_a_verdict_says_whether_it_is_sure(ours, said):
    results = accuracies("plain56-rd-tuned", *ours) + accuracies("resnet56", 0.9, 0.9, 0.9)
    (line,) = verdicts({"results": results}, summary.comparisons(summary.summary(EXPERIMENTS["main"], results)))
    assert [cell.strip() for cell in line.strip("|").split("|")][5:] == said


def test_two_seeds_have_no_interval_and_one_is_said_to_be_one():
    results = accuracies("plain56-rd-tuned", 0.90, 0.91) + accuracies("resnet56", 0.8, 0.8, 0.8)
    pairs = summary.comparisons(summary.summary(EXPERIMENTS["main"], [*results, *accuracies("resnet56-muon02", 0.85)]))
    assert pairs[0]["interval"] is not None  # it is in the JSON, also of older files with a verdict
    pairs[0]["holds"] = {"goal": True, "must": True}
    assert verdicts({"results": results}, pairs) == [
        "| 56 | plain, ours | the ResNet by SGD | +10.50 (two seeds: no interval) | 0: +10.00, 1: +11.00 |",
        "| 56 | plain, ours | the ResNet by Muon | +5.00 (one seed) | 0: +5.00 |",
    ]


def test_every_row_that_ours_is_compared_with_has_a_name():
    named = {*accuracy_tables.OTHERS} - {"resnet-muon"}  # of older files
    assert {*itertools.chain(*summary.AGAINST.values())} == named
    keys = {row.key for row in experiments.MAIN}
    assert {*named, *summary.AGAINST, *summary.JUDGED, *accuracy_tables.SHORT, *accuracy_tables.SHORT_PAIRS} <= keys


def test_an_earlier_file_is_named_with_its_machine_where_it_is_a_committed_one(tmp_path):
    path = ROOT / "benchmarks" / "results" / "epyc-genoa-2c" / "2026-11-25-accuracy-main.json"
    (found,) = table.read_earlier([path])["resnet20", 0]
    assert found["from"]["file"] == "epyc-genoa-2c/2026-11-25-accuracy-main.json"
    elsewhere = earlier_file(tmp_path / "2026-11-25-accuracy-main.json")
    assert table.read_earlier([elsewhere])["resnet20", 0][0]["from"]["file"] == elsewhere.name
    options = Namespace(earlier=[path.relative_to(ROOT), elsewhere], note="", workers=1)
    command = f"x --earlier benchmarks/results/epyc-genoa-2c/{path.name} {elsewhere.name}"
    assert runner.document("W", "x", options)["command"] == command
    assert runner.document("W", "x", Namespace(earlier=[], note="", workers=1))["command"] == "x"


def test_what_is_compared_is_the_precision_of_each_pair():
    ours, resnet = accuracies("plain56-rd-tuned", 0.9, 0.91, 0.9, 0.9), accuracies("resnet56", 0.8, 0.8, 0.8)
    for found in (ours[0], ours[3], resnet[0]):  # the last seed has no pair
        found["precision"] = "fp32"
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], ours + resnet))
    assert (pair["precisions"], pair["holds"]) == (None, {"goal": True, "must": True})
    resnet[0]["precision"], resnet[1]["precision"] = "bf16", "fp32"
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], ours + resnet))
    assert (pair["precisions"], pair["holds"]) == ([["bf16", "fp32"], ["bf16", "fp32"]], {})


def test_pairs_are_of_the_same_seed_and_one_pair_decides_nothing():
    results = [result("plain56-rd-tuned", 1, 0.9), result("plain56-rd-tuned", 2, 0.8), result("resnet56", 0, 0.1)]
    (pair,) = summary.comparisons(summary.summary(EXPERIMENTS["main"], [*results, result("resnet56", 2, 0.7)]))
    assert (pair["seeds"], pair["interval"], pair["holds"]) == ([2], None, {})
    assert pair["mean"] == pytest.approx(0.1)


def test_each_of_ours_is_judged_against_its_own_others_and_no_pair_comes_twice():
    for name in ("main", "ablation", "levers"):
        experiment = EXPERIMENTS[name]
        results = [result(experiment.name(row, 56), 0, 0.9) for row in experiment.rows]
        pairs = summary.comparisons(summary.summary(experiment, results))
        named = [frozenset((pair["ours"], pair["other"])) for pair in pairs]
        assert len(set(named)) == len(named)
        others = {key: set() for key in summary.AGAINST}
        keys = {
            "plain56-rd-tuned": "ours",
            "plain56-rd-muon": "former",
            "plain56-rd": "sgd",
        }
        for pair in [pair for pair in pairs if pair["ours"] in keys and pair["against"] != "lever"]:
            others[keys[pair["ours"]]].add(pair["against"])
        resnets = {"resnet", "resnet-tuned"}
        starts = {"start", "start-longer", "start-twice"}
        main = {
            "ours": resnets | {"resnet-twice", "plain", "plain-muon", "published"} | starts,
            "former": resnets | {"former-start"},
            "sgd": {"resnet", "start-sgd", "published"},
        }
        levers = {"ours": resnets, "former": resnets, "sgd": {"resnet"}}
        ablation = {"ours": {"resnet-tuned"}, "former": set(), "sgd": set()}
        others_of = {"main": main, "ablation": ablation, "levers": levers}[name]
        assert others == others_of | {each: set() for each in ("ours-alone", "ours-taught-longer", "ours-twice")}
        ours = [("rd-tuned", "rd-muon"), ("rd-muon", "rd")]  # each against what it was before
        varied = {
            "main": [*ours, ("ce-start-muon02", "ce-kaiming-muon02"), ("ce-start-muon02-longer", "ce-start-muon02")],
            "ablation": [("ce-start-muon02", "rd-tuned"), ("rd-tuned-without-reparam", "rd-tuned")],
            "levers": [*ours, ("rd-tuned-kd", "rd-tuned")],
        }
        assert {frozenset(f"plain56-{each}" for each in pair) for pair in varied[name]} <= {*named}


def test_ours_without_logits_is_judged_too_where_ours_has_them():
    names = ("plain20-rd-tuned-alone", "plain20-rd-tuned", "resnet20-muon02", "plain20-ce-start-muon02")
    rows = summary.summary(EXPERIMENTS["main"], [result(name, 0, 0.9) for name in names])
    others = {pair["other"] for pair in summary.comparisons(rows) if pair["ours"] == names[0]}
    assert others == {*names[1:]}


def test_a_lever_is_judged_against_what_it_varies_on_the_seeds_that_both_have():
    results = accuracies("plain56-rd", 0.90, 0.91, 0.92) + accuracies("plain56-rd-kd", 0.91, 0.93)
    results += [result("plain56-rd-window1", 2, 0.91), *accuracies("resnet56", 0.9, 0.9, 0.9)]
    rows = summary.summary(EXPERIMENTS["levers"], results)
    pairs = {pair["ours"]: pair for pair in summary.comparisons(rows) if pair["against"] == "lever"}
    assert pairs["plain56-rd-kd"]["differences"] == pytest.approx([0.01, 0.02])
    assert pairs["plain56-rd-window1"]["mean"] == pytest.approx(-0.01)
    said = verdicts({"results": results}, list(pairs.values()))
    assert said == [
        "| 56 | plain, ours by SGD, with logit distillation | plain, ours by SGD | +1.50 (two seeds: no interval) "
        "| 0: +1.00, 1: +2.00 |",
        "| 56 | plain, ours by SGD, with splices to the end | plain, ours by SGD | -1.00 (one seed) | 2: -1.00 |",
    ]


# --- the command


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, arguments)])
    return table.command()


def test_an_unfinished_table_says_what_is_missing(fake, monkeypatch, capsys):
    flags = ["--out", fake, "--results", fake / "accuracy-NAME.json", "--seeds", "0"]
    assert call(monkeypatch, "main", "depth", *flags, "--minutes", 0) == 1
    found = json.loads((fake / "accuracy-main.json").read_text(encoding="utf-8"))
    runs = len(EXPERIMENTS["main"].jobs((0, 1, 2), OUT))
    assert (found["complete"], len(found["missing"]), found["rows"]) == (False, runs, [])
    assert found["missing"][0] == {"name": "resnet20", "seed": 0, "why": "not begun"}
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(UserError, match="must have NAME"):
        call(monkeypatch, "main", "depth", "--results", fake / "one.json")
    with pytest.raises(UserError, match="no experiment 'mian'"):
        call(monkeypatch, "mian")
    with pytest.raises(UserError, match="--glyphs FILE"):
        call(monkeypatch, "glyphs")


def test_what_was_not_asked_for_is_not_trained_and_counts_where_it_is_there(fake, monkeypatch):
    monkeypatch.setattr(table, "experiments", lambda glyphs: {"main": TINY})
    flags = ["--out", fake, "--results", fake / "NAME.json"]
    asked = [("resnet20-tiny-muon02", "0"), ("plain20-tiny-rd-tuned", "1")]
    codes = [call(monkeypatch, *flags, "--only", only, "--seeds", seeds) for only, seeds in asked]
    assert codes == [0, 0]
    found = json.loads((fake / "main.json").read_text(encoding="utf-8"))
    there = {(each["name"], each["seed"]) for each in found["results"]}
    # Seed 1 is ours with the teacher that it needs.
    assert there == {("resnet20-tiny-muon02", 0), ("resnet20-tiny-muon02", 1), ("plain20-tiny-rd-tuned", 1)}
    lost = {(each["name"], each["seed"]) for each in found["missing"]}
    assert lost == {("resnet20-tiny-muon02", 2), ("plain20-tiny-rd-tuned", 0), ("plain20-tiny-rd-tuned", 2)}
    with pytest.raises(SystemExit):
        call(monkeypatch, *flags, "--seeds", "5")
    # A folder that nobody asked for would pass for what is reported.
    recipe = fake / "resnet20-tiny-muon02-n256-e2-s0" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("epochs: 2", "epochs: 3"), encoding="utf-8")
    with pytest.raises(UserError, match="holds a run with epochs=3, not epochs=2 as resnet20-tiny-muon02"):
        call(monkeypatch, *flags, "--only", "plain20-tiny-rd-tuned", "--seeds", "1")


def test_seeds_that_an_experiment_does_without_count_where_they_are_there(fake, monkeypatch):
    monkeypatch.setattr(table, "experiments", lambda glyphs: {"main": replace(TINY, seeds=(0,), more_seeds=(1,))})
    flags = ["--out", fake, "--results", fake / "NAME.json"]
    assert call(monkeypatch, *flags, "--seeds", "1") == 0
    assert call(monkeypatch, *flags) == 0
    found = json.loads((fake / "main.json").read_text(encoding="utf-8"))
    assert found["complete"]
    assert [row["seeds"] for row in found["rows"]] == [[0, 1], [0, 1]]


def test_a_run_that_was_begun_is_not_called_one_that_was_not(fake, monkeypatch):
    monkeypatch.setattr(table, "experiments", lambda glyphs: {"main": TINY})
    begun = TINY.job(OUR_ROW, 20, 1, fake).folder
    begun.mkdir(parents=True)
    (begun / "student-state.pt").touch()
    assert call(monkeypatch, "--out", fake, "--results", fake / "NAME.json", "--seeds", "0") == 0
    missing = json.loads((fake / "main.json").read_text(encoding="utf-8"))["missing"]
    why = {(each["name"], each["seed"]): each["why"] for each in missing}
    assert why["plain20-tiny-rd-tuned", 1] == runner.INTERRUPTED
    assert why["plain20-tiny-rd-tuned", 2] == "not begun"


def test_trained_for_real(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "experiments", lambda glyphs: {"main": TINY})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = ["--out", tmp_path / "runs", "--results", tmp_path / "NAME.json", "--seeds", "0", "--workers", 1]
    assert call(monkeypatch, *flags) == 0
    found = json.loads((tmp_path / "main.json").read_text(encoding="utf-8"))
    assert (found["complete"], {each["seed"] for each in found["missing"]}) == (False, {1, 2})
    assert [row["name"] for row in found["rows"]] == ["resnet20-tiny-muon02", "plain20-tiny-rd-tuned"]
    assert found["rows"][1]["step_cost"] > 1.05
    assert found["rows"][1]["teacher_cost"] == pytest.approx(found["rows"][0]["step_cost"])
    assert "(n=1)" in capsys.readouterr().out
    monkeypatch.setattr(accuracy_tables, "find", lambda pattern: found | {"path": "results.json"})
    text = accuracy_tables.experiment("main")()
    emulated = ", 1 e" if found["results"][1]["precision"].endswith("-emulated") else ""  # as this CPU has it
    cell = f"{100 * found['rows'][1]['mean']:.2f} (1{emulated})"
    assert f"| plain, ours | {cell} | {found['rows'][1]['step_cost']:.2f} | " in text
    assert " 2 epochs, " in text
    assert text.endswith(" · [source](#sources) A · [JSON](../results.json) · [how to read](#how-to-read-the-tables)")
    assert accuracy_tables.sources().splitlines()[2:] == [
        f"| A | results.json | {found['machine']['cpu']} | {found['date']} | {found['commit']}; trained by "
        f"{runner.git_commit()} (2) | {', '.join(f'{name} 2' for name in accuracy_tables.EXPERIMENTS)} | - | "
        "`python benchmarks/accuracy/table.py main` |"
    ]
    assert call(monkeypatch, *flags, "--list") == 0
    assert capsys.readouterr().out.count("complete ") == 2
