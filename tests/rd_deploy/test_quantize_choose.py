"""What is chosen, what the gate lets through, and what the report says; accuracies counted independently."""

import dataclasses
import json

import numpy as np
import pytest
from chains import basics, bottlenecks, images_for, reference

from rd_deploy.chain import Chain
from rd_deploy.common import UserError
from rd_deploy.export import report
from rd_deploy.parity import onnx_runner
from rd_deploy.quantize import (
    CALIBRATORS,
    KINDS,
    AccuracyError,
    CalibrationError,
    QuantizationData,
    Samples,
    choose,
    qdq_counts,
    quantizable,
    quantize_network,
)


def samples(chain: Chain, count: int, seed: int, labelled: bool, noise: float = 0.0) -> Samples:
    """Images whose labels are the float64 network's own classes (so that its accuracy is 100%)."""
    images = images_for(chain, count, seed)
    labels = reference(chain, images).argmax(axis=1) if labelled else None
    return Samples(images.__getitem__, count, labels, f"images of seed {seed}")


def data(chain: Chain, labelled: bool = True, count: int = 60) -> QuantizationData:
    return QuantizationData(*(samples(chain, count, seed, labelled) for seed in (1, 2, 3)))


def accuracy(model, given: Samples) -> float:
    logits = onnx_runner(model.SerializeToString(), 1, literal=True)(given.load(np.arange(given.count)))
    return float((logits.argmax(axis=1) == given.labels).mean())


def with_corrupt(chain: Chain, given: Samples, corrupt: list[int]) -> Samples:
    """The same where some images cannot be read: others stand in for them, and their labels mean nothing."""
    places = np.where(np.isin(np.arange(given.count), corrupt), 0, np.arange(given.count))
    labels = given.labels.copy()
    labels[corrupt] = (labels[0] + 1) % len(chain.classes)
    return Samples(lambda indices: given.load(places[indices]), given.count, labels, given.origin, lambda: corrupt)


def with_outlier(chain: Chain, name: str, factor: float) -> Chain:
    """One input channel of a layer with large weights, of a source with small values there: 8 bits lose the others."""
    before = {step.name: step for step in chain.steps}
    layer = before[name]
    source, weight = before[layer.source], layer.weight.copy()
    weight[:, 0] *= factor
    small, bias = source.weight.copy(), source.bias.copy()
    small[0], bias[0] = small[0] / factor, bias[0] / factor
    changed = {name: dataclasses.replace(layer, weight=weight)}
    changed[layer.source] = dataclasses.replace(source, weight=small, bias=bias)
    return dataclasses.replace(chain, steps=tuple(changed.get(step.name, step) for step in chain.steps))


def balanced(chain: Chain) -> Chain:
    """The network with a bias of the classifier for which images differ in their class."""
    last, logits = chain.steps[-1], reference(chain, images_for(chain, 60, 0))
    steps = (*chain.steps[:-1], dataclasses.replace(last, bias=last.bias - logits.mean(axis=0)))
    return dataclasses.replace(chain, steps=steps)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return balanced(basics(widths=(16,), classes=5))


def test_the_report_is_plain_and_its_figures_are_what_is_counted(chain):
    given = data(chain)
    result = quantize_network(chain, "int8", given, max_drop=100)
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert report == result.report
    assert report["gate"]["images"] == 60
    assert report["gate"]["original_accuracy"] == 1
    assert report["gate"]["accuracy"] == accuracy(result.model, given.gate)
    assert report["gate"]["drop_points"] == pytest.approx(100 * (1 - accuracy(result.model, given.gate)))
    assert report["calibration"] == {"images": 60, "origin": "images of seed 1"}
    assert report["choosing"]["origin"] == "images of seed 2"
    assert report["counts"] == qdq_counts(result.model)
    assert report["kept"] == []
    assert [entry["calibrator"] for entry in report["calibrators"]] == list(CALIBRATORS["int8"])
    best = max(report["calibrators"], key=lambda entry: (entry["accuracy"], -entry["mean_error"]))
    assert report["calibrator"] == best["calibrator"]
    assert {entry["layer"] for entry in report["sensitivity"]} == set(quantizable(chain, KINDS["int8"]))


