"""A run of ``rd-export``: from checked options to files ready to be written, and what to say of them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from rd_deploy.cli_export import ARCH_OPTIONS, DEFAULT_BATCHES, DEFAULT_MAX_BATCH, QUANTISING
from rd_deploy.common import UserError, nearest
from rd_deploy.export import native, onnx, tensorrt
from rd_deploy.export.files import Artefact
from rd_deploy.export.images import RANDOM_WEIGHTS, Images, folder_images, random_source, read_once, split_images
from rd_deploy.export.report import engine_lines, parity_entry, parity_table, quantisation_lines, summary
from rd_deploy.export.tensorrt import Settings, choose_settings, read_onnx
from rd_deploy.parity import TOLERANCES, check_parity, check_quantized, native_ways, onnx_ways
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.quantize import CALIBRATION_IMAGES, MAX_DROP, quantization_data, quantize_network, stored_bytes
from rd_deploy.serving.triton_server import check_engine, check_onnx, check_replaced, check_repository, write_model
from rd_deploy.trt.build import Profile

# How many images parity is judged on at least, if there are as many: real ones, or (for random weights) random ones.
REAL_IMAGES, RANDOM_IMAGES = 256, 8


@dataclass
class Result:
    """What to write (``new``), the file that a server gets (the last made), and lines to print once it is written."""

    new: list[Artefact]
    served: Artefact
    report: list[str] = field(default_factory=list)


def from_network(options: argparse.Namespace, say: Callable[[str], None]) -> Result:
    """What a model.pt or an architecture becomes. Raises `UserError` and `CheckFailed`; nothing is written."""
    module = _format(options)
    if options.out is not None:
        _check_targets(options, module, *_paths(options, "", module))
    settings = _settings(options, options.precision)
    if options.native and not options.no_parity:
        _check_native()
    source = _source(options)
    path, engine_path = _paths(options, source.chain.name, module)
    if options.checkpoint is not None and path.resolve() == Path(options.checkpoint).resolve():
        raise UserError(f"--out {path} is the checkpoint itself; choose another output path")
    _check_targets(options, module, path, engine_path)
    say("\n".join(summary(source.chain, options.precision)))
    with read_once() as load:
        result = _model(options, source, module, path, load)
        if settings is not None:
            _add_engine(options, settings, result, engine_path, lambda count: _images(options, source, count, load))
    return result


def from_onnx(options: argparse.Namespace) -> Result:
    """What an ONNX file of ours becomes, without torch and without its checkpoint; it is not written again."""
    model = read_onnx(Path(options.checkpoint))
    settings = _settings(options, model.sidecar["precision"])
    path = None if settings is None else Path(options.out or model.path.with_suffix(tensorrt.SUFFIX))
    if settings is not None and settings.unseen and (options.images is not None or options.tolerance is not None):
        raise UserError(f"--images and --tolerance are for running the engine, which cannot be: {settings.unseen}")
    _check_targets(options, onnx, None, path)
    result, preprocessing = Result([], model), Preprocessing.from_dict(model.sidecar["preprocessing"])

    def images(count: int) -> Images:
        if options.images is not None:
            return folder_images(options.images, preprocessing, max(REAL_IMAGES, count))
        trained = "checkpoint" in model.sidecar["provenance"]
        reason = "an ONNX file brings no real ones: give them with --images" if trained else RANDOM_WEIGHTS
        return random_source(max(RANDOM_IMAGES, count), preprocessing, 1, reason)

    if settings is not None:
        _add_engine(options, settings, result, path, images)
    return result


def check_served(options: argparse.Namespace, artefact: Artefact) -> None:
    """That what is to be written may take its place in the server's repository."""
    check_replaced(Path(options.triton_server), artefact.path.stem, artefact.sidecar)


def serve(options: argparse.Namespace, artefact: Artefact) -> str:
    """Add what was written to the server's repository; returns a line to print."""
    name, content, sidecar = artefact.path.stem, artefact.content, artefact.sidecar
    settings = {"engine": options.trt, "batches": _batches(options)}
    folder = write_model(Path(options.triton_server), name, content, sidecar, **settings)
    return f"wrote {folder} for NVIDIA's Triton Inference Server"


# --- before the work


