"""README.md and the pages under docs/ say what the committed results say."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "accuracy")]  # as the scripts have it

import accuracy_tables
import committed
import cpu_tables
import plot
import summary
from experiments import experiments
from PIL import Image

MAIN = experiments()["main"]
RUNS = 3 * sum(len(MAIN.depths_of(row)) for row in MAIN.rows)  # by three seeds
SHORT_RUNS = 3 * sum(len(MAIN.depths_of(row)) for row in MAIN.rows if row.key in accuracy_tables.SHORT)


@pytest.fixture
def checkout(tmp_path):
    """What the script reads, to be changed."""
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").rglob("*.json")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for path in files:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def tables(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = [sys.executable, str(root / "benchmarks" / "tables.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True)


def results(missing: int = 0) -> dict:
    """A main table of three seeds in which ours is 0.2 points below the ResNet and 3 above the published method."""
    mean = {"resnet": 0.9, "resnet-tuned": 0.9, "ours": 0.898, "published": 0.868, "plain": 0.8}
    runs = [
        {
            **{"name": MAIN.name(row, depth), "seed": seed, "test_accuracy": mean.get(row.key, 0.85) + 0.001 * seed},
            **{
                "epochs": round(10 * row.times),
                "train_images": 20_000,
                "step_cost": 1.0 if row.key == "plain" else 1.5,
                "seconds": 7.0,
            },
            **{"precision": "bf16", "val_accuracy": 0.9},
        }
        for row in MAIN.rows
        for depth in MAIN.depths_of(row)
        for seed in range(3)
    ]
    left = [{"name": run["name"], "seed": run["seed"], "why": "not begun"} for run in runs[len(runs) - missing :]]
    rows = summary.summary(MAIN, runs[: len(runs) - missing])
    return {
        **{"experiment": "main", "what": "What was trained", "command": "the command", "date": "2030-01-01"},
        **{"commit": "abc", "note": "A note.", "machine": {"cpu": "CPU"}, "complete": not missing, "missing": left},
        **{"rows": rows, "comparisons": summary.comparisons(rows), "results": runs[: len(runs) - missing]},
    }


def commit(root: Path, document: dict) -> None:
    """As the only experiment of accuracy that there are results of."""
    for other in root.rglob("*-accuracy-*.json"):
        other.unlink()
    path = root / "benchmarks" / "results" / "here" / "2030-01-01-accuracy-main.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_the_pages_are_made_from_the_results():
    checked = tables(ROOT, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def claim(name: str, value: float | None, holds: bool | None) -> dict:
    return {"name": f"speed/{name}", "target": 1.4, "value": value, "low": value, "high": value, "holds": holds}


def speed_ratio(value: float, **others: object) -> dict:
    return {"precision": "fp32", "batch": 1, "ratio": value, "low": value, "high": value, **others}


def test_the_claim_of_speed_is_told_for_both_questions():
    row = speed_ratio(1.5)
    bench = {"warnings": ["native fp32 batch 1: unsteady"]}
    bench["claims"] = [
        claim("native/fp32/batch-1", 9.0, False),  # one engine's is another question
        claim("native-against-others/fp32/batch-1", 1.5, True),
        claim("native-against-others/fp32/batch-8", 9.0, False),
        claim("best/fp32/batch-1", 1.38, None),
    ]
    bench["best"] = [speed_ratio(1.38, model_engine="native", compare_engine="native")]
    assert cpu_tables._together(bench, row) == "**1.50x (1.50 to 1.50)**"
    assert cpu_tables._alone(bench, row) == "1.38x (1.38 to 1.38) *undecided* *"
    bench["best"][0] |= {"compare_engine": "torch"}
    bench["claims"][-1] |= {"holds": False}
    assert cpu_tables._alone(bench, row) == "1.38x (1.38 to 1.38), native against torch"
    bench["best"][0] |= {"model_engine": "torch"}
    bench["warnings"] = ["torch fp32 batch 1: unsteady"]
    assert cpu_tables._alone(bench, row) == "1.38x (1.38 to 1.38) *, torch against torch"


def test_a_table_names_the_command_and_what_disturbed_its_run():
    packages = dict.fromkeys(("torch", "onnxruntime", "openvino"), "1")
    bench = {
        "environment": {"threads": 2, "cpu": {"model": "CPU"}, "date": "2030-01-01T00:00", "packages": packages}
        | {"variables": {"OMP_NUM_THREADS": "2"}},
        "options": {"seconds": 12.0, "precisions": ["fp32"]},
        "warnings": ["native fp32 batch 1: unstable", "load 2.30 on 2 CPUs at the start"],
        "path": "benchmarks/results/here/2030-01-01-bench-plain50.json",
    }
    said = cpu_tables.provenance(bench)
    assert said.count("Warning of that run") == 1  # those of a pair stand beside it
    assert "Warning of that run: load 2.30 on 2 CPUs at the start." in said
    command = "SECONDS_PER_PAIR=12 PRECISION=fp32 benchmarks/compare_resnet50.sh here"
    assert said.endswith(f"made by `{command}`.")
    bench["environment"]["variables"]["RD_ISA"] = "amx_bf16x2"
    assert cpu_tables.provenance(bench).endswith(f"made by `RD_ISA=amx_bf16x2 {command}`.")


def test_a_changed_figure_is_noticed(checkout):
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    (checkout / "README.md").write_text(readme.replace("x (", "y (", 1), encoding="utf-8")
    changed = tables(checkout, "--check")
    assert changed.returncode == 1
    assert changed.stdout.startswith("README.md differs")


def test_an_unknown_argument_writes_nothing(checkout):
    readme = (checkout / "README.md").read_text(encoding="utf-8").replace("x (", "y (", 1)
    (checkout / "README.md").write_text(readme, encoding="utf-8")
    refused = tables(checkout, "--chek")
    assert refused.returncode == 2
    assert "unrecognized arguments: --chek" in refused.stderr
    assert (checkout / "README.md").read_text(encoding="utf-8") == readme


def test_which_of_two_machines_results_of_one_day_counts_does_not_depend_on_the_order_of_files(tmp_path, monkeypatch):
    names = ["a/2030-01-02-x.json", "b/2030-01-01-x.json", "b/2030-01-02-x.json", "a/2030-01-01-x.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    for order in (names, names[::-1]):
        paths = [tmp_path / name for name in order]
        monkeypatch.setattr(committed, "RESULTS", SimpleNamespace(glob=lambda pattern, paths=paths: iter(paths)))
        assert committed.find("*-x.json")["path"] == "b/2030-01-02-x.json"


def test_the_pages_of_accuracy_say_what_the_results_say(checkout):
    page = checkout / "docs" / "accuracy.md"
    commit(checkout, results())
    changed = tables(checkout, "--check")
    assert changed.returncode == 1
    assert "README.md, docs/accuracy.md, docs/accuracy-choice.md differs" in changed.stdout
    assert tables(checkout).returncode == 0
    others = (page.with_name("accuracy-choice.md"), checkout / "README.md")
    text, choice, readme = (path.read_text(encoding="utf-8") for path in (page, *others))
    assert "| ResNet, cross-entropy | 90.10 ± 0.10 (3) | 90.10 ± 0.10 (3) | 1.50 | - | 7 |" in text
    assert "| plain, Kaiming, SGD, no teacher | 80.10 ± 0.10 (3) | 80.10 ± 0.10 (3) | 1.0 |\n" in readme
    assert "| **plain, `rd`** | 89.90 ± 0.10 (3) | 89.90 ± 0.10 (3) | 3.0 |\n" in readme  # 1.5, and its teacher's
    assert "logit" in text
    assert "logit" not in readme.partition("<!-- accuracy -->")[2].partition("<!-- /accuracy -->")[0]
    lines = [
        "| 56 | plain, ours | the ResNet by SGD | -0.20 (-0.20 to -0.20) | 0: -0.20, 1: -0.20, 2: -0.20 | **no** "
        "| yes |",
        "| 20 | plain, ours | the published loss | +3.00 (+3.00 to +3.00) | 0: +3.00, 1: +3.00, 2: +3.00 | - | yes |",
    ]
    assert all(line in text for line in lines)
    differences = readme.partition("<!-- accuracy-differences -->\n")[2].partition("<!-- /")[0].splitlines()
    assert len(differences) == 7
    same = "-0.20 (-0.20 to -0.20), 3 seeds"
    assert f"| the ResNet, SGD | {same} | {same} |" in differences
    assert "| 56 | plain, ours by SGD | the ResNet by SGD |" in text
    assert "| 56 | plain, ours | plain, ours from the former start, " in text
    file = "benchmarks/results/here/2030-01-01-accuracy-main.json"
    line = f"{RUNS} results · [source](#sources) A · [JSON](../{file}) · [how"
    assert f"What was trained; 10 or 12 or 20 epochs, bf16 · {line}" in text
    linked = f"[sources](docs/accuracy.md#sources) · [JSON]({file}) · [how to read](docs/accuracy.md#how-"
    assert f"What was trained; 10 or 20 epochs, bf16 · {SHORT_RUNS} results · {linked}" in readme
    assert "Not run yet: `python benchmarks/accuracy/table.py ablation`." in choice
    assert "Unfinished" not in text
    assert tables(checkout, "--check").returncode == 0
    page.write_text(text.replace("90.10", "91.10", 1), encoding="utf-8")
    assert tables(checkout, "--check").returncode == 1


def test_a_row_that_costs_less_at_a_depth_says_so(checkout):
    document = results()
    for row in document["rows"]:
        row["cost"] = {20: 1.19, 56: 1.09}[row["depth"]] if row["key"] == "ours" else 1.0
    commit(checkout, document)
    assert tables(checkout).returncode == 0
    text, readme = ((checkout / name).read_text(encoding="utf-8") for name in ("docs/accuracy.md", "README.md"))
    assert "| plain, ours | 89.90 ± 0.10 (3) | 89.90 ± 0.10 (3) | 1.19 (depth 20), 1.09 (depth 56) | " in text
    assert "| 90.10 ± 0.10 (3) | 90.10 ± 0.10 (3) | 1.00 | - | 7 |" in text
    assert "| **plain, `rd`** | 89.90 ± 0.10 (3) | 89.90 ± 0.10 (3) | 2.7, 2.6 |\n" in readme


def test_an_unfinished_table_says_so(checkout):
    commit(checkout, results(missing=8))
    assert tables(checkout).returncode == 0
    text = (checkout / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert f"**Unfinished: 8 of {RUNS} runs are missing.** plain56-rd-tuned-teacher-twice, seed 1 (not begun); " in text
    assert text.count("; and 3 more.") == 1


def test_the_readme_counts_what_is_missing_of_its_own_rows(checkout):
    document = results()
    kept = [run for run in document["results"] if run["name"] not in ("resnet56-kd", "resnet56-muon02")]
    rows = summary.summary(MAIN, kept)
    missing = [run | {"why": "not begun"} for run in document["results"] if run not in kept]
    document |= {"results": kept, "missing": missing, "rows": rows, "comparisons": summary.comparisons(rows)}
    commit(checkout, document)
    assert tables(checkout).returncode == 0
    readme, text = ((checkout / name).read_text(encoding="utf-8") for name in ("README.md", "docs/accuracy.md"))
    # A row that has results at another depth is one of the README's.
    assert f"**Unfinished: 3 of {SHORT_RUNS} runs are missing.** resnet56-muon02, seed 0 (not begun)" in readme
    assert f"**Unfinished: 6 of {RUNS} runs are missing.** resnet56-muon02, " in text
    assert text.index("| test accuracy, %") < text.index("**Unfinished")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty one, whose results are committed by ``write``: a document under a machine's name, which it gets too."""
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    monkeypatch.setattr(committed, "RESULTS", tmp_path / "benchmarks" / "results")

    def write(machine: str, name: str, results: list[dict], **others: str) -> dict:
        head = {
            "what": "W",
            "date": name[:10],
            "commit": machine,
            "machine": {"cpu": f"CPU {machine}"},
            "note": "N | M",
        }
        document = head | {"command": "table.py", "missing": [], "comparisons": [], **others}
        document |= {"results": results, "rows": summary.summary(MAIN, results)}
        path = committed.RESULTS / machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
        return {**{key: document[key] for key in ("date", "commit", "machine", "note")}, "file": name}

    return write


