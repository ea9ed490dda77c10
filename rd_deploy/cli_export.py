"""``rd-export``: a checkpoint, or an architecture with random weights, to a checked ONNX or .rdp file and a sidecar."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rd_deploy.common import UserError, nearest, require, run_command

# Options that mean something only for --arch, and only without --no-parity.
ARCH_OPTIONS = ("size", "seed", "width", "classes", "shortcuts")
PARITY_OPTIONS = ("tolerance", "images", "data_dir", "max_batch")
DEFAULT_MAX_BATCH = 64
# How many images parity is judged on at least, if there are as many: real ones, or (for random weights) random ones.
REAL_IMAGES, RANDOM_IMAGES = 256, 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rd-export",
        allow_abbrev=False,
        description="Fold BN and export to ONNX, or for the native engine (--native), with preprocessing and class "
        "names inside and a JSON sidecar beside; checked against the trained network before anything is written (exit "
        "code 1 when it differs).",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="model.pt", help="made by rd-train")
    parser.add_argument("--native", action="store_true", help="write a .rdp file for the native engine, and no ONNX")
    parser.add_argument("--out", metavar="FILE", help="default: beside model.pt, or ./NAME.onnx (.rdp) for --arch")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="of weights and feature maps; images and logits stay fp32: fp32 or fp16 for ONNX, fp32 or bf16 with "
        "--native (default: fp32)",
    )
    parity = parser.add_argument_group("parity with the trained network")
    parity.add_argument("--tolerance", type=float, help="of the largest error, in standard deviations of the logits")
    parity.add_argument("--images", metavar="FOLDER", help="judge by these image files, not by the test split")
    parity.add_argument("--data-dir", metavar="FOLDER", help="where the data set of the training is now")
    parity.add_argument("--max-batch", type=int, help=f"largest batch to run (default: {DEFAULT_MAX_BATCH})")
    parity.add_argument("--no-parity", action="store_true", help="do not check, and say so in the sidecar")
    arch = parser.add_argument_group("a network with random weights, for benchmarks")
    arch.add_argument("--arch", metavar="NAME", help="resnet50, plain50, plain20, ... in place of model.pt")
    arch.add_argument("--size", type=int, help="pixels (default: 224, or 32 for the 32x32 family)")
    arch.add_argument("--seed", type=int, help="of the weights (default: 0)")
    arch.add_argument("--width", type=float, help="multiplier of all widths (default: 1)")
    arch.add_argument("--classes", type=int, help="number of logits (default: 1000)")
    arch.add_argument("--shortcuts", help="all, projection or none, in place of what the name says")
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        name = unknown[0].split("=")[0]
        hint = nearest(name, known) if name.startswith("-") else ": one model.pt at a time"
        raise UserError(f"unknown argument {name}{hint}")
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself or would be ignored."""
    if (options.checkpoint is None) == (options.arch is None):
        raise UserError("give either a model.pt or --arch NAME (see rd-export --help)")
    for names, active, needs in (
        (ARCH_OPTIONS, options.arch is not None, "needs --arch"),
        (PARITY_OPTIONS, not options.no_parity, "contradicts --no-parity"),
        (("data_dir",), options.arch is None and options.images is None, "is for the test images of a model.pt"),
    ):
        given = [name for name in names if getattr(options, name) is not None]
        if given and not active:
            raise UserError(f"--{given[0].replace('_', '-')} {needs}")
    if options.tolerance is not None and not 0 < options.tolerance < float("inf"):
        raise UserError(f"--tolerance must be positive, not {options.tolerance}")
    if options.max_batch is not None and not 1 <= options.max_batch <= 4096:
        raise UserError(f"--max-batch must be from 1 to 4096, not {options.max_batch}")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, not {options.seed}")


def _source(options: argparse.Namespace):
    from rd_deploy.export.source import source_from_checkpoint, source_from_name

    if options.checkpoint is not None:
        return source_from_checkpoint(options.checkpoint)
    given = {name: getattr(options, name) for name in ARCH_OPTIONS if getattr(options, name) is not None}
    return source_from_name(options.arch, **given)


def _images(options: argparse.Namespace, source, max_batch: int):
    from rd_deploy.export.images import folder_images, random_source, split_images

    count = max(REAL_IMAGES, max_batch)
    if options.images is not None:
        return folder_images(options.images, source.chain.preprocessing, count)
    if source.checkpoint is None:
        count = max(RANDOM_IMAGES, max_batch)
        return random_source(count, source.chain.preprocessing, seed=(options.seed or 0) + 1)
    return split_images(source.checkpoint, options.data_dir, count)