def _format(options: argparse.Namespace) -> ModuleType:
    """The module of the file's format; refuses a precision that it does not offer."""
    precisions = {onnx: (*onnx.PRECISIONS, *QUANTISING), native: native.PRECISIONS}
    module, other = (native, onnx) if options.native else (onnx, native)
    if options.precision in precisions[module]:
        return module
    if options.precision in precisions[other]:
        kind, advice = ("a .rdp file", "leave --native away") if options.native else ("an ONNX file", "add --native")
        raise UserError(
            f"{kind} is {' or '.join(precisions[module])}, not {options.precision}: choose one, or {advice}"
        )
    raise UserError(f"unknown precision '{options.precision}'{nearest(options.precision, precisions[module])}")


def _check_native() -> None:
    """Find out that parity cannot be checked before the network is folded, not after."""
    from rd_deploy.native import version

    try:
        version()
    except UserError as error:
        raise UserError(f"parity cannot be checked: {error}; or pass --no-parity") from error


def _settings(options: argparse.Namespace, precision: str) -> Settings | None:
    """What engine to build, if any."""
    if not options.trt:
        if options.triton_server is not None:
            check_onnx(precision)
        return None
    targets = None if options.target is None else tuple(options.target.split(","))
    settings = choose_settings(options.trt_flavour or "auto", targets, _profile(options), precision)
    if options.triton_server is not None:
        check_engine(settings.flavour.name, _batches(options))
    return settings


def _profile(options: argparse.Namespace) -> Profile:
    return Profile.parse(options.batch or DEFAULT_BATCHES)


def _batches(options: argparse.Namespace) -> tuple[int, int, int]:
    """Of the server: an ONNX file takes any batch, so that one number is the largest, and the smallest is 1."""
    profile = _profile(options)
    if options.trt:
        return profile.minimum, profile.optimum, profile.maximum
    if profile.minimum not in (1, profile.maximum):
        raise UserError(
            f"--batch {profile}: the server's smallest batch is 1; give 1:{profile.optimum}:{profile.maximum}"
        )
    return 1, profile.optimum, profile.maximum


def _paths(options: argparse.Namespace, name: str, module: ModuleType) -> tuple[Path, Path | None]:
    """Where the model and, with --trt, the engine will lie; they differ in the suffix."""
    suffix = tensorrt.SUFFIX if options.trt else module.SUFFIX
    path = Path(options.out) if options.out is not None else _default_path(options, name, suffix)
    if path.suffix != suffix:
        raise UserError(f"output {path} must end in {suffix}")
    return path.with_suffix(module.SUFFIX), path if options.trt else None


def _default_path(options: argparse.Namespace, name: str, suffix: str) -> Path:
    precision = "" if options.precision == "fp32" else f"-{options.precision}"
    if options.checkpoint is None:
        return Path(f"{name}{precision}{suffix}")
    path = Path(options.checkpoint)
    return path.with_name(f"{path.stem}{precision}{suffix}")


def _check_targets(options: argparse.Namespace, module: ModuleType, path: Path | None, engine: Path | None) -> None:
    """That everything can be written where it shall be."""
    if path is not None:
        module.check_target(path)
    if engine is not None:
        tensorrt.check_target(engine)
    if options.triton_server is not None:
        _batches(options)
        check_repository(Path(options.triton_server), (engine or path or Path(options.checkpoint)).stem)


# --- the work


def _source(options: argparse.Namespace):
    from rd_deploy.export.source import source_from_checkpoint, source_from_name

    if options.checkpoint is not None:
        return source_from_checkpoint(options.checkpoint)
    given = {name: getattr(options, name) for name in ARCH_OPTIONS if getattr(options, name) is not None}
    return source_from_name(options.arch, **given)


def _images(options: argparse.Namespace, source, max_batch: int, load: Callable) -> Images:
    """The images that parity is judged on, as many as a batch at least; ``load``: of `read_once`."""
    count = max(REAL_IMAGES, max_batch)
    if options.images is not None:
        return folder_images(options.images, source.chain.preprocessing, count)
    if source.checkpoint is None:
        count = max(RANDOM_IMAGES, max_batch)
        return random_source(count, source.chain.preprocessing, (options.seed or 0) + 1, RANDOM_WEIGHTS)
    return split_images(source.checkpoint, options.data_dir, count, load)


