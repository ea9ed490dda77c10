"""Post-training quantisation: calibrate, choose the calibrator, find the layers that suffer, and let a gate decide."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx

from rd_deploy.chain import Chain
from rd_deploy.common import CheckFailed, UserError
from rd_deploy.export.onnx import to_onnx
from rd_deploy.parity import onnx_runner, round_up
from rd_deploy.quantize.calibrate import CALIBRATORS, CalibrationError, batch_size, calibrate, check_calibrator
from rd_deploy.quantize.data import QuantizationData
from rd_deploy.quantize.qdq import KINDS, check_keep, qdq_counts, quantizable, to_qdq
from rd_deploy.quantize.score import Judge, Score

MAX_DROP = 0.5
# Multiply-accumulates to spend on the sensitivities of all layers together: a minute or two on one core.
SENSITIVITY_MACS = 2e12
SENSITIVITY_IMAGES = (16, 512)
NAMED_LAYERS = 3


class AccuracyError(CheckFailed):
    """The quantised network loses more accuracy than was allowed; the message is one line."""


@dataclass(frozen=True)
class Quantized:
    """A checked ONNX model with Q/DQ, and what is known about it, as plain containers for the sidecar."""

    model: onnx.ModelProto
    report: dict


def quantize_network(
    chain: Chain,
    kind: str,
    data: QuantizationData,
    calibrator: str = "auto",
    keep: Collection[str] = (),
    max_drop: float = MAX_DROP,
    sensitivity: bool = True,
) -> Quantized:
    """Quantise a network to ``int8`` or ``fp8``, with the ranges of the calibrator that serves it best.

    ``keep``: layers left in float32. ``max_drop``: the loss of accuracy on ``data.gate`` that is allowed, in percentage
    points; a larger one raises `AccuracyError`. Without labels there is no gate, and the report says so. Accuracies are
    ONNX Runtime's, with Q/DQ computed literally. ``sensitivity``: report each layer's. Raises `UserError`.
    """
    if kind not in KINDS:
        raise UserError(f"'{kind}' is no 8-bit type: choose {' or '.join(KINDS)}")
    if not 0 <= max_drop <= 100:
        raise UserError(f"--max-drop must be from 0 to 100 percentage points, not {max_drop}")
    check_calibrator(calibrator, kind)
    check_keep(chain, KINDS[kind], keep)
    work = _Quantizer(chain, kind, data, frozenset(keep))
    chosen, tried = work.choose(CALIBRATORS[kind] if calibrator == "auto" else (calibrator,))
    model = work.build(chosen)
    gate = work.gate(model, max_drop)
    failed = gate is not None and gate["drop_points"] is not None and gate["drop_points"] > max_drop
    layers = work.sensitivities(chosen) if sensitivity or failed else None
    if failed:
        raise AccuracyError(_failure(kind, gate, layers))
    return Quantized(model, work.report(chosen, tried, gate, layers, model))


class _Quantizer:
    """What the steps of quantising share. ``ranges``: of each calibrator that was tried."""

    def __init__(self, chain: Chain, kind: str, data: QuantizationData, keep: frozenset[str]):
        self.chain, self.kind, self.data, self.keep = chain, kind, data, keep
        self.batch = batch_size(chain)
        self.original = onnx_runner(to_onnx(chain).SerializeToString())
        self.ranges: dict[str, dict[str, float]] = {}

    def build(self, calibrator: str, keep: Collection[str] | None = None) -> onnx.ModelProto:
        return to_qdq(self.chain, self.ranges[calibrator], self.kind, self.keep if keep is None else keep)

    def choose(self, calibrators: Collection[str]) -> tuple[str, list[dict]]:
        """The best calibrator on the images for that, and the score of each that was tried."""
        judge, scores, tried = self._judge(self.data.choosing), {}, []
        for name in calibrators:
            try:
                images = self.data.calibration.batches(self.batch)
                self.ranges[name] = calibrate(self.chain, self.kind, name, images)
            except CalibrationError as error:
                if len(calibrators) == 1:
                    raise
                tried.append({"calibrator": name, "failed": str(error)})
                continue
            scores[name] = judge.judge(_runner(self.build(name)))
            tried.append({"calibrator": name, **scores[name].to_dict()})
        if not scores:
            raise CalibrationError(tried[0]["failed"])
        return max(scores, key=lambda name: scores[name].order()), tried

    def gate(self, model: onnx.ModelProto, max_drop: float) -> dict | None:
        """The comparison with the original on images that chose nothing; no drop where there are no labels."""
        if self.data.gate is None:
            return None
        judge = self._judge(self.data.gate)
        before, after = judge.original(), judge.judge(_runner(model))
        drop = None if before.accuracy is None else _points(before, after)
        limits = {"original_accuracy": before.accuracy, "drop_points": drop, "max_drop": max_drop}
        limits["corrupt_images"] = judge.left_out
        return {"origin": self.data.gate.origin, **after.to_dict(), **limits}

    def sensitivities(self, calibrator: str) -> list[dict]:
        """The score of each layer quantised alone, the worst first, on as many images as there is time for.

        Alone, since with all others quantised too a layer's own share drowns in theirs.
        """
        layers = [name for name in quantizable(self.chain, KINDS[self.kind]) if name not in self.keep]
        count = int(np.clip(SENSITIVITY_MACS // (self.chain.macs() * len(layers)), *SENSITIVITY_IMAGES))
        judge, everything = self._judge(self.data.choosing.some(count)), set(layers) | self.keep
        scores = {name: judge.judge(_runner(self.build(calibrator, everything - {name}))) for name in layers}
        ordered = sorted(layers, key=lambda name: -scores[name].mean_error)
        return [{"layer": name, **scores[name].to_dict()} for name in ordered]

    def report(
        self, chosen: str, tried: list[dict], gate: dict | None, layers: list[dict] | None, model: onnx.ModelProto
    ) -> dict:
        return {
            "kind": self.kind,
            "calibrator": chosen,
            "calibrators": tried,
            "calibration": self.data.calibration.describe(),
            "choosing": {**self.data.choosing.describe(), "by": _criterion(self.data.choosing.labels)},
            "gate": gate,
            "kept": sorted(self.keep),
            "not_quantized": sorted(self._others()),
            "counts": qdq_counts(model),
            "sensitivity": layers,
            "ranges": self.ranges[chosen],
        }

    def _others(self) -> set[str]:
        """Layers with weights that this kind cannot take."""
        layers = {step.name for step in self.chain.steps if hasattr(step, "weight")}
        return layers - set(quantizable(self.chain, KINDS[self.kind]))

    def _judge(self, samples) -> Judge:
        return Judge(samples, self.original, self.batch)


def _criterion(labels: np.ndarray | None) -> str:
    return "mean error of the logits (there are no labels)" if labels is None else "accuracy, then error of the logits"


def _runner(model: onnx.ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    return onnx_runner(model.SerializeToString(), literal=True)


def _points(before: Score, after: Score) -> float:
    """Loss of accuracy in percentage points, exact in images."""
    lost = round(before.accuracy * before.images) - round(after.accuracy * after.images)
    return 100 * lost / before.images


def _failure(kind: str, gate: dict, layers: list[dict]) -> str:
    worst = [entry["layer"] for entry in layers[:NAMED_LAYERS]]
    return (
        f"{kind} loses {gate['drop_points']:.2f} points of accuracy ({gate['original_accuracy']:.2%} to "
        f"{gate['accuracy']:.2%} on {gate['images']} {gate['origin']}), more than --max-drop {gate['max_drop']:g}; "
        f"the most sensitive layers are {', '.join(worst)}: leave them in float32 with --keep {','.join(worst)}, "
        f"or allow it with --max-drop {round_up(gate['drop_points']):g}"
    )