def _verifier(options: argparse.Namespace, source, report: list[str]) -> Callable[[bytes], dict] | None:
    """The parity check that the exporter runs before it writes; its table goes to ``report``."""
    from rd_deploy.parity import TOLERANCES, check_parity, native_ways, onnx_ways

    if options.no_parity:
        report.append("parity: not checked (--no-parity)")
        return None
    max_batch = options.max_batch or DEFAULT_MAX_BATCH
    tolerance = options.tolerance or TOLERANCES[options.precision]
    images = _images(options, source, max_batch)
    ways = native_ways if options.native else onnx_ways

    def verify(model: bytes) -> dict:
        runs = check_parity(source.network, model, images.values, tolerance, max_batch, options.precision, ways)
        report.extend(_table(runs, images.origin, tolerance))
        return {
            "reference": "torch, unfolded, fp32",
            "images": images.origin,
            "tolerance": tolerance,
            "runs": [run.to_dict() for run in runs],
        }

    return verify


def _table(runs: list, origin: str, tolerance: float) -> list[str]:
    lines = [
        f"parity with the unfolded torch network on {origin};",
        f"errors in standard deviations of the logits, tolerance {tolerance:g}:",
        "  batch  images       max     p99.9      mean   top-1  run by",
    ]
    for run in runs:
        p = run.parity
        errors = f"{p.max_error:8.1e}  {p.p999_error:8.1e}  {p.mean_error:8.1e}"
        lines.append(f"  {run.batch:5d}  {p.images:6d}  {errors}  {p.top1_agreement:6.1%}  {run.engine}")
    return lines


def _format(options: argparse.Namespace) -> tuple[ModuleType, Callable[..., dict]]:
    """The module of the file's format, and its function that writes one; refuses what they do not offer."""
    from rd_deploy.export import native, onnx

    module, other = (native, onnx) if options.native else (onnx, native)
    if options.precision in module.PRECISIONS:
        return module, native.export_native if options.native else onnx.export_onnx
    if options.precision in other.PRECISIONS:
        kind = "a .rdp file" if options.native else "an ONNX file"
        advice = "leave --native away" if options.native else "add --native"
        raise UserError(f"{kind} is {' or '.join(module.PRECISIONS)}, not {options.precision}: choose one, or {advice}")
    raise UserError(f"unknown precision '{options.precision}'{nearest(options.precision, module.PRECISIONS)}")


def _check_engine() -> None:
    """Find out that parity cannot be checked before the network is folded, not after."""
    from rd_deploy import native

    try:
        native.version()
    except UserError as error:
        raise UserError(f"parity cannot be checked: {error}; or pass --no-parity") from error


def _default_path(options: argparse.Namespace, name: str, suffix: str) -> Path:
    precision = "" if options.precision == "fp32" else f"-{options.precision}"
    if options.checkpoint is None:
        return Path(f"{name}{precision}{suffix}")
    path = Path(options.checkpoint)
    return path.with_name(f"{path.stem}{precision}{suffix}")


def _summary(chain, precision: str) -> list[str]:
    channels, height, width = chain.input_shape
    errors = chain.provenance["fold_errors"]
    worst = max(errors, key=errors.get)
    return [
        f"{chain.name}: {channels}x{height}x{width} to {len(chain.classes)} classes, {precision}, "
        f"{chain.parameters() / 1e6:.2f} M parameters, {chain.macs() / 1e6:.1f} M MACs per image",
        f"BN folded in float64: largest relative error of a layer {errors[worst]:.1e} ({worst})",
    ]


def command(arguments: list[str]) -> int:
    """Export, and say what was made. Exit code 1 when the parity check fails."""
    options = _parse(arguments)
    require("torch", "train")
    from rd_deploy.parity import ParityError

    module, export = _format(options)
    if options.out is not None:
        module.check_target(options.out)
    if options.native and not options.no_parity:
        _check_engine()
    source, report = _source(options), []
    path = Path(options.out) if options.out is not None else _default_path(options, source.chain.name, module.SUFFIX)
    if options.checkpoint is not None and path.resolve() == Path(options.checkpoint).resolve():
        raise UserError(f"--out {path} is the checkpoint itself; choose another output path")
    module.check_target(path)
    print("\n".join(_summary(source.chain, options.precision)), flush=True)
    try:
        sidecar = export(path, source.chain, options.precision, _verifier(options, source, report))
    except ParityError as error:
        print(f"rd-export: {error}; nothing was written", file=sys.stderr)
        return 1
    print("\n".join(report))
    print(f"wrote {path} ({sidecar['bytes'] / 1e6:.1f} MB) and {module.sidecar_path(path)}")
    return 0


def main() -> int:
    """Entry point of the console script."""
    return run_command("rd-export", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