def run_of(name: str, seed: int, **others: object) -> dict:
    found = {"name": name, "seed": seed, "test_accuracy": 0.9, "epochs": 10, "train_images": 20_000, "step_cost": 1.0}
    return found | {"seconds": 7.0, "precision": "bf16", "val_accuracy": 0.9, **others}


def test_each_result_is_counted_at_the_file_that_held_it_first(repository):
    name = "2030-01-01-accuracy-main-first.json"
    first = repository("a", name, [run_of("resnet20", seed) for seed in range(3)])
    trained = [{"commit": "t"}]
    second = repository("b", name, [run_of("plain20-rd-tuned", seed, trained=trained) for seed in range(2)])
    gone = first | {"file": "2030-01-01-gone.json", "commit": "g"}
    taken = [run_of("resnet20", seed) | {"from": first} for seed in range(3)]
    taken += [run_of("plain20-rd-tuned", seed, trained=trained) | {"from": second} for seed in range(2)]
    taken += [run_of("resnet20-muon02", 0) | {"from": gone}, run_of("resnet20-muon02", 1)]
    command = f"table.py --earlier {name}"
    repository("b", "2030-01-02-accuracy-main.json", taken, commit="c", command=command)
    repository("b", "2030-01-02-accuracy-levers.json", taken[:4], commit="c", command="other", note="")
    lines = accuracy_tables.sources().splitlines()[2:]
    cells = [line[2:-2].replace("\\|", "/").split(" | ") for line in lines]
    assert [line[1].partition("]")[0].strip("[") for line in cells] == [
        *(f"a/{name}", f"b/{name}", "2030-01-01-gone.json"),
        *("b/2030-01-02-accuracy-levers.json", "b/2030-01-02-accuracy-main.json"),
    ]
    assert cells[0][1].endswith(f"](../benchmarks/results/a/{name})")
    assert [line[:1] + line[2:] for line in cells] == [
        ["A", "CPU a", "2030-01-01", "a", "main 3, levers 3", "N / M", "`table.py`"],
        ["B", "CPU b", "2030-01-01", "b; trained by t (2)", "main 2, levers 1", "N / M", "`table.py`"],
        ["C", "CPU a", "2030-01-01", "g", "main 1", "N / M", "-"],
        ["D", "CPU b", "2030-01-02", "c", "none", "-", "`other`"],
        ["E", "CPU b", "2030-01-02", "c", "main 1", "N / M", f"`table.py --earlier benchmarks/results/b/{name}`"],
    ]
    assert " · 7 results · [sources](#sources) A, B, C, E · " in accuracy_tables.experiment("main")()
    assert (
        " · 4 results · [sources](accuracy.md#sources) A, B · " in accuracy_tables.experiment("levers", "accuracy.md")()
    )


