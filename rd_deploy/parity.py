"""Does an exported model compute what the trained network computes? Measured, not assumed.

The reference is the UNFOLDED torch network in float32, the candidate the ONNX file in ONNX Runtime, or the .rdp file in
the native engine. Errors are judged relative to the standard deviation of the reference's logits, so that one tolerance
means the same for every network.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx

from rd_deploy import native
from rd_deploy.common import CheckFailed, UserError, require
from rd_deploy.export.half import with_half_storage

# Of the largest error, in standard deviations of the logits.
# fp32 rounds at 6e-8. Over 20 to 110 layers that becomes 1e-5 to 1e-4 in networks that are not chaotic; a wrong graph
# gives 1e-1 and more.
# fp16 rounds at 5e-4, 8,000 times as coarse: 0.02 to 0.05 over 20 to 110 layers, far below what decides a class.
# bf16 rounds at 4e-3, eight times as coarse again: 0.05 in a plain-20 trained on digits, 0.14 to 0.38 over 20 to 110
# layers of random weights; a wrong graph gives 1 and more.
# int8, fp8: of one way to run a file against another. A sum that is rounded differently moves an activation by a whole
# step: 0.04 to 0.15 in ResNets and plain networks of 20 to 56 layers trained on Fashion-MNIST.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-1, "bf16": 5e-1, "int8": 5e-1, "fp8": 5e-1}
# An image is clearly of a class when its logit leads by more than this, in standard deviations of the logits: twice
# the tolerance (fp32: fp16's), which no rounding overturns. Such an image must keep its class whatever the tolerance.
CLEAR_MARGINS = {precision: 2 * max(tolerance, TOLERANCES["fp16"]) for precision, tolerance in TOLERANCES.items()}
ENGINE = "onnxruntime"
# Drops the ReLU before a float8 Q, as if a zero point of 0 were the least value of that type too (ONNX Runtime 1.32).
WRONG_OPTIMIZERS = ["ReluQuantRewrite"]
SMALL_BATCHES = (1, 3)
SMALL_BATCH_IMAGES = 8
# Below this share of the logits' deviation, what differs between images is rounding.
SAME = 1e-5


class ParityError(CheckFailed):
    """The exported model is not what was trained, or nothing can be said about it; the message is one line."""


@dataclass(frozen=True)
class Parity:
    """Errors of a candidate's logits in standard deviations of the reference's (``deviation``, in logits).

    ``top1_agreement``: share of images whose largest logit is the same. ``clear_changes``: images that are clearly of
    another class in the reference (by more than ``clear_margin``). NaN in the candidate makes errors infinite. Without
    a ``tolerance`` nothing but NaN and infinity is judged.
    """

    images: int
    max_error: float
    p999_error: float
    mean_error: float
    top1_agreement: float
    clear_changes: int
    deviation: float
    tolerance: float | None
    clear_margin: float

    @property
    def passes(self) -> bool:
        """Whether the largest error is within the tolerance (an infinite one never is)."""
        return math.isfinite(self.max_error) and (self.tolerance is None or self.max_error <= self.tolerance)

    @property
    def keeps_classes(self) -> bool:
        """Whether every image that is clearly of a class stays in it."""
        return self.clear_changes == 0 or (self.tolerance is None and math.isfinite(self.max_error))

    @property
    def minimum_tolerance(self) -> float:
        """The smallest tolerance of two digits that would pass; infinite when none would."""
        return math.inf if self.clear_changes else round_up(self.max_error)

    def to_dict(self) -> dict:
        return {**asdict(self), "max_abs_error": self.max_error * self.deviation}


@dataclass(frozen=True)
class Run:
    """The figures of one way to run the exported model."""

    engine: str
    batch: int
    parity: Parity

    def to_dict(self) -> dict:
        return {"engine": self.engine, "batch": self.batch, **self.parity.to_dict()}


@dataclass(frozen=True)
class Way:
    """A way to run the exported model in batches of ``batch``; ``load`` gives a function from images to logits.

    The function takes float32 (N, C, H, W), N from 1 to the batch.
    """

    engine: str
    batch: int
    load: Callable[[], Callable[[np.ndarray], np.ndarray]]


def round_up(value: float) -> float:
    """The next number with two significant digits, for a tolerance that can be typed."""
    if value == 0 or not math.isfinite(value):
        return value
    exponent = math.floor(math.log10(value)) - 1
    candidates = (float(f"{math.floor(value / 10.0**exponent) + step}e{exponent}") for step in range(-1, 3))
    return next(candidate for candidate in candidates if candidate >= value)


def compare(
    reference: np.ndarray, candidate: np.ndarray, tolerance: float | None, clear_margin: float = CLEAR_MARGINS["fp32"]
) -> Parity:
    """Compare logits (N, classes). Raises `ParityError` when the reference itself is degenerate.

    Degenerate: NaN or infinity, the same logits for all classes, or the same logits for all of several images. A dead
    network would otherwise pass every comparison.
    """
    if reference.shape != candidate.shape:
        raise ParityError(f"the exported model gives logits {candidate.shape}, the network {reference.shape}")
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    deviation = _deviation(reference)
    if not np.isfinite(candidate).all():
        count = len(reference)
        return Parity(count, math.inf, math.inf, math.inf, 0.0, count, deviation, tolerance, clear_margin)
    changed = reference.argmax(axis=1) != candidate.argmax(axis=1)
    error = np.abs(candidate - reference) / deviation
    return Parity(
        images=len(reference),
        max_error=float(error.max()),
        p999_error=float(np.quantile(error, 0.999)),
        mean_error=float(error.mean()),
        top1_agreement=1 - float(changed.mean()),
        clear_changes=int((changed & (_margins(reference) > clear_margin * deviation)).sum()),
        deviation=deviation,
        tolerance=tolerance,
        clear_margin=clear_margin,
    )


def _margins(logits: np.ndarray) -> np.ndarray:
    """How far the largest logit of each image leads the second."""
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    return first - second


def _deviation(reference: np.ndarray) -> float:
    """Standard deviation of the logits over images and classes, of a reference that means something."""
    if not np.isfinite(reference).all():
        raise ParityError("the trained network itself gives NaN or infinity; train again")
    deviation = float(reference.std())
    over_classes = float(reference.std(axis=1).max())
    over_images = float(reference.std(axis=0).max())
    if over_classes <= SAME * float(np.abs(reference).max()):
        raise ParityError("the trained network gives the same logit to every class: it is dead; train again")
    if len(reference) > 1 and over_images <= SAME * deviation:
        raise ParityError("the trained network gives the same logits for every image: it is dead; train again")
    return deviation


def onnx_ways(model: bytes, precision: str, max_batch: int) -> list[Way]:
    """An ONNX file in ONNX Runtime at ``max_batch``, and at batch 1 and 3 where these are smaller.

    ``fp16``: once more with activations rounded, which the runtime does not do by itself on a CPU. ``bf16``: only so,
    since there it has no bf16 convolution.
    """
    batches = _batches(max_batch)
    if precision not in ("fp16", "bf16"):
        return _ways(ENGINE, batches, model)
    rounded = with_half_storage(onnx.load_from_string(model)).SerializeToString()
    plain, batches = (_ways(ENGINE, batches, model), [max_batch]) if precision == "fp16" else ([], batches)
    return plain + _ways(f"{ENGINE}, activations rounded to {precision}", batches, rounded)


def _batches(largest: int) -> list[int]:
    return [*(batch for batch in SMALL_BATCHES if batch < largest), largest]


def _ways(engine: str, batches: list[int], model: bytes) -> list[Way]:
    return [Way(engine, batch, functools.partial(onnx_runner, model)) for batch in batches]


def native_ways(model: bytes, precision: str, max_batch: int) -> list[Way]:
    """A .rdp file in the native engine at the same batches, with the best instruction set of this CPU."""
    engine = f"native, {native.Session(model, threads=1).info.isa}"
    batches = _batches(max_batch)
    return [Way(engine, batch, functools.partial(native_runner, model, batch)) for batch in batches]


def check_parity(
    network,
    model: bytes,
    images: np.ndarray,
    tolerance: float,
    max_batch: int,
    precision: str = "fp32",
    ways: Callable[[bytes, str, int], list[Way]] = onnx_ways,
) -> list[Run]:
    """Run the unfolded torch ``network`` and the exported ``model`` and compare, in each of the ``ways`` to run it.

    ``images``: float32 (N, C, H, W), at least two different ones; doubles are left out, and what remains is repeated to
    fill whole batches (not counted again). ``ways``: `onnx_ways` or `native_ways`. Raises `ParityError` when a run is
    over the tolerance, naming the smallest tolerance that would pass, or when an image that is clearly of one class
    gets another, whatever the tolerance.
    """

    def reference(images: np.ndarray) -> np.ndarray:
        return torch_logits(network, images, max_batch)

    return compare_ways(
        reference, ways(model, precision, max_batch), images, max_batch, tolerance, CLEAR_MARGINS[precision]
    )


def check_quantized(
    model: bytes, images: np.ndarray, tolerance: float | None, max_batch: int, precision: str = "int8"
) -> list[Run]:
    """Compare ways to run a model with Q/DQ with its literal execution, as `check_parity` does with the torch network.

    How far Q/DQ is from the network that was trained is no question of a tolerance: a gate of `rd_deploy.quantize`
    judges it by the accuracy. Here it is seen that the file means the same to integer kernels, at any batch.
    ``tolerance``: None for random weights, where the order of a sum decides on which side of a rounding step an
    activation falls and each layer multiplies that: errors are reported, and only NaN and infinity fail.
    """

    def reference(images: np.ndarray) -> np.ndarray:
        return in_batches(onnx_runner(model, literal=True), images, max_batch)

    ways = onnx_ways(model, precision, max_batch)
    return compare_ways(reference, ways, images, max_batch, tolerance, CLEAR_MARGINS[precision])


def compare_ways(
    reference: Callable[[np.ndarray], np.ndarray],
    ways: list[Way],
    images: np.ndarray,
    max_batch: int,
    tolerance: float | None,
    clear_margin: float,
) -> list[Run]:
    """The runs of all ways: those of the largest batch see all images, the others the first few. Or `ParityError`."""
    images = distinct(images)
    if len(images) < 2:
        raise UserError("parity needs at least 2 different images; add images or pass --no-parity")
    count, whole = len(images), max_batch * math.ceil(max(len(images), SMALL_BATCH_IMAGES) / max_batch)
    images = images[np.arange(whole) % count]
    expected, runs = reference(images), []
    for way in ways:
        seen = images if way.batch == max_batch else images[:SMALL_BATCH_IMAGES]
        logits = in_batches(way.load(), seen, way.batch)
        parity = compare(expected[: len(logits)], logits, tolerance, clear_margin)
        runs.append(Run(way.engine, way.batch, replace(parity, images=min(len(logits), count))))
    if not all(run.parity.passes and run.parity.keeps_classes for run in runs):
        raise ParityError(_failure(max(runs, key=lambda run: (run.parity.clear_changes, run.parity.max_error))))
    return runs


def distinct(images: np.ndarray) -> np.ndarray:
    """The different images among these, in their order."""
    first = {image.tobytes(): index for index, image in reversed(list(enumerate(images)))}
    return images[sorted(first.values())]


def in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """The logits of all images, at most ``batch`` of them at a time."""
    return np.concatenate([run(images[at : at + batch]) for at in range(0, len(images), batch)])


def _failure(worst: Run) -> str:
    where, parity = f"at batch {worst.batch} ({worst.engine})", worst.parity
    if not math.isfinite(parity.max_error):
        return f"parity failed: the exported model gives NaN or infinity {where}; no tolerance would pass"
    if not parity.keeps_classes:
        return (
            f"parity failed: {parity.clear_changes} images get another class {where} although the network decides them "
            f"clearly (by more than {parity.clear_margin:g} standard deviations of the logits; largest error "
            f"{parity.max_error:.3g}); no tolerance would pass"
        )
    return (
        f"parity failed: largest error {parity.max_error:.3g} standard deviations of the logits {where}, tolerance "
        f"{parity.tolerance:g}, top-1 agreement {parity.top1_agreement:.1%}; "
        f"--tolerance {parity.minimum_tolerance:g} is the smallest that would pass"
    )


def torch_logits(network, images: np.ndarray, batch: int) -> np.ndarray:
    """Logits of a torch network in evaluation mode and float32 on the CPU, (N, classes); the network is not changed."""
    torch = require("torch", "train")
    frozen = copy.deepcopy(network).cpu().float().eval()
    with torch.inference_mode():
        parts = [frozen(torch.from_numpy(images[at : at + batch])) for at in range(0, len(images), batch)]
    return torch.cat(parts).numpy()


def onnx_runner(model: bytes, threads: int = 0, literal: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (N, C, H, W), any N, to logits, by ONNX Runtime on the CPU (``threads`` 0: all cores).

    ``literal``: Q/DQ is computed as it stands in the graph, in float32 between Q and DQ; otherwise integer kernels take
    its place where there are any, which also round the biases.
    """
    ort = require("onnxruntime", "")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.disable_quant_qdq", "1" if literal else "0")
    providers = ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(model, options, providers, disabled_optimizers=WRONG_OPTIMIZERS)
    except Exception as error:  # its exception classes share no public base
        raise ParityError(f"ONNX Runtime refuses the exported model: {str(error).splitlines()[0][:160]}") from error
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def native_runner(model: bytes, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """The same by the native engine, ``batch`` images at a time."""
    return native.Session(model, batch).run


def whole_batches(run: Callable[[np.ndarray], np.ndarray], batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """``run`` for up to ``batch`` images, filled up with zeros to as many."""

    def filled(images: np.ndarray) -> np.ndarray:
        missing = np.zeros((batch - len(images), *images.shape[1:]), np.float32)
        return run(np.concatenate([images, missing]))[: len(images)]

    return filled