def test_the_chosen_calibrator_is_the_most_accurate_and_ties_go_to_the_smaller_error(chain, monkeypatch):
    given = data(chain)
    good = choose.calibrate(chain, "int8", "minmax", [given.calibration.load(np.arange(60))])
    factors = {"minmax": 1e-3, "percentile": 1.3, "entropy": 1.0}
    monkeypatch.setattr(
        choose, "calibrate", lambda chain, kind, name, images: {tensor: factors[name] * r for tensor, r in good.items()}
    )
    easy = dataclasses.replace(given.choosing, labels=np.full(60, -1))  # always wrong: a tie
    tied = dataclasses.replace(given, choosing=easy)
    report = quantize_network(chain, "int8", tied, sensitivity=False, max_drop=100).report
    errors = {entry["calibrator"]: entry["mean_error"] for entry in report["calibrators"]}
    assert {entry["accuracy"] for entry in report["calibrators"]} == {0}
    assert report["calibrator"] == min(errors, key=errors.get) != "minmax"
    report = quantize_network(chain, "int8", given, sensitivity=False, max_drop=100).report
    accuracies = {entry["calibrator"]: entry["accuracy"] for entry in report["calibrators"]}
    assert accuracies["minmax"] < 0.9 <= accuracies[report["calibrator"]]
    forced = quantize_network(chain, "int8", given, "minmax", sensitivity=False, max_drop=100).report
    assert (forced["calibrator"], len(forced["calibrators"])) == ("minmax", 1)


def test_the_gate_names_the_layer_that_costs_most_and_keeping_it_passes():
    chain = with_outlier(balanced(basics(widths=(16, 16), classes=5)), "conv2", 3e3)
    given = data(chain, count=100)
    with pytest.raises(AccuracyError, match=r"int8 loses \d+\.\d\d points .* more than --max-drop 15") as failure:
        quantize_network(chain, "int8", given, "minmax", max_drop=15)
    message = str(failure.value)
    assert "\n" not in message
    layers = message.split("--keep ")[1].split()[0].rstrip(",").split(",")
    assert layers[0] == "conv2"
    allowed = float(message.split("--max-drop ")[2])
    kept = quantize_network(chain, "int8", given, "minmax", max_drop=15, keep=layers[:1])
    assert kept.report["kept"] == ["conv2"]
    assert kept.report["gate"]["drop_points"] <= 15
    assert "conv2" not in {entry["layer"] for entry in kept.report["sensitivity"]}
    worse = quantize_network(chain, "int8", given, "minmax", max_drop=allowed)
    assert worse.report["sensitivity"][0]["layer"] == "conv2"
    assert 15 < worse.report["gate"]["drop_points"] <= allowed


def test_the_gate_judges_images_that_chose_nothing(chain):
    """Labels of the gate that are all wrong: nothing to lose there, whatever the other images say."""
    given = data(chain)
    wrong = dataclasses.replace(given.gate, labels=np.full(60, -1))
    report = quantize_network(chain, "int8", dataclasses.replace(given, gate=wrong), sensitivity=False).report
    assert (report["gate"]["original_accuracy"], report["gate"]["drop_points"]) == (0, 0)
    spoilt = dataclasses.replace(given, choosing=dataclasses.replace(given.choosing, labels=np.full(60, -1)))
    assert quantize_network(chain, "int8", spoilt, sensitivity=False, max_drop=100).report["gate"]["accuracy"] > 0.5


def test_without_labels_there_is_no_gate_but_a_report(chain):
    given = data(chain, labelled=False)
    report = quantize_network(chain, "int8", given, max_drop=0, sensitivity=False).report
    assert report["gate"]["drop_points"] is None
    assert report["gate"]["agreement"] > 0.5
    assert "no labels" in report["choosing"]["by"]
    errors = {entry["calibrator"]: entry["mean_error"] for entry in report["calibrators"]}
    assert report["calibrator"] == min(errors, key=errors.get)
    assert (
        quantize_network(chain, "int8", dataclasses.replace(given, gate=None), sensitivity=False).report["gate"] is None
    )


def test_fp8_says_what_it_leaves_in_float():
    chain = basics(widths=(16,), classes=5)
    report = quantize_network(chain, "fp8", data(chain), "minmax", max_drop=100, sensitivity=False).report
    assert report["not_quantized"] == ["conv0"]