def test_a_file_is_known_by_what_wrote_it_also_under_a_later_name(repository):
    name = "2030-01-01-accuracy-main.json"
    origins = {machine: repository(machine, name, []) for machine in "ab"}
    where = {machine: committed.located(origin) for machine, origin in origins.items()}
    assert where == {machine: committed.RESULTS / machine / name for machine in "ab"}
    assert committed.located(origins["a"] | {"file": f"a/{name}"}) == where["a"]
    assert committed.located(origins["a"] | {"file": f"b/{name}"}) is None
    assert committed.located(origins["a"] | {"date": "2031-01-01"}) is None
    later = where["a"].with_name("2030-01-01-accuracy-main-first.json")
    where["a"].rename(later)
    repository("a", name, [], commit="later")
    committed._written.cache_clear()
    assert committed.located(origins["a"]) == committed.located(origins["a"] | {"file": f"a/{name}"}) == later
    later.with_name("2030-01-01-accuracy-main-second.json").write_bytes(later.read_bytes())
    assert committed.located(origins["a"]) is None  # two say that they are it


def test_commands_name_files_with_their_folders(repository):
    for machine, name in (("a", "one.json"), ("a", "both.json"), ("b", "both.json")):
        repository(machine, name, [])
    document = {"command": "python x --earlier one.json both.json none.json benchmarks/results/b/both.json"}
    for machine, both in (("b", "benchmarks/results/b/both.json"), ("c", "both.json")):
        said = committed.command_of(document | {"path": f"benchmarks/results/{machine}/document.json"})
        full = "benchmarks/results/a/one.json"
        assert said == f"python x --earlier {full} {both} none.json benchmarks/results/b/both.json"