def _model(options: argparse.Namespace, source, module: ModuleType, path: Path, load: Callable) -> Result:
    """The folded network as a file of the format asked for, checked."""
    report: list[str] = []
    if options.precision in QUANTISING:
        return _quantised(options, source, path, report, load)
    verify = _verifier(options, source, report, load)
    make = module.make_native if options.native else module.make_onnx
    model = make(path, source.chain, options.precision, verify)
    return Result([model], model, report)


def _quantised(options: argparse.Namespace, source, path: Path, report: list[str], load: Callable) -> Result:
    """The network with Q/DQ, if it is accurate enough; parity then is that of integer kernels with the file."""
    data = quantization_data(
        source.chain,
        source.checkpoint,
        options.data_dir,
        options.images,
        options.calibration_images or CALIBRATION_IMAGES,
        options.seed or 0,
        load,
    )
    if options.max_drop is not None and (data.gate is None or data.gate.labels is None):
        raise UserError("--max-drop needs labelled images: put them in folders named as the classes, or leave it away")
    quantized = quantize_network(
        source.chain,
        options.precision,
        data,
        calibrator=options.calibrator or "auto",
        keep=() if options.keep is None else options.keep.split(","),
        max_drop=MAX_DROP if options.max_drop is None else options.max_drop,
    )
    report += quantisation_lines(quantized.report)
    if data.calibration.count < (options.calibration_images or 0):
        report.append(
            f"only {data.calibration.count} of the {options.calibration_images} calibration images were to be had"
        )
    size, verify = stored_bytes(quantized.model), _verifier(options, source, report, load)
    particular = {"quantization": quantized.report}
    model = onnx.artefact_of(path, source.chain, options.precision, quantized.model, size, verify, particular)
    return Result([model], model, report)


def _tolerance(options: argparse.Namespace, precision: str, random: bool) -> float | None:
    """None, which judges nothing but NaN, for 8 bits in a network of random weights, which multiplies each rounding."""
    if options.tolerance is None and random and precision in QUANTISING:
        return None
    return options.tolerance or TOLERANCES[precision]


def _verifier(options: argparse.Namespace, source, report: list[str], load: Callable) -> Callable[[bytes], dict] | None:
    """The parity check that the exporter runs before it writes; its table goes to ``report``."""
    if options.no_parity:
        report.append("parity: not checked (--no-parity)")
        return None
    max_batch = options.max_batch or (RANDOM_IMAGES if source.checkpoint is None else DEFAULT_MAX_BATCH)
    tolerance = _tolerance(options, options.precision, random=source.checkpoint is None)
    images = _images(options, source, max_batch, load)
    ways = native_ways if options.native else onnx_ways
    setting = (images.values, tolerance, max_batch, options.precision)

    def verify(model: bytes) -> dict:
        if options.precision in QUANTISING:
            runs, reference = check_quantized(model, *setting), "the file's own Q/DQ, computed literally"
        else:
            runs, reference = check_parity(source.network, model, *setting, ways), "torch, unfolded, fp32"
        entry = parity_entry(reference, runs, images.origin, tolerance)
        report.extend(parity_table(entry))
        return entry

    return verify


def _add_engine(
    options: argparse.Namespace, settings: Settings, result: Result, path: Path, images: Callable[[int], Images]
) -> None:
    """Build an engine from the ONNX file of a result, and compare it with the file where it can run.

    ``images``: from the largest batch to the images to compare on.
    """
    model = result.served
    built = tensorrt.build_engine(model, settings)
    engine = tensorrt.describe(model, path, built, settings)
    unseen = settings.unseen or ("--no-parity" if options.no_parity else None)
    result.report += engine_lines(engine.sidecar["engine"], settings.flavour.title, built.seconds, unseen)
    if not unseen:
        random = "checkpoint" not in model.sidecar["provenance"]
        tolerance = _tolerance(options, model.sidecar["precision"], random)
        shown = images(settings.profile.maximum)
        runs, by = tensorrt.engine_parity(engine, model, settings, shown.values, tolerance)
        engine.sidecar["parity"] = parity_entry(f"{model.path.name} in {by}", runs, shown.origin, tolerance)
        result.report += parity_table(engine.sidecar["parity"])
    result.new.append(engine)
    result.served = engine
