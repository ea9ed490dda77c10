"""benchmarks/gpu_suite.py without a GPU: the dry run reaches every part; what was measured is kept and not redone."""

import json
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rd_deploy.chain import Conv
from rd_deploy.common import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py")]
FEW = ["--engines", "torch-cuda"]  # without our engine, whose interpreter is slow
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite
from gpu import card, correctness, dry, kernels, memory, speed, steps, table
from gpu.record import FORMAT, Record, default_path, open_record
from gpu.suite import Row, Suite, Unsupported


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, timeout=200)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["key"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.fixture
def here(monkeypatch):
    """The command in this process: it returns the exit code."""
    threads = torch.get_num_threads()

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *arguments])
        given = gpu_suite.options()
        return run_command("gpu_suite", lambda: gpu_suite.run(given))

    yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """One dry run of everything: what it printed and what it wrote."""
    path = tmp_path_factory.mktemp("suite") / "gpu.json"
    done = command("--dry", "--out", str(path))
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_a_dry_run_measures_every_part_and_finds_nothing_wrong(whole):
    done, document = whole
    rows = {row["key"]: row for row in document["rows"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {key[0] for key in rows} == set("abcde")
    assert not [key for key, row in rows.items() if row["status"] in ("failed", "not measured")]
    kinds = {key.split("/")[3].split("(")[0] for key in rows if key.startswith("a/fp16/kernel/")}
    assert {"ConvKernel", "MaxPoolKernel", "AveragePoolKernel"} <= kinds
    order = [key.split("/")[2] == "kernel" for key in rows if key.startswith("a/")]
    assert order == sorted(order, reverse=True)  # a kernel that faults is named before a network runs it
    for key in ("a/fp16/plain50/cuda", "a/fp16/resnet50/cuda", "a/fp16/plain50/torch-cuda"):
        assert rows[key]["status"] == "passed"
        assert rows[key]["replays_equal"]
    skipped = [row["reason"] for key, row in rows.items() if row["status"] == "skipped" and "tensorrt" in key]
    assert skipped


def test_a_dry_run_writes_what_a_reader_of_figures_needs(whole):
    rows = {row["key"]: row for row in whole[1]["rows"]}
    pair = rows["b/fp16/1/cuda"]
    assert pair["low"] <= pair["ratio"] <= pair["high"]
    assert len(pair["model"]["samples_ms"]) == 2 * pair["quads"]
    assert pair["model"]["predicted_ms"] > 0
    assert pair["model"]["compile_seconds"] > 0
    assert pair["model"]["images_per_second"] == pytest.approx(1e3 / pair["model"]["median_ms"])
    assert rows["b/fp16/1/ours-against-best"]["compare_engine"] == "torch-cuda"
    assert rows["b/fp16/1/torch-cuda/host"]["status"] == "measured"
    peaks = rows["c/1/ledger"]["peaks"]
    assert peaks["ledger separate"]["resnet50"] >= peaks["ledger in-place"]["resnet50"]
    assert rows["c/1/cuda"]["peaks"]["cuda arena"]["plain50"] > 0
    profile = rows["d/fp16/1/plain50"]
    assert profile["sum_us"] == pytest.approx(sum(step["us"] for step in profile["steps"]))
    assert len(profile["worst"]) == 2
    assert profile["whole_us"] > 0
    assert profile["tuned_us"] == pytest.approx(sum(step["tuned_us"] for step in profile["steps"]))
    assert set(rows["d/fp16/limits"]["limits"]) == {"tflops", "dram_gb_s", "l2_gb_s", "how"}
    assert rows["e/plain20"]["images_per_second"] > 0


def test_a_dry_run_cannot_pass_for_a_measurement(whole):
    done, document = whole
    assert document["dry"] is True
    assert document["card"]["name"] == "dry run"
    assert "DRY RUN" in done.stdout
    assert all(name in document for name in ("commit", "sources", "versions", "date", "warnings", "sittings"))


def test_the_table_ends_the_output(whole):
    lines = whole[0].stdout.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("dry run, commit"))) :]
    assert any(line.startswith("correct: ") and " 0 failed" in line for line in table)
    assert any(line.startswith("fp16/1/cuda ") for line in table)
    assert any("the two worst" in line for line in table)
    assert table[-1].startswith("written: ")