def test_the_table_of_the_choice_has_the_best_of_a_network_first(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    assert accuracy_tables.choice() == "Not measured yet: `python benchmarks/accuracy/choice.py`."
    run = {"arch": "plain20", "seed": 0, "options": {}, "teacher": "resnet20-n20000-e10-s0", "left_out_accuracy": 0.93}
    run |= {"val_accuracy": 0.92, "test_accuracy": 0.91, "left_out_images": 35_000, "val_images": 5_000}
    better = run | {"teacher": "resnet20-muon02-n20000-e10-s0", "left_out_accuracy": 0.94}
    run["name"] = "plain20-rd-n20000-e10-s0"
    better |= {"name": "short"}
    other = run | {"arch": "resnet20", "teacher": None, "options": {"muon_lr": 0.02, "reparam": "none"}}
    other |= {"name": "resnet20-muon02-twice-n20000-e20-s0"}
    (tmp_path / "a").mkdir()
    document = {"results": [other, run, better, run | {"seed": 1}]}
    (tmp_path / "a" / "2030-01-01-accuracy-choice.json").write_text(json.dumps(document))
    lines = accuracy_tables.choice().splitlines()
    assert "left out (35,000), % | validation (5,000), %" in lines[0]
    assert lines[2:6] == [
        "| plain20 | - | resnet20-muon02 | 0 | 94.00 | 92.00 | 91.00 |",
        "| plain20 | - | resnet20 | 0 | 93.00 | 92.00 | 91.00 |",
        "| plain20 | - | resnet20 | 1 | 93.00 | 92.00 | 91.00 |",
        "| resnet20 | `epochs=20`, `muon_lr=0.02`, `reparam=none` | - | 0 | 93.00 | 92.00 | 91.00 |",
    ]


def test_what_main_compares_is_not_compared_again(repository):
    levers = experiments()["levers"]
    names = ("resnet56", "plain56-rd", "plain56-rd-muon", "plain56-rd-tuned")
    runs = [run_of(name, seed) for name in names for seed in range(3)]
    more = [*runs, run_of("plain56-rd-kd", 0)]
    rows = summary.summary(levers, more)
    repository("a", "2030-01-01-accuracy-levers.json", more, comparisons=summary.comparisons(rows))
    assert " | plain, ours | the ResNet by SGD | " in accuracy_tables.experiment("levers")()  # there is no main
    pairs = summary.comparisons(summary.summary(MAIN, runs))
    repository("a", "2030-01-01-accuracy-main.json", runs, comparisons=pairs)
    lines = [line for line in accuracy_tables.experiment("levers")().splitlines() if line.startswith("| 56 |")]
    assert lines == [
        "| 56 | plain, ours by SGD, with logit distillation | plain, ours by SGD | +0.00 (one seed) | 0: +0.00 |"
    ]


def test_the_picture_is_drawn_from_the_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "main.json").write_text(json.dumps(results(missing=2)), encoding="utf-8")
    flags = ["--main", str(tmp_path / "main.json"), "--out", str(tmp_path / "accuracy.png")]
    monkeypatch.setattr(sys, "argv", ["plot.py", *flags])
    plot.command()
    assert "wrote" in capsys.readouterr().out
    assert Image.open(tmp_path / "accuracy.png").size == (1950, 660)
    curves = plot.series(results())
    assert [(row["depth"], round(row["mean"], 3)) for row in curves["ours"]] == [(20, 0.899), (56, 0.899)]
    assert set(curves) == {"resnet", "resnet-tuned", "plain", "published", "start", "former", "ours"}
    document = results()
    assert {row["depth"] for row in plot.costs(document)} == {56}
    document["rows"] = [row for row in document["rows"] if (row["key"], row["depth"]) != ("ours", 56)]
    assert {row["depth"] for row in plot.costs(document)} == {20}


def test_every_row_of_main_has_a_colour_of_its_own():
    others = [row for row in MAIN.rows if row.key not in plot.COLOURS]
    assert len(others) <= len(plot.OTHER_COLOURS)
    colours = [*plot.COLOURS.values(), *plot.OTHER_COLOURS]
    assert len({*colours}) == len(colours)
