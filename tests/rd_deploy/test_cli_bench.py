"""``rd-bench`` end to end on tiny networks, its output against the schema, and every kind of bad input."""

import dataclasses
import errno
import itertools
import json
import re
import subprocess
import sys
from importlib import resources

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rd_deploy import cli_bench
from rd_deploy.bench import measure
from rd_deploy.bench.models import load_subject
from rd_deploy.common import UserError, run_command
from rd_deploy.preprocessing import Preprocessing
from rd_train.checkpoint import Checkpoint, save_checkpoint
from rd_train.networks import Network, parse_arch

FAST = ["--quick", "--seconds", "0.01", "--threads", "1"]


def save_onnx(path, shape=(1, 8, 8), batch="N", classes=3, seed=0) -> str:
    """A convolution, global pool and classifier."""
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((4, shape[0], 3, 3)), "wf": rng.standard_normal((4, classes))}
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "wf"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return str(path)


def save_digits_plain20(path) -> str:
    """A checkpoint as the digits preset makes it, with a narrow network."""
    arch = parse_arch("plain20", in_channels=1, classes=10, width=0.25)
    preprocessing = Preprocessing(8, 8, 1, (0.3,), (0.4,))
    classes = [str(digit) for digit in range(10)]
    save_checkpoint(path, Checkpoint(arch, Network(arch).state_dict(), preprocessing, classes))
    return str(path)


def bench(*arguments) -> int:
    return run_command("rd-bench", lambda: cli_bench.command([str(argument) for argument in arguments]))


def read(folder) -> dict:
    return json.loads((folder / "bench.json").read_text())


def schema() -> dict:
    return json.loads(resources.files("rd_deploy.bench").joinpath("schema.json").read_text())


@pytest.fixture(scope="module")
def checkpoint_run(tmp_path_factory):
    """One run with everything in it: a checkpoint against its own ResNet on all engines, precisions, two batches."""
    folder = tmp_path_factory.mktemp("run")
    model = save_digits_plain20(folder / "model.pt")
    assert bench(model, "--batch", "1,3", "--out", folder / "out", *FAST) == 0
    return folder / "out"


def test_bench_json_follows_the_schema(checkpoint_run):
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(read(checkpoint_run), schema())


def test_the_schema_notices_a_missing_key(checkpoint_run):
    document = read(checkpoint_run)
    del document["results"][0]["p99_ms"]
    with pytest.raises(jsonschema.ValidationError, match="p99_ms"):
        jsonschema.validate(document, schema())


def test_a_checkpoint_meets_its_own_resnet(checkpoint_run):
    plain, resnet = read(checkpoint_run)["networks"]
    assert plain["name"] == "plain20 (model.pt)"
    assert resnet["name"] == "resnet20"
    assert plain["input"] == resnet["input"] == [1, 8, 8]
    assert plain["classes"] == resnet["classes"] == 10


def test_every_engine_precision_and_batch_is_measured_or_skipped(checkpoint_run):
    document = read(checkpoint_run)
    for engine in ("torch", "onnxruntime", "openvino", "native"):
        for precision in ("fp32", "bf16"):
            for batch in (1, 3):
                where = {"engine": engine, "precision": precision, "batch": batch}
                measured = [row["model"] for row in document["results"] if where.items() <= row.items()]
                skipped = [row["reason"] for row in document["skipped"] if where.items() <= row.items()]
                assert (len(measured), len(skipped)) in ((2, 0), (0, 1))
                assert precision == "bf16" or measured


def test_ratios_are_compare_over_model(checkpoint_run):
    document = read(checkpoint_run)
    for ratio in document["ratios"]:
        where = {key: ratio[key] for key in ("engine", "precision", "batch")}
        samples = {row["model"]: row["samples_ms"] for row in document["results"] if where.items() <= row.items()}
        ours, theirs = (np.reshape(samples[document[key]], (-1, 2)).sum(axis=1) for key in ("model", "compare"))
        assert ratio["ratio"] == pytest.approx(np.median(theirs / ours), rel=1e-4)
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert ratio["no_difference"] == (0.95 <= ratio["low"] <= 1 <= ratio["high"] <= 1.05)