def test_rows_can_be_picked(tmp_path, here, capsys):
    path = tmp_path / "gpu.json"
    assert here("--dry", "--part", "c", "--rows", "ledger", "--out", str(path)) == 0
    assert list(rows_of(path)) == ["c/1/ledger"]
    assert here("--dry", "--part", "c", "--rows", "leger", "--out", str(path)) == 2
    assert "no row of parts c has 'leger' in its key" in capsys.readouterr().err


def test_a_killed_run_goes_on_after_its_last_row(tmp_path):
    path = tmp_path / "gpu.json"
    arguments = ["--dry", "--part", "c,e", *FEW, "--out", str(path)]
    with subprocess.Popen(
        [*SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("c/1/torch-cuda: measured"):
                process.kill()
    before = rows_of(path)
    assert "c/1/torch-cuda" in before
    assert "e/resnet20" not in before
    done = command(*arguments)
    after = rows_of(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {key: after[key] for key in before} == before  # with the seconds that they took
    assert not [line for line in done.stdout.splitlines() if line.startswith("c/1/torch-cuda: ")]
    assert after["e/resnet20"]["status"] == "measured"
    assert len(json.loads(path.read_text(encoding="utf-8"))["sittings"]) == 2


def test_what_there_was_no_time_for_is_listed_and_tried_again(tmp_path, here, capsys):
    path = tmp_path / "gpu.json"
    assert here("--dry", "--part", "c", "--minutes", "0", *FEW, "--out", str(path)) == 0
    assert {row["status"] for row in rows_of(path).values()} == {"not measured"}
    assert "not measured: out of time: c/1/ledger, c/1/torch-cuda" in capsys.readouterr().out
    assert here("--dry", "--part", "c", *FEW, "--out", str(path)) == 0
    assert {row["status"] for row in rows_of(path).values()} == {"measured"}


def test_all_parts_together_have_their_time_too(tmp_path, here, capsys):
    path = tmp_path / "gpu.json"
    assert here("--dry", "--part", "c,e", "--total", "0", *FEW, "--out", str(path)) == 0
    assert {row["status"] for row in rows_of(path).values()} == {"not measured"}
    assert here("--dry", "--total", "-1", "--out", str(path)) == 2


def test_compiling_counts_against_the_time_of_a_part(tmp_path, monkeypatch):
    tried, ran = suite(tmp_path / "r.json", minutes=0.001), []
    monkeypatch.setattr(Suite, "prepare", lambda self, precision: time.sleep(0.1))
    tried.run("b", [Row("b/1", lambda: ran.append(1) or {}, "fp16"), Row("b/2", lambda: ran.append(2) or {})])
    assert not ran
    assert {row["reason"] for row in rows_of(tmp_path / "r.json").values()} == {"out of time"}


def test_it_finds_this_checkout_without_an_installation(tmp_path):
    """From elsewhere, without PYTHONPATH and without what an editable installation adds to the packages."""
    packages = sysconfig.get_paths()["purelib"]
    code = f"import runpy, sys; sys.path.append({packages!r}); print(runpy.run_path({str(SCRIPT[1])!r})['UserError'])"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{UserError}\n", done.stderr


def test_a_wrong_engine_has_no_time(tmp_path, monkeypatch):
    tried = suite(tmp_path / "r.json")
    images = tried.session("torch-cuda", "plain50", "fp16", 1)[0].images
    assert torch.equal(images.float(), torch.from_numpy(tried.images(1)).half().float())  # and not zeros
    wrong = suite(tmp_path / "wrong.json")
    monkeypatch.setattr(dry.DryTorchSession, "_run", lambda self, given: np.zeros((1, 10), np.float32))
    wrong.run("b", [next(speed.rows(wrong))])
    row = rows_of(tmp_path / "wrong.json")["b/fp16/1/torch-cuda"]
    assert row["status"] == "failed"
    assert "wrong logits of plain50 at batch 1: off by" in row["reason"]


def test_a_failure_is_the_exit_code(tmp_path, here, monkeypatch, capsys):
    def fails(*given) -> dict:
        raise ValueError("broken")

    monkeypatch.setattr(memory, "ledger", fails)
    assert here("--dry", "--part", "c", *FEW, "--out", str(tmp_path / "gpu.json")) == 1
    assert "failed: ValueError: broken: c/1/ledger" in capsys.readouterr().out


def test_an_unknown_part_is_one_line():
    done = command("--dry", "--part", "z")
    assert done.returncode == 2
    assert done.stderr == "gpu_suite: error: unknown part 'z' (known: a, b, c, d, e)\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--dry", "--engines", "torch-cuta"], "did you mean 'torch-cuda'?"),
        (["--dry", "--batch", "many"], "--batch many"),
    ],
)
def test_bad_options_are_one_line(tmp_path, here, capsys, arguments, words):
    assert here(*arguments, "--out", str(tmp_path / "gpu.json")) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(here, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert here() == 2
    assert "--dry runs without one" in capsys.readouterr().err


# --- in this process


def head(**changes) -> dict:
    same = {"dry": True, "sources": "s", "card": {"name": "c", "driver": "1"}, "assembler": "13.3"}
    same |= {"versions": {"torch": "2.11"}, "settings": {"RD_TUNE": "1"}}
    return {"format": FORMAT, **same, "commit": None, "date": "2026-11-29", **changes}


def suite(path: Path, **changes) -> Suite:
    record = open_record(path, head(), {"date": "today", "commit": "c0ffee"})
    return replace(Suite(record, (1,), ("fp16",), ("torch-cuda",), 8, 2, 1, True), **changes)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sources": "other"}, r"another state of the sources \(s, here other\): give another --out"),
        ({"dry": False}, r"another dry run \(True, here False\)"),
        ({"card": {"name": "other", "driver": "1"}}, r"another card \(c, here other\)"),
        ({"card": {"name": "c", "driver": "2"}}, r"another driver \(1, here 2\)"),
        ({"assembler": "13.4"}, r"another assembler \(13.3, here 13.4\)"),
        (
            {"versions": {"torch": "2.12"}, "settings": {"RD_TUNE": "0"}},
            r"another torch \(2.11, here 2.12\) and RD_TUNE \(1, here 0\)",
        ),
    ],
    ids=("sources", "dry", "card", "driver", "assembler", "versions and settings"),
)
def test_results_of_something_else_are_not_continued(tmp_path, changed, words):
    open_record(tmp_path / "r.json", head(), {})
    before = (tmp_path / "r.json").read_text()
    with pytest.raises(UserError, match=words):
        open_record(tmp_path / "r.json", head(**changed), {})
    assert (tmp_path / "r.json").read_text() == before