def test_a_calibrator_that_finds_nothing_is_passed_over(chain, monkeypatch):
    real = choose.calibrate

    def some(chain, kind, name, images):
        if name != "percentile":
            raise CalibrationError(f"{name} finds nothing")
        return real(chain, kind, name, images)

    monkeypatch.setattr(choose, "calibrate", some)
    report = quantize_network(chain, "int8", data(chain), max_drop=100, sensitivity=False).report
    assert report["calibrator"] == "percentile"
    assert report["calibrators"][0] == {"calibrator": "minmax", "failed": "minmax finds nothing"}
    with pytest.raises(CalibrationError, match="entropy finds nothing"):
        quantize_network(chain, "int8", data(chain), "entropy")


def test_a_quantised_network_that_gives_nan_never_passes(chain, monkeypatch):
    given = data(chain)
    monkeypatch.setattr(choose, "onnx_runner", _nan_for_qdq)
    with pytest.raises(AccuracyError, match="loses 100"):
        quantize_network(chain, "int8", given, "minmax", sensitivity=False)


def _nan_for_qdq(model: bytes, threads: int = 0, literal: bool = False):
    run = onnx_runner(model, threads, literal)
    return (lambda images: run(images) * np.nan) if literal else run


def test_bad_arguments_are_refused_before_the_work(chain):
    none = QuantizationData(None, None, None)
    for arguments, message in (
        (("int4", none), "is no 8-bit type"),
        (("int8", none, "distribution"), "is none of int8's"),
        (("int8", none, "auto", ("conv9",)), "no such layer"),
        (("int8", none, "auto", (), -1), "--max-drop must be"),
        (("int8", none, "auto", (), float("nan")), "--max-drop must be"),
    ):
        with pytest.raises(UserError, match=message):
            quantize_network(chain, *arguments)


def test_a_dead_network_is_refused(chain):
    last = chain.steps[-1]
    last = dataclasses.replace(last, weight=0 * last.weight, bias=0 * last.bias)
    with pytest.raises(UserError, match="dead"):
        quantize_network(dataclasses.replace(chain, steps=(*chain.steps[:-1], last)), "int8", data(chain))


def test_sensitivity_is_bounded_by_the_networks_cost(monkeypatch):
    chain = bottlenecks(stages=(1,), classes=4)
    seen = []
    real = choose.Judge
    monkeypatch.setattr(choose, "Judge", lambda samples, *rest: (seen.append(samples.count), real(samples, *rest))[1])
    monkeypatch.setattr(choose, "SENSITIVITY_MACS", 20.5 * chain.macs() * len(quantizable(chain, KINDS["int8"])))
    quantize_network(chain, "int8", data(chain, labelled=False), "minmax")
    assert seen == [60, 60, 20]


def test_corrupt_images_are_left_out_of_the_gate_and_counted():
    chain = balanced(basics())
    given = data(chain)
    corrupt = [3, 4, 59]
    hurt = dataclasses.replace(given, gate=with_corrupt(chain, given.gate, corrupt))
    whole = quantize_network(chain, "int8", given, "minmax", max_drop=100, sensitivity=False)
    found = quantize_network(chain, "int8", hurt, "minmax", max_drop=100, sensitivity=False)
    good = np.delete(np.arange(60), corrupt)
    expected = accuracy(whole.model, given.gate.select(good))
    gate = found.report["gate"]
    assert (gate["images"], gate["corrupt_images"], whole.report["gate"]["corrupt_images"]) == (57, 3, 0)
    assert (gate["original_accuracy"], gate["accuracy"]) == (1.0, pytest.approx(expected))
    assert report.quantisation_lines(found.report | {"gate": gate | {"max_drop": 5.0}})[-1].endswith(" 5 allowed)")
    few = report.quantisation_lines(found.report | {"gate": gate | {"max_drop": 0.5}})[-1]
    assert few.endswith(" points lost, 0.5 allowed; one image is 1.8 points: more images would tell more)")
    none = dataclasses.replace(given, gate=with_corrupt(chain, given.gate, [*range(60)]))
    with pytest.raises(UserError, match="none of the 60 images of seed 3 can be read"):
        quantize_network(chain, "int8", none, "minmax", sensitivity=False)
