"""benchmarks/int8_accuracy.py: what a row was made by stays with it, and a row of other packages is made again."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rd_deploy.common import run_command

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # as the script has it

import int8_accuracy

KINDS = list(int8_accuracy.KINDS)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command on checkpoints whose names are their digests; it returns exit code, JSON and what was made."""
    path = tmp_path / "results.json"

    def run(*names: str, version: str, date: str, drop: float = 0.1) -> tuple[int, dict, list]:
        made = []

        def row(source, kind, data_dir):
            made.append((source.chain.provenance["checkpoint_sha256"], kind))
            return {
                **{"model": "plain20", "precision": kind, "checkpoint_sha256": made[-1][0], "calibrator": "max"},
                "gate": {"original_accuracy": 0.9, "accuracy": 0.89, "drop_points": drop},
                "environment": {"date": f"{date}T01:02:03+00:00", "git_commit": "abc", "packages": {"numpy": version}},
                "seconds": 1.0,
            }

        def source(name):
            return SimpleNamespace(chain=SimpleNamespace(provenance={"checkpoint_sha256": name}))

        for name, value in {
            "row": row,
            "packages": lambda: {"numpy": version},
            "source_from_checkpoint": source,
        }.items():
            monkeypatch.setattr(int8_accuracy, name, value)
        monkeypatch.setattr(sys, "argv", ["int8_accuracy.py", *names, "--results", str(path)])
        code = run_command("int8_accuracy", int8_accuracy.command)
        return code, json.loads(path.read_text(encoding="utf-8")), made

    return run


def dates(found: dict) -> list[tuple[str, str, str]]:
    return [
        (each["checkpoint_sha256"], each["precision"], each["environment"]["date"][:10]) for each in found["results"]
    ]


def test_what_is_done_is_not_done_again_and_keeps_its_date(call):
    code, found, made = call("a", version="1", date="2030-01-01")
    assert (code, made) == (0, [("a", kind) for kind in KINDS])
    code, found, made = call("a", "b", version="1", date="2030-01-02")
    assert (code, made) == (0, [("b", kind) for kind in KINDS])
    assert dates(found) == [("a", kind, "2030-01-01") for kind in KINDS] + [("b", kind, "2030-01-02") for kind in KINDS]
    assert found["date"] == "2030-01-02"


def test_rows_of_other_packages_are_made_again_in_place_of_the_old_ones(call):
    call("a", version="1", date="2030-01-01")
    code, found, made = call("a", version="2", date="2030-01-02", drop=99.0)
    assert (code, made) == (1, [("a", kind) for kind in KINDS])
    assert dates(found) == [("a", kind, "2030-01-02") for kind in KINDS]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"results": [{}]}', '{"results": 1}', "\udcff"])
def test_a_damaged_file_is_one_line(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "argv", ["int8_accuracy.py", "model.pt", "--results", str(path)])
    assert run_command("int8_accuracy", int8_accuracy.command) == 2
    said = capsys.readouterr().err
    assert said.startswith("int8_accuracy: error: ")
    assert str(path) in said
    assert said.count("\n") == 1
    assert path.read_bytes() == text.encode(errors="surrogateescape")


def test_the_committed_results_can_be_gone_on_with():
    (path,) = ROOT.glob("benchmarks/results/*/2026-11-25-int8-accuracy.json")
    assert len(int8_accuracy.read_rows(path)) == 8