def test_a_package_may_be_added_and_no_version_is_lost(tmp_path):
    """Without it an engine was skipped. The next sittings are compared with what any of them had."""
    path, torch_and_more = tmp_path / "r.json", {"torch": "2.11", "tensorrt": "10"}
    open_record(path, head(), {})
    open_record(path, head(versions=torch_and_more), {})
    assert open_record(path, head(), {}).head["versions"] == torch_and_more
    with pytest.raises(UserError, match=r"another tensorrt \(10, here 11\)"):
        open_record(path, head(versions=torch_and_more | {"tensorrt": "11"}), {})


def test_settings_of_our_engine_belong_to_the_file(tmp_path, here, monkeypatch, capsys):
    arguments = ("--dry", "--part", "c", "--rows", "ledger", "--out", str(tmp_path / "gpu.json"))
    monkeypatch.delenv("RD_TUNE", raising=False)
    assert here(*arguments) == 0
    monkeypatch.setenv("RD_TUNE", "1")  # the default
    assert here(*arguments) == 0
    monkeypatch.setenv("RD_TUNE", "0")
    assert here(*arguments) == 2
    assert "another RD_TUNE (1, here 0): give another --out" in capsys.readouterr().err


def test_each_row_says_its_sitting(tmp_path):
    path = tmp_path / "r.json"
    for day, commit in ((1, "a"), (2, "b")):
        given = head(commit=commit, date=f"2026-12-0{day}")
        record = open_record(path, given, {"date": given["date"], "commit": commit})
        record.add(f"e/{day}", {"status": "passed"})
    assert [row["sitting"] for row in rows_of(path).values()] == [
        {"date": "2026-12-01", "commit": "a"},
        {"date": "2026-12-02", "commit": "b"},
    ]
    assert table.text(record).startswith("c, commit a, b, sources s")