def test_memory_rows_and_claims(checkpoint_run):
    """Ledgers scale with batch and element size; the claims judge their ratios, and every engine's own figure."""
    document = read(checkpoint_run)
    ledger = {
        (row["model"], row["policy"], row["precision"], row["batch"]): row["peak_bytes"]
        for row in document["memory"]
        if row["policy"]
    }
    plain, resnet = document["model"], document["compare"]
    claims = {claim["name"]: claim for claim in document["claims"]}
    for policy in ("separate", "in-place"):
        peak = ledger[plain, policy, "fp32", 1]
        assert ledger[plain, policy, "bf16", 1] * 2 == peak
        assert ledger[plain, policy, "fp32", 3] == 3 * peak
        assert claims[f"memory/{policy}"]["value"] == ledger[resnet, policy, "fp32", 1] / peak
        assert f"share/{policy}" in claims
    assert claims["memory/separate"]["holds"] is True  # a basic block of stage 1: three maps instead of two
    assert claims["memory/openvino/fp32/batch-1"]["holds"] is None
    assert {"speed/best/fp32/batch-1", "speed/best/bf16/batch-3", "memory/torch-tensors/bf16/batch-3"} <= set(claims)
    assert {f"memory/torch-{account}/fp32/batch-1" for account in ("tensors", "allocator")} <= set(claims)
    assert {f"memory/onnxruntime-{account}/fp32/batch-1" for account in ("requested", "arena")} <= set(claims)
    for row in document["memory"]:
        assert row["peak_bytes"] is not None or row["engine"]
        assert row["how"].startswith(f"{row['source']}: ")
        assert row["weight_bytes"] % (4 if row["precision"] == "fp32" else 2) == 0
        assert "rss" not in row["how"].lower()


def test_a_run_on_the_cpu_names_no_gpu(checkpoint_run):
    assert read(checkpoint_run)["environment"]["gpu"] is None


def test_the_native_engine_names_its_instruction_set(checkpoint_run):
    document = read(checkpoint_run)
    for row in (*document["results"], *document["ratios"]):
        assert (row["variant"] is not None) == (row["engine"] == "native")
    assert document["profiles"] == []
    assert document["options"]["profile"] is False


def test_a_profile_per_network_and_setting(tmp_path, capsys):
    model, other = save_onnx(tmp_path / "a.onnx"), save_onnx(tmp_path / "b.onnx", seed=1)
    out = tmp_path / "out"
    arguments = ("--engines", "native", "--precision", "fp32", "--batch", "1,2", "--profile", "--out", out)
    assert bench(model, "--compare", other, *arguments, *FAST) == 0
    document = read(out)
    jsonschema.validate(document, schema())
    assert [(entry["model"], entry["batch"]) for entry in document["profiles"]] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
    ]
    printed = capsys.readouterr().out
    for entry in document["profiles"]:
        assert f"Steps of {entry['model']} on native ({entry['variant']}), fp32, batch {entry['batch']}" in printed
        assert all(step["name"] in printed for step in entry["steps"])


