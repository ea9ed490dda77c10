"""benchmarks/accuracy/fashion.py: what is there is written whatever is missing, and errors are one line."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"
sys.path.append(str(FOLDER))  # as the script has it

import fashion

from rd_train.recipe_files import dump_yaml


def finish(job) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / "recipe.yaml").write_text(dump_yaml(job.recipe()), encoding="utf-8")
    (job.folder / "result.json").write_text(json.dumps({"test_accuracy": 0.5}), encoding="utf-8")


def test_what_is_there_is_written_and_what_is_missing_named(tmp_path, monkeypatch, capsys):
    failing = ["plain20-kd-dirac"]

    def trained(jobs, workers):
        for job in [job for job in jobs if job.name not in failing and not job.complete()]:
            finish(job)
        return {job.folder: "ended with 1: no memory" for job in jobs if job.name in failing}

    monkeypatch.setattr(fashion, "run_all", trained)
    flags = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "fashion.json")]
    monkeypatch.setattr(sys, "argv", ["fashion.py", *flags])
    assert fashion.command() == 1
    found = json.loads((tmp_path / "fashion.json").read_text(encoding="utf-8"))
    assert found["missing"] == [{"name": "plain20-kd-dirac", "seed": 0, "why": "ended with 1: no memory"}]
    assert len(found["results"]) == 13
    said = capsys.readouterr().out
    assert "missing: plain20-kd-dirac: ended with 1: no memory\n" in said
    assert "fashion.json, incomplete\n" in said
    failing.clear()
    assert fashion.command() == 0
    found = json.loads((tmp_path / "fashion.json").read_text(encoding="utf-8"))
    assert (found["missing"], len(found["results"])) == ([], 14)
    assert found["command"].startswith("python benchmarks/accuracy/fashion.py --epochs20 3 --epochs56 1 --workers 2")


def test_a_folder_of_another_run_is_one_line(tmp_path):
    (tmp_path / "resnet56-e1-s0").mkdir()
    (tmp_path / "resnet56-e1-s0" / "recipe.yaml").write_text("data: fashion-mnist\nlr: 0.3\n", encoding="utf-8")
    script = [sys.executable, str(FOLDER / "fashion.py"), "--out", str(tmp_path)]
    refused = subprocess.run(script, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"fashion: error: {tmp_path}/resnet56-e1-s0 holds a run ")
    assert refused.stderr.count("\n") == 1