def test_committed_results_can_still_be_read():
    path = ROOT / "benchmarks" / "results" / "nvidia-h200" / "gpu-2026-11-29.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    record = Record(path, document, {row["key"]: row for row in document["rows"]}, document["sittings"])
    lines = table.text(record).splitlines()
    assert lines[0] == "NVIDIA H200, commit 862ac30ea48b, sources 93e50afc4af4bcdf"
    assert any("1.218x (1.217 to 1.220)" in line for line in lines)
    with pytest.raises(UserError, match=r"another dry run .* and state of the sources .* and card"):
        open_record(path, head(), {})


def test_a_sitting_goes_on_with_the_newest_file_that_it_can_go_on_with(tmp_path):
    def begin(name: str, **changes) -> None:
        open_record(tmp_path / name, head(**changes), {})

    def path(**changes) -> tuple[str, str]:
        found, reason = default_path(tmp_path, "gpu-2026-11-30", head(**changes))
        return found.name, reason

    assert path() == ("gpu-2026-11-30.json", "")
    (tmp_path / "gpu-empty.json").touch()
    (tmp_path / "probe.json").write_text("[]")
    begin("gpu-2026-11-28.json", date="2026-11-28T01")
    begin("gpu-2026-11-29.json", date="2026-11-29T01")
    begin("gpu-2026-11-30.json", date="2026-11-30T01", settings={"RD_TUNE": "0"})
    assert path() == ("gpu-2026-11-29.json", "")
    assert path(settings={"RD_TUNE": "0"}) == ("gpu-2026-11-30.json", "")
    other = path(versions={"torch": "2.12"}, settings={"RD_TUNE": "0"})
    assert other == ("gpu-2026-11-30-2.json", "gpu-2026-11-30.json is of another torch (2.11, here 2.12)")
    begin("gpu-2026-11-30-2.json", date="2026-11-30T02", sources="t")
    assert path(sources="u")[0] == "gpu-2026-11-30-3.json"


def test_after_midnight_the_same_command_goes_on(tmp_path, here, monkeypatch, capsys):
    folder, arguments = tmp_path / "dry-run", ("--dry", "--part", "c", "--rows", "ledger")
    days = iter((datetime(2026, 11, 29, 23, 59, tzinfo=UTC), *3 * [datetime(2026, 11, 30, 0, 1, tzinfo=UTC)]))
    monkeypatch.delenv("RD_TUNE", raising=False)
    monkeypatch.setattr(gpu_suite, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_suite, "datetime", SimpleNamespace(now=lambda zone: next(days)))
    assert here(*arguments) == 0
    assert capsys.readouterr().out.startswith(f"new results: {folder / 'gpu-2026-11-29-dry.json'}\n")
    assert here(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"going on with {folder / 'gpu-2026-11-29-dry.json'} (rows: 1)\n")
    assert "c/1/ledger: measured" not in out
    monkeypatch.setenv("RD_TUNE", "0")
    assert here(*arguments) == 0
    out = capsys.readouterr().out
    reason = "gpu-2026-11-29-dry.json is of another RD_TUNE (1, here 0)"
    assert out.startswith(f"new results: {folder / 'gpu-2026-11-30-dry.json'} ({reason})\n")