def test_a_profile_needs_the_native_engine(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    arguments = ("--engines", "onnxruntime", "--profile", "--out", tmp_path / "out")
    assert bench(model, "--compare", model, *arguments, *FAST) == 2
    assert "--profile times the steps of the native engine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_engines_agree_before_they_are_timed(checkpoint_run):
    agreement = read(checkpoint_run)["agreement"]
    assert len(agreement) == len(read(checkpoint_run)["results"])
    assert all(row["agrees"] and row["images"] >= 3 for row in agreement)
    assert all(row["max_error"] < 1e-4 for row in agreement if row["precision"] == "fp32")


def test_pictures_show_something(checkpoint_run):
    """PNGs with ink in every quarter, and both networks' colours: a blank or half-drawn picture fails."""
    from matplotlib import colors, image

    from rd_deploy.bench.memory_plot import COLOURS

    for name in ("bench.png", "memory.png"):
        assert (checkpoint_run / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(checkpoint_run / name)[..., :3]
        middle, centre = (size // 2 for size in pixels.shape[:2])
        for quarter in (
            pixels[:middle, :centre],
            pixels[:middle, centre:],
            pixels[middle:, :centre],
            pixels[middle:, centre:],
        ):
            assert (quarter.min(axis=-1) < 0.5).mean() > 0.002
        for colour in COLOURS:
            assert (np.abs(pixels - colors.to_rgb(colour)).max(axis=-1) < 0.02).mean() > 0.001


def test_tables_and_verdicts_are_printed(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    assert bench(model, "--compare", model, "--batch", 1, "--precision", "fp32", "--out", tmp_path / "o", *FAST) == 0
    shown = capsys.readouterr().out
    for text in (
        "Latency, host to host",
        "a (compare)",
        "95% interval",
        "ledger, in-place",
        "memory/separate",
        "wrote",
    ):
        assert text in shown
    assert "does not hold here: no difference (1.00x)" in shown  # memory of a network against itself


def test_a_gate_that_is_not_met_exits_1_with_everything_written(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    common = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    assert bench(*common, "--out", tmp_path / "o", "--require", "memory=1.25") == 1
    assert "memory=1.25 is not met: memory/in-place is 1.00x" in capsys.readouterr().err
    assert read(tmp_path / "o")["claims"]
    judged = [option for option in common if option != "--quick"]
    assert bench(*judged, "--out", tmp_path / "o", "--require", "memory=1", "--require", "speed=0.001") == 0


def test_quick_times_are_not_judged(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    common = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    assert bench(*common, "--out", tmp_path / "o", "--require", "speed=0.001") == 1
    assert "not judged: --quick" in capsys.readouterr().err
    speed = [claim for claim in read(tmp_path / "o")["claims"] if claim["name"].startswith("speed/")]
    assert speed
    assert all(claim["holds"] is None for claim in speed)


def test_a_wrong_engine_is_not_timed(tmp_path, monkeypatch, capsys):
    from rd_deploy.engines.openvino import OpenVinoSession

    run = OpenVinoSession._run
    monkeypatch.setattr(OpenVinoSession, "_run", lambda self, images: run(self, images) * 1.01)
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", *FAST]
    assert bench(*arguments, "--engines", "onnxruntime,openvino", "--out", tmp_path / "o") == 0
    document = read(tmp_path / "o")
    assert {row["engine"] for row in document["results"]} == {"onnxruntime"}
    assert "differ" in document["skipped"][0]["reason"]
    assert bench(*arguments, "--engines", "openvino", "--out", tmp_path / "p") == 2
    assert "nothing could be measured: openvino" in capsys.readouterr().err
    assert not (tmp_path / "p" / "bench.json").exists()


def test_engines_that_are_not_installed_are_listed_or_refused(tmp_path, monkeypatch, capsys):
    from rd_deploy.engines.openvino import OpenVino

    monkeypatch.setattr(OpenVino, "package", "no_such_package")
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--out", tmp_path / "o", *FAST]
    assert bench(*arguments) == 0
    (skipped,) = read(tmp_path / "o")["skipped"]
    assert skipped["engine"] == "openvino"
    assert "pip install '.[openvino]'" in skipped["reason"]
    assert bench(*arguments, "--engines", "openvino") == 2
    assert "in the checkout: pip install '.[openvino]'" in capsys.readouterr().err


def test_best_against_best_on_different_engines_is_measured_interleaved(tmp_path, monkeypatch):
    """Torch is made slow for the model, ONNX Runtime for the other: the winners differ and meet in a third timing."""
    pairs = []
    time_pair = measure.time_pair

    def spy(a, b, **options):
        samples = time_pair(a, b, **options)
        pairs.append(samples)
        if len(pairs) <= 2:
            slow = (30.0, 1.0) if len(pairs) == 1 else (1.0, 30.0)
            faked = (
                [time * factor for time in side] for side, factor in zip((samples.a, samples.b), slow, strict=True)
            )
            samples = dataclasses.replace(samples, a=next(faked), b=next(faked))
        return samples

    monkeypatch.setattr(measure, "time_pair", spy)
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "torch,onnxruntime"]
    assert bench(*arguments, "--out", tmp_path / "o", *FAST) == 0
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    (best,) = document["best"]
    assert (best["model_engine"], best["compare_engine"]) == ("onnxruntime", "torch")
    assert len(pairs) == 3
    quads = [np.reshape(best[f"{side}_times"]["samples_ms"], (-1, 2)).sum(axis=1) for side in ("model", "compare")]
    assert best["ratio"] == pytest.approx(np.median(quads[1] / quads[0]), rel=1e-4)


def test_a_warm_up_of_one_window_is_said_to_be_one(tmp_path, monkeypatch):
    """No change is known then: null in the file, and no number in the warning."""
    monkeypatch.setattr(cli_bench, "QUICK_WARM_UP", 0.01)
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    assert bench(*arguments, "--out", tmp_path / "o") == 0
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert [row["warm_up"]["change"] for row in document["results"]] == [None, None]
    (said,) = [text for text in document["warnings"] if "batch 1: a was warmed up" in text]
    assert re.fullmatch(r"onnxruntime fp32 batch 1: a was warmed up for one window only, \d+\.\d s", said)


# Engines that fail while they are measured, and Ctrl-C --------------------------------------------------------------


def fails_at(call: int, error: BaseException, monkeypatch) -> None:
    """Let the timing of that number, from 1 on, raise."""
    calls, time_pair = itertools.count(1), measure.time_pair

    def failing(*arguments, **options):
        if next(calls) == call:
            raise error
        return time_pair(*arguments, **options)

    monkeypatch.setattr(measure, "time_pair", failing)


def two_engines(tmp_path, *more) -> list:
    model = save_onnx(tmp_path / "a.onnx")
    common = [model, "--compare", model, "--precision", "fp32", "--engines", "onnxruntime,native", *FAST]
    return [*common, "--batch", 1, "--out", tmp_path / "o", *more]


def test_an_engine_that_fails_while_it_is_timed_costs_its_own_times_alone(tmp_path, monkeypatch, capsys):
    fails_at(2, RuntimeError("the device was lost\nat line 7"), monkeypatch)
    assert bench(*two_engines(tmp_path)) == 0
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert [row["engine"] for row in document["results"]] == ["onnxruntime"] * 2
    reason = "it failed: the device was lost"
    assert document["skipped"] == [{"engine": "native", "precision": "fp32", "batch": 1, "reason": reason}]
    claims = {claim["name"]: claim["text"] for claim in document["claims"]}
    assert claims["speed/native/fp32/batch-1"] == f"not measured: {reason}"
    assert [row["model_engine"] for row in document["best"]] == ["onnxruntime"]
    assert "native fp32 batch 1: it failed" in capsys.readouterr().out


def test_a_profile_that_fails_costs_no_times(tmp_path, monkeypatch):
    def failing(*arguments):
        raise MemoryError

    monkeypatch.setattr(measure, "profile", failing)
    assert bench(*two_engines(tmp_path, "--profile")) == 0
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert [row["reason"] for row in document["skipped"]] == [
        f"its profile of {name} failed: MemoryError" for name in ("a", "a (compare)")
    ]
    assert document["profiles"] == []
    for part in ("results", "ratios", "memory"):
        assert "native" in {row["engine"] for row in document[part]}


@pytest.mark.parametrize("refusing", ["onnxruntime", "native"])
def test_what_is_a_mistake_in_the_input_to_the_first_engine_costs_a_later_one_alone(tmp_path, monkeypatch, refusing):
    load = measure._load

    def refused(engine, *others):
        if engine.name == refusing:
            raise UserError("it cannot run the network")
        return load(engine, *others)

    monkeypatch.setattr(measure, "_load", refused)
    first = refusing == "onnxruntime"
    assert bench(*two_engines(tmp_path)) == (2 if first else 0)
    if not first:
        document = read(tmp_path / "o")
        assert [row["reason"] for row in document["skipped"]] == ["it failed: it cannot run the network"]
        assert {row["engine"] for row in document["results"]} == {"onnxruntime"}


def test_a_wrong_answer_that_is_an_exception_costs_the_engine_alone(tmp_path, monkeypatch):
    """It loads and runs zeros, and fails on the images that it is compared on."""
    from rd_deploy.engines.native import NativeSession

    run = NativeSession._run

    def failing(self, images):
        if images.any():
            raise RuntimeError("an illegal memory access")
        return run(self, images)

    monkeypatch.setattr(NativeSession, "_run", failing)
    assert bench(*two_engines(tmp_path)) == 0
    assert [row["reason"] for row in read(tmp_path / "o")["skipped"]] == ["it failed: an illegal memory access"]


def test_best_against_best_that_fails_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_fastest", lambda pairs, side: list(pairs)[min(side, len(pairs) - 1)])
    fails_at(3, RuntimeError("the device was lost"), monkeypatch)
    assert bench(*two_engines(tmp_path, "--require", "speed=0.001")) == 1
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert len(document["results"]) == 4
    assert document["best"] == []
    assert [row["engine"] for row in document["skipped"]] == ["best"]
    claims = {claim["name"]: claim["text"] for claim in document["claims"]}
    assert claims["speed/best/fp32/batch-1"] == "not measured: it failed: the device was lost"


@pytest.mark.parametrize(
    ("engines", "call", "complete", "kept"),
    [("onnxruntime", 2, 1, [("onnxruntime", 1)]), ("onnxruntime,native", 2, 0, [("onnxruntime", 1)])],
)
def test_what_was_measured_before_ctrl_c_is_kept(engines, call, complete, kept, tmp_path, monkeypatch, capsys):
    fails_at(call, KeyboardInterrupt(), monkeypatch)
    assert bench(*two_engines(tmp_path, "--engines", engines, "--batch", "1,2", "--require", "speed=1.4")) == 130
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert [(row["engine"], row["batch"]) for row in document["ratios"]] == kept
    assert f"interrupted: {complete} of 2 settings (precision and batch) are complete" in document["warnings"]
    assert {"memory/in-place", "memory/onnxruntime-requested/fp32/batch-1"} <= {
        row["name"] for row in document["claims"]
    }
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"bench.json", "bench.png", "memory.png"}
    captured = capsys.readouterr()
    assert "onnxruntime" in captured.out
    assert captured.err.endswith(f"rd-bench: interrupted: {tmp_path / 'o'} has what was measured until then\n")


def test_ctrl_c_before_anything_was_measured_writes_nothing(tmp_path, monkeypatch, capsys):
    fails_at(1, KeyboardInterrupt(), monkeypatch)
    assert bench(*two_engines(tmp_path)) == 130
    assert capsys.readouterr().err.endswith("rd-bench: interrupted\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("given", "taken"), [([], 0.2), (["--seconds", "0.3"], 0.3)])
def test_quick_samples_for_the_seconds_that_are_given(given, taken):
    assert cli_bench._parse(["plain20", "--quick", *given]).seconds == taken


# Networks the ledger cannot count, and other machines ---------------------------------------------------------------


def save_data_dependent(path) -> str:
    """As `save_onnx`, plus a branch whose size depends on how many pixels are not zero."""
    model = onnx.load(save_onnx(path))
    model.graph.node[-1].output[0] = "plain"
    model.graph.node.extend(
        [
            helper.make_node("NonZero", ["images"], ["places"]),
            helper.make_node("Cast", ["places"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
            helper.make_node("Add", ["plain", "mean"], ["logits"]),
        ]
    )
    onnx.save(model, str(path))
    return str(path)


def test_a_network_without_a_ledger_keeps_its_times(tmp_path, capsys):
    model, other = save_data_dependent(tmp_path / "a.onnx"), save_onnx(tmp_path / "b.onnx")
    arguments = [model, "--compare", other, "--batch", 1, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "memory.png").write_bytes(b"an earlier run's")
    assert bench(*arguments, "--out", tmp_path / "o", "--require", "memory=1") == 1
    captured = capsys.readouterr()
    assert "memory=1 is not met: memory/in-place not measured: a: " in captured.err
    assert "bench.json, bench.png\n" in captured.out
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"bench.json", "bench.png"}
    document = read(tmp_path / "o")
    jsonschema.validate(document, schema())
    assert len(document["results"]) == 2
    ledgers = {(row["model"], row["policy"]): row["peak_bytes"] for row in document["memory"] if row["policy"]}
    assert ledgers["a", "separate"] is None
    assert ledgers["b", "separate"] == (64 + 4 * 64) * 4
    claims = {claim["name"]: claim for claim in document["claims"]}
    assert claims["memory/separate"]["holds"] is claims["memory/separate"]["value"] is None
    assert claims["memory/onnxruntime-requested/fp32/batch-1"]["value"] is not None


def test_a_batch_that_is_baked_in_costs_only_its_own_setting(tmp_path):
    """The file says batch N, but a Reshape writes (1, 4): one image runs and counts, two do not."""
    path = tmp_path / "a.onnx"
    model = onnx.load(save_onnx(path))
    model.graph.node[3].CopyFrom(helper.make_node("Reshape", ["g", "shape"], ["f"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4]), "shape"))
    onnx.save(model, str(path))
    arguments = [path, "--compare", path, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    assert bench(*arguments, "--batch", "2,1", "--out", tmp_path / "o") == 0
    document = read(tmp_path / "o")
    assert {row["batch"] for row in document["results"]} == {1}
    assert [row["batch"] for row in document["skipped"]] == [2]
    assert {row["batch"] for row in document["memory"] if row["policy"] and row["peak_bytes"]} == {1}
    claims = {claim["name"]: claim for claim in document["claims"]}
    assert claims["memory/separate"]["value"] == 1
    assert (tmp_path / "o" / "memory.png").exists()


def test_the_memory_table_says_what_was_counted(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "torch", *FAST]
    assert bench(*arguments, "--out", tmp_path / "o") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("  a  ") and "ledger, separate" in line]
    peak = (64 + 4 * 64) * 4 / 2**10  # the image and the convolution's maps
    weights = (4 * 9 + 4 * 3) * 4 / 2**10
    assert f"{peak:.1f}" in line
    assert line.endswith(f"{weights:.1f}")
    assert "torch allocator" in shown
    assert "operators' scratch" in shown


def test_float16_files_are_refused(tmp_path, capsys):
    path = tmp_path / "a.onnx"
    model = onnx.load(save_onnx(path))
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "half"))
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    onnx.save(model, str(path))
    assert bench(path, "--compare", path, "--out", tmp_path / "o") == 2
    assert "holds float16 weights ('half'); give the fp32 export" in capsys.readouterr().err


def test_external_data(tmp_path):
    """Weights in a file beside the model give the same figures as weights inside it."""
    inside, outside = save_onnx(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")
    onnx.save(onnx.load(inside), outside, save_as_external_data=True, location="out.bin", size_threshold=0)
    assert (tmp_path / "out.bin").stat().st_size >= (4 * 9 + 4 * 3) * 4
    arguments = ["--batch", 1, "--precision", "fp32", "--engines", "torch,onnxruntime", *FAST]
    assert bench(outside, "--compare", inside, "--out", tmp_path / "o", *arguments) == 0
    document = read(tmp_path / "o")
    assert {row["engine"] for row in document["results"]} == {"torch", "onnxruntime"}
    values = {claim["value"] for claim in document["claims"] if claim["name"].startswith("memory/")}
    assert values == {1}


def test_dead_networks_are_refused(tmp_path, capsys):
    """Logits that are always 0 would agree with everything."""
    path = tmp_path / "a.onnx"
    model = onnx.load(save_onnx(path))
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 0, weight.name))
    onnx.save(model, str(path))
    assert bench(path, "--compare", path, "--out", tmp_path / "o", *FAST) == 2
    assert "a: engines cannot be checked against each other" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_two_files_without_torch(tmp_path):
    """Deploying needs no torch: two ONNX files are compared on the engines that are left."""
    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", "1", "--precision", "fp32", "--out", str(tmp_path / "o"), *FAST]
    code = f"import sys; sys.modules['torch'] = None\nimport rd_deploy.cli_bench as c\nsys.argv[1:] = {arguments}\n"
    command = [sys.executable, "-c", f"{code}sys.exit(c.main())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = read(tmp_path / "o")
    assert {row["engine"] for row in document["results"]} == {"onnxruntime", "openvino", "native"}
    (skipped,) = [row for row in document["skipped"] if row["precision"] is None]
    assert skipped["reason"] == "torch is not installed: in the checkout: pip install '.[train]'"


def test_a_full_disk_shows_the_report_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(path, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model = save_onnx(tmp_path / "a.onnx")
    arguments = [model, "--compare", model, "--batch", 1, "--precision", "fp32", "--engines", "onnxruntime", *FAST]
    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert bench(*arguments, "--out", tmp_path / "o") == 2
    captured = capsys.readouterr()
    assert "bench.json: No space left on device" in captured.err
    assert "speed/onnxruntime/fp32/batch-1" in captured.out
    assert list((tmp_path / "o").iterdir()) == []


# Naming networks -------------------------------------------------------------------------------------------------


def test_a_named_network_takes_input_classes_stem_and_width_of_the_model(tmp_path):
    ours = load_subject(save_digits_plain20(tmp_path / "model.pt"))
    other = load_subject("resnet32", like=ours)
    assert (other.shape, other.classes) == ((1, 8, 8), 10)
    assert (other.arch["stem"], other.arch["width"]) == ("small", 0.25)
    foreign = load_subject(save_onnx(tmp_path / "a.onnx", shape=(2, 32, 32)))
    other = load_subject("resnet20", like=foreign)
    assert (other.shape, other.classes) == ((2, 32, 32), 3)


def test_torchvision_networks_by_prefix_and_by_plain_name(tmp_path):
    ours = load_subject("plain20", size=64)
    named = load_subject("torchvision:resnet18", like=ours)
    assert (named.shape, named.classes) == ((3, 64, 64), 1000)
    assert load_subject("squeezenet1_1", size=64).source.startswith("torchvision squeezenet1_1")
    grey = load_subject(save_onnx(tmp_path / "a.onnx", shape=(1, 64, 64)))
    with pytest.raises(UserError, match="takes 3 channels"):
        load_subject("torchvision:resnet18", like=grey)


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan20"], "did you mean 'plain20'"),
        (["torchvision:resnet19"], "did you mean 'resnet1"),
        (["torchvison:resnet18"], "unknown library 'torchvison'"),
        (["nothing.pt"], "does not exist"),
        (["nothing.onnx"], "does not exist"),
        (["plain20", "--batch", "0"], "--batch 0"),
        (["plain20", "--batch", "1,x"], "--batch 1,x"),
        (["plain20", "--precision", "fp33"], "did you mean 'fp32'"),
        (["plain20", "--engines", "onnxrunime"], "did you mean 'onnxruntime'"),
        (["plain20", "--threads", "0"], "--threads 0"),
        (["plain20", "--size", "0"], "--size 0"),
        (["plain20", "--seconds", "nan"], "seconds"),
        (["plain20", "--require", "speed"], "write NAME=NUMBER"),
        (["plain20", "--require", "sped=1"], "did you mean 'speed'"),
        (["plain20", "--threads", "two"], "threads"),
        (["plain20", "--threads", "1.5"], "--threads: invalid int value: '1.5'"),
        (["plain20", "--prec", "fp32"], "--prec"),
        (["plain20", "--no-such-option"], "no-such-option"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, said, tmp_path, capsys):
    assert bench(*arguments, "--out", tmp_path / "o") == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_damaged_files(content, suffix, tmp_path, capsys):
    path = tmp_path / f"model{suffix}"
    if content is None:  # truncated
        whole = save_digits_plain20(path) if suffix == ".pt" else save_onnx(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert whole == str(path)
    else:
        path.write_bytes(content)
    assert bench(path, "--out", tmp_path / "o") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rd-bench: error: ")
    assert captured.err.count("\n") == 1


def test_files_that_do_not_fit(tmp_path, capsys):
    small, large = save_onnx(tmp_path / "s.onnx"), save_onnx(tmp_path / "l.onnx", shape=(1, 9, 9))
    assert bench(small, "--compare", large, "--out", tmp_path / "o") == 2
    assert "s takes images (1, 8, 8), l (1, 9, 9)" in capsys.readouterr().err
    other = save_onnx(tmp_path / "c.onnx", classes=4)
    assert bench(small, "--compare", other, "--out", tmp_path / "o") == 2
    assert "s has 3 classes, c 4" in capsys.readouterr().err
    assert bench(small, "--compare", small, "--size", 16, "--out", tmp_path / "o") == 2
    assert "leave --size 16 away" in capsys.readouterr().err
    fixed = save_onnx(tmp_path / "f.onnx", batch=2)
    assert bench(fixed, "--compare", fixed, "--batch", 1, "--out", tmp_path / "o", *FAST) == 2
    assert "fixed to batch 2" in capsys.readouterr().err
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    assert bench(other, "--out", tmp_path / "o") == 2
    assert "neither a .pt checkpoint nor an .onnx file" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_found_before_measuring(tmp_path, capsys):
    model = save_onnx(tmp_path / "a.onnx")
    (tmp_path / "file").write_text("")
    assert bench(model, "--compare", model, "--out", tmp_path / "file" / "o") == 2
    captured = capsys.readouterr()
    assert "cannot write to --out" in captured.err
    assert "timing" not in captured.err


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import sys; import rd_deploy.cli_bench as c\n"
        "try: c._parser().parse_args(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'openvino', 'onnxruntime', 'matplotlib') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--require" in shown
    assert shown.strip().endswith("[]")