def test_a_row_of_fewer_seconds_is_measured_again(tmp_path, here):
    path = tmp_path / "gpu.json"
    arguments = ("--dry", "--part", "b", *FEW, "--out", str(path))

    def again(path: Path) -> list[str]:
        return [text for text in json.loads(path.read_text(encoding="utf-8"))["warnings"] if "again" in text]

    def sampled(*more: str) -> dict[str, tuple[float, list[float]]]:
        assert here(*arguments, *more) == 0
        rows = rows_of(path)
        measured = {key: row for key, row in rows.items() if row["status"] == "measured"}
        assert set(measured) == {"b/fp16/1/torch-cuda", "b/fp16/1/torch-cuda/host"}
        return {key: (row["sampling_seconds"], row["model"]["samples_ms"]) for key, row in measured.items()}

    smoke = sampled("--seconds", "0")
    real = sampled("--seconds", "2")
    assert {seconds for seconds, _ in smoke.values()} == {0}
    assert {seconds for seconds, _ in real.values()} == {2}
    assert sampled("--seconds", "2") == sampled("--seconds", "1") == real
    assert sampled("--seconds", "3", "--minutes", "0") == real  # better than nothing
    assert again(path) == [f"{key}: not measured again, with more sampling: out of time" for key in real]
    assert {seconds for seconds, _ in sampled("--seconds", "3").values()} == {3}
    assert again(path) == []


def test_figures_of_a_row_that_fails_later_are_kept_and_count_no_more(tmp_path):
    record = Record(tmp_path / "gpu.json", {}, {"b/x": {"status": "measured", "sampling_seconds": 2.0}}, [{}])
    record.add("b/x", {"status": "failed", "reason": "no memory"})
    assert (record.failures, record.finished("b/x", 3.0)) == (["b/x"], True)
    assert record.rows["b/x"]["earlier"] == {"status": "measured", "sampling_seconds": 2.0}


class Stand:
    """In place of sessions: which engines and networks were asked for, and ResNet-50's time on each engine."""

    def __init__(self, monkeypatch, **times: float):
        self.asked: list[tuple[str, str]] = []
        self.times = times
        monkeypatch.setattr(speed, "ENGINES", dict.fromkeys(("torch-cuda", "cuda", "tensorrt", "third")))
        monkeypatch.setattr(speed, "_pair", lambda suite, engine, *setting: self._measured(engine))
        monkeypatch.setattr(speed, "_host", lambda *given: {})
        monkeypatch.setattr(speed, "_compared", lambda *given: self._measured("cuda"))
        monkeypatch.setattr(Suite, "prepare", lambda self, precision: None)
        monkeypatch.setattr(Suite, "session", lambda suite, *key: self._session(key))

    def _measured(self, engine: str) -> dict:
        return {"compare": {"median_ms": self.times[engine.replace("-", "_")]}, "warnings": []}

    def _session(self, key: tuple) -> tuple:
        self.asked.append(key[:2])
        return SimpleNamespace(enqueue=None), 0.0

    def best(self, path: Path, *engines: str, text: str = "", **options) -> dict | None:
        """Of a sitting with these engines: what it says of ours against the best."""
        self.asked.clear()
        sitting = suite(path, engines=engines, **options)
        sitting.run("b", gpu_suite.picked(speed.rows(sitting), text, []))
        return rows_of(path).get("b/fp16/1/ours-against-best")


def test_ours_is_compared_with_the_best_of_all_sittings(tmp_path, monkeypatch):
    path, stand = tmp_path / "r.json", Stand(monkeypatch, cuda=2.0, torch_cuda=4.0, tensorrt=1.0, third=9.0)
    first = stand.best(path, "torch-cuda", "cuda")
    assert first["considered"] == ["torch-cuda", "cuda"]
    assert (first["compare_engine"], first["best_engine"]) == ("torch-cuda", "cuda")
    assert stand.best(path, "torch-cuda", "cuda") == first
    assert not stand.asked  # nothing is measured again
    second = stand.best(path, "cuda", "tensorrt")
    assert second["considered"] == ["torch-cuda", "cuda", "tensorrt"]
    assert (second["compare_engine"], second["best_engine"]) == ("tensorrt", "tensorrt")
    assert stand.asked == [("cuda", "plain50"), ("tensorrt", "resnet50")]
    assert stand.best(path, "torch-cuda", "cuda") == second  # with fewer engines there is no other best
    assert stand.best(path, "third", "cuda")["reason"] == "needs tensorrt among --engines"
    assert stand.best(path, "cuda", "tensorrt")["considered"] == ["torch-cuda", "cuda", "tensorrt", "third"]


def test_an_outdated_best_is_gone_even_where_no_new_one_is_measured(tmp_path, monkeypatch):
    path, stand = tmp_path / "r.json", Stand(monkeypatch, cuda=2.0, torch_cuda=4.0, tensorrt=1.0)
    assert stand.best(path, "torch-cuda", "cuda")["compare_engine"] == "torch-cuda"
    assert stand.best(path, "tensorrt", text="tensorrt") is None
    assert "b/fp16/1/tensorrt" in rows_of(path)
    found = stand.best(path, "torch-cuda", "cuda", "tensorrt", minutes=0)
    assert (found["status"], found["reason"]) == ("not measured", "out of time")


def test_another_best_of_the_same_engines_is_compared_again(tmp_path, monkeypatch):
    path, stand = tmp_path / "r.json", Stand(monkeypatch, cuda=2.0, torch_cuda=4.0, tensorrt=1.0)
    engines = ("torch-cuda", "cuda", "tensorrt")
    assert stand.best(path, *engines)["compare_engine"] == "tensorrt"
    document = json.loads(path.read_text(encoding="utf-8"))
    row = next(row for row in document["rows"] if row["key"] == "b/fp16/1/tensorrt")
    row["compare"]["median_ms"] = 8.0  # as if it had been measured again, with more sampling
    path.write_text(json.dumps(document))
    assert stand.best(path, *engines)["compare_engine"] == "torch-cuda"


def test_a_kernel_without_configurations_is_not_passed(tmp_path):
    tried = suite(tmp_path / "r.json")
    piece = SimpleNamespace(kernel=SimpleNamespace(configs=lambda card: ()))
    tried.run("a", [Row("a/kernel", lambda: correctness._kernel(tried, None, piece, "fp16"))])
    row = rows_of(tmp_path / "r.json")["a/kernel"]
    assert (row["status"], row["reason"]) == ("skipped", "no configuration of it fits this card")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}', '{"format": "x", "rows": [{}], "sittings": 1}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError):
        open_record(tmp_path / "r.json", head(), {})
    assert (tmp_path / "r.json").read_text() == content


def test_one_failing_row_costs_no_other(tmp_path):
    def fails() -> dict:
        raise ValueError("no such thing\nand more")

    def refuses() -> dict:
        raise Unsupported("not here")

    tried = suite(tmp_path / "r.json")
    tried.run("b", [Row("b/1", fails), Row("b/2", refuses), Row("b/3", lambda: {"value": 1})])
    rows = rows_of(tmp_path / "r.json")
    assert [rows[key]["status"] for key in ("b/1", "b/2", "b/3")] == ["failed", "skipped", "measured"]
    assert rows["b/1"]["reason"] == "ValueError: no such thing"
    assert tried.record.failures == ["b/1"]


def test_the_dry_networks_are_whole_chains():
    for name, adds in (("plain50", 0), ("resnet50", 2)):
        chain = dry.chain(name)
        chain.check()
        assert sum(isinstance(step, Conv) and step.add is not None for step in chain.steps) == adds


def test_the_bound_holds_for_right_kernels_and_not_for_wrong_ones(monkeypatch):
    """A weight that is left out, a bias that is off by 2%: the bound must tell rounding from mistakes."""
    import rd_deploy.cuda.session as session
    from rd_deploy.triton_kernels.cards import get_card

    chain, pack = dry.chain("resnet50"), session.pack
    singles = [piece for piece in kernels.pieces(chain, 1) if len(piece.steps) == 1]
    pieces = [piece for piece in singles if isinstance(piece.steps[0], Conv)][:4]

    def faults(change) -> list[bool]:
        monkeypatch.setattr(session, "pack", lambda *given: change(pack(*given)))
        card, checked = get_card("h100"), kernels.Check(chain, 1, "fp16", "cpu")
        return [bool(kernels.check(checked, piece, piece.kernel.configs(card)[:1], False)["wrong"]) for piece in pieces]

    def without_a_weight(packed: dict) -> dict:
        return {name: _zeroed(values) if values.ndim > 1 else values for name, values in packed.items()}

    def with_another_bias(packed: dict) -> dict:
        return {name: values * 1.02 + 0.02 if values.ndim == 1 else values for name, values in packed.items()}

    assert not any(faults(lambda packed: packed))
    assert all(faults(without_a_weight))
    assert all(faults(with_another_bias))


def test_a_sum_that_is_wrong_in_place_is_found(monkeypatch):
    """Here every kernel that is given one memory for both writes ones."""
    from rd_deploy.triton_kernels.cards import get_card
    from rd_deploy.triton_kernels.launch import Launch

    chain, run = dry.chain("resnet50"), Launch.run
    piece = next(piece for piece in kernels.pieces(chain, 1) if kernels.added(piece))

    def checked() -> list[dict]:
        configs = piece.kernel.configs(get_card("h100"))[:1]
        return kernels.check(kernels.Check(chain, 1, "fp16", "cpu"), piece, configs, False)["wrong"]

    def overwrites(self, operands) -> None:
        run(self, operands)
        if operands.get("add") is operands["out"]:
            operands["out"][:8] = 1

    assert not checked()
    monkeypatch.setattr(Launch, "run", overwrites)
    assert [entry["faults"] for entry in checked()] == [["differs in place"]]


def test_a_configuration_that_is_lost_is_named_and_the_others_are_checked():
    from rd_deploy.helper import Lost

    piece = next(kernels.pieces(dry.chain("resnet50"), 1))

    def ask(choice):
        _, config, _ = choice
        if config == "second":
            raise Lost("its process ended with -6")
        return (0.25, ["differs with PDL"]) if config == "third" else (0.5, [])

    found = kernels.check(ask, piece, ("first", "second", "third"), False)
    assert found == {
        "configs": 3,
        "error_of_bound": 0.5,
        "wrong": [
            {"config": "second", "faults": ["its process ended with -6"]},
            {"config": "third", "faults": ["differs with PDL"]},
        ],
    }


def test_a_kernel_that_is_lost_again_and_again_is_left(monkeypatch):
    from rd_deploy.helper import Lost

    asked = []

    def ask(choice):
        asked.append(choice)
        raise Lost("no answer within 60 s")

    found = kernels.check(ask, next(kernels.pieces(dry.chain("resnet50"), 1)), tuple("abcdef"), False)
    assert (len(asked), len(found["wrong"]), found["error_of_bound"]) == (kernels.MOST_LOST, 6, None)


def test_a_check_in_another_process_says_the_same():
    from rd_deploy.helper import Helper
    from rd_deploy.triton_kernels.cards import get_card

    chain = dry.chain("plain50")
    piece = next(kernels.pieces(chain, 1))
    here, choice = (
        kernels.Check(chain, 1, "fp16", "cpu"),
        (piece.kernel, piece.kernel.configs(get_card("h100"))[0], False),
    )
    with Helper(here, 120) as there:
        assert there(choice) == here(choice)
        assert there(choice)[1] == []


def test_a_broken_context_ends_the_checking_process(monkeypatch):
    from rd_deploy.cuda import trial
    from rd_deploy.helper import Fatal
    from rd_deploy.triton_kernels.cards import get_card

    def fault(*given):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def broken():
        raise RuntimeError("again")

    chain = dry.chain("plain50")
    piece = next(kernels.pieces(chain, 1))
    check, choice = (
        kernels.Check(chain, 1, "fp16", "cpu"),
        (piece.kernel, piece.kernel.configs(get_card("h100"))[0], False),
    )
    monkeypatch.setattr(kernels, "_run", fault)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        check(choice)  # the context is whole
    waits = iter([None])  # for the reference
    monkeypatch.setattr(trial, "wait", lambda: next(waits, broken) and broken())
    with pytest.raises(Fatal, match=r"^it broke the GPU's context: CUDA error: an illegal memory access"):
        kernels.Check(chain, 1, "fp16", "cpu")(choice)


def _zeroed(values):
    """Without its largest entry."""
    changed = values.copy()
    changed.reshape(-1)[abs(changed).argmax()] = 0
    return changed


def test_doubts_about_the_card():
    cool = {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 40.0, "watts": 300.0, "slowed_by": []}
    assert card.doubts(cool, cool) == []
    assert card.doubts(None, cool) == []
    assert card.doubts(cool, cool | {"sm_mhz": 1700.0}) == ["the clock moved from 1980 to 1700 MHz"]
    assert card.doubts(cool, cool | {"slowed_by": ["power cap"]}) == ["slowed down by power cap"]


def test_what_the_driver_says_is_read(monkeypatch, tmp_path):
    answers = {"clocks_event_reasons.active": "1980, 2619, 41, 312.5, 0x0000000000000024", "driver_version": "580.1"}
    monkeypatch.setattr(card.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(card, "_identity", lambda: "0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Smi:
        """Still busy when it is first asked."""

        def __init__(self, command, **options):
            self._answer = answers.get(command[2].removeprefix("--query-gpu=").split(",")[-1])
            self.returncode, self._polls = 2 if self._answer is None else 0, iter([None])

        def poll(self):
            return next(self._polls, self.returncode)

        def communicate(self, timeout):
            return self._answer or "", None

    monkeypatch.setattr(card.subprocess, "Popen", Smi)
    expected = {"sm_mhz": 1980, "memory_mhz": 2619, "celsius": 41, "watts": 312.5}
    assert card.state(False) == expected | {"slowed_by": ["power cap", "temperature"]}
    assert card._driver() == "580.1"
    worked: list[int] = []
    assert card.state(False, lambda: worked.append(1))["watts"] == 312.5
    assert len(worked) == 2  # before it starts, and while it is busy
    answers.clear()
    assert card.state(False) is None


def test_the_worst_steps_lose_most_time():
    found = [{"name": name, "lost_us": lost} for name, lost in (("a", 1), ("b", 30), ("c", 2))]
    assert [step["name"] for step in steps.worst(found)] == ["b", "c"]


@pytest.mark.parametrize(
    ("maps", "weights", "flops", "limit", "least"),
    [
        (4e6, 1e6, 1e8, "l2", 4e6 / 4e12 + 1e6 / 2e12),  # maps stay in the L2 cache, weights come from DRAM
        (4e6, 9e6, 1e8, "dram", 4e6 / 4e12 + 9e6 / 2e12),
        (64e6, 1e6, 1e8, "dram", 65e6 / 2e12),
        (4e6, 1e6, 1e12, "arithmetic", 1e12 / 500e12),
    ],
)
def test_a_step_is_judged_by_where_its_maps_and_its_weights_come_from(maps, weights, flops, limit, least):
    step = SimpleNamespace(map_bytes=maps, weight_bytes=weights, flops=flops, name="x", kernel="k", settings={})
    step.us = step.predicted_us = 1.0
    limits = {"tflops": 500.0, "dram_gb_s": 2000.0, "l2_gb_s": 4000.0}
    found = steps._step(step, 4 * least, limits, l2_bytes=50 << 20)
    assert (found["limit"], found["share"]) == (limit, pytest.approx(0.25))
    assert found["lost_us"] == pytest.approx(3e6 * least)


def test_warnings_and_failures_come_from_the_rows(tmp_path):
    record = Record(tmp_path / "r.json", head(), sittings=[{"date": "today"}])
    record.add("b/1", {"status": "measured", "warnings": ["slow"]})
    record.add("a/1", {"status": "failed", "reason": "wrong"})
    assert record.warnings == ["b/1: slow"]
    assert record.failures == ["a/1"]
    assert json.loads(record.path.read_text())["warnings"] == ["b/1: slow"]
