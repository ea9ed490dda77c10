"""``rd-export``: a checkpoint, or an architecture with random weights, to checked files for other runtimes.

ONNX always, besides it a TensorRT engine and a model repository for NVIDIA's Triton Inference Server; or a .rdp file.
"""

import argparse
import sys

from rd_deploy.common import CheckFailed, Parser, UserError, expanded, nearest, printable, require, run_command

PATHS = ("checkpoint", "out", "triton_server", "images", "data_dir")
# Options that mean something only for --arch, without --no-parity, with --trt, and so on: see `_check`.
ARCH_OPTIONS = ("size", "seed", "width", "classes", "shortcuts")
PARITY_OPTIONS = ("tolerance", "max_batch")
DATA_OPTIONS = ("images", "data_dir")
TRT_OPTIONS = ("trt_flavour", "target")
QUANTISING = ("int8", "fp8")
QUANTISATION_OPTIONS = ("max_drop", "keep", "calibrator", "calibration_images")
DEFAULT_BATCHES = "1:8:32"
DEFAULT_MAX_BATCH = 64


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rd-export",
        allow_abbrev=False,
        description="Fold BN and export to ONNX, to ONNX and a TensorRT engine (--trt), or for the native engine "
        "(--native), with preprocessing and class names inside and a JSON sidecar beside; checked against the trained "
        "network before anything is written (exit code 1 when it differs).",
    )
    parser.add_argument(
        "checkpoint", nargs="?", metavar="model.pt", help="made by rd-train; for --trt also a model.onnx of rd-export"
    )
    parser.add_argument("--native", action="store_true", help="write a .rdp file for the native engine, and no ONNX")
    parser.add_argument("--out", metavar="FILE", help="default: beside model.pt, or ./NAME.onnx (.rdp) for --arch")
    parser.add_argument(
        "--precision",
        help="of weights and feature maps; images and logits stay fp32: fp32, fp16, bf16, int8 or fp8 for ONNX and "
        "TensorRT, fp32 or bf16 with --native (default: fp32)",
    )
    _add_trt(parser.add_argument_group("a TensorRT engine, and a server"))
    _add_quantisation(parser.add_argument_group("int8 and fp8"))
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


def _add_trt(group) -> None:
    group.add_argument("--trt", action="store_true", help="build an engine from the ONNX file, and write both")
    group.add_argument(
        "--trt-flavour",
        metavar="NAME",
        help="tensorrt builds on the GPU that will run the engine, rtx (TensorRT-RTX) anywhere; auto (default): "
        "tensorrt where it and a GPU are, else rtx",
    )
    group.add_argument(
        "--target", metavar="LIST", help="GPUs to build for, such as sm89,sm120 (default: the one here, else all)"
    )
    group.add_argument(
        "--batch",
        metavar="MIN:OPT:MAX",
        help=f"batch sizes of the engine and the server, or one of a static engine (default: {DEFAULT_BATCHES})",
    )
    group.add_argument(
        "--triton-server",
        metavar="DIR",
        help="also add the model to a repository for NVIDIA's Triton Inference Server (bf16 and fp8: with --trt only)",
    )


def _add_quantisation(group) -> None:
    group.add_argument("--max-drop", type=float, help="of the accuracy, in points (default: 0.5)")
    group.add_argument("--keep", metavar="LAYERS", help="leave these layers unquantised, such as conv1,fc")
    group.add_argument(
        "--calibrator", metavar="NAME", help="minmax, percentile, entropy, distribution (default: auto, the best)"
    )
    group.add_argument("--calibration-images", type=int, metavar="N", help="training images that set the ranges")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        name = unknown[0].split("=")[0]
        hint = nearest(name, known) if name.startswith("-") else ": one model.pt at a time"
        raise UserError(f"unknown argument {name}{hint}")
    for name in PATHS:
        if (path := getattr(options, name)) is not None:
            setattr(options, name, str(expanded(name, path)))
    _check(options)
    options.precision = options.precision or "fp32"
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself or would be ignored."""
    if (options.checkpoint is None) == (options.arch is None):
        raise UserError("give either a model.pt or --arch NAME (see rd-export --help)")
    if options.native and (options.trt or options.triton_server is not None):
        raise UserError(f"--native writes no ONNX file, which {'--trt' if options.trt else '--triton-server'} needs")
    _check_numbers(options)
    quantises = options.precision in QUANTISING
    for names, active, needs in (
        (ARCH_OPTIONS, options.arch is not None, "needs --arch"),
        (PARITY_OPTIONS, not options.no_parity, "contradicts --no-parity"),
        (DATA_OPTIONS, not options.no_parity or quantises, "contradicts --no-parity"),
        (("data_dir",), options.arch is None and options.images is None, "is for the test images of a model.pt"),
        (TRT_OPTIONS, options.trt, "needs --trt"),
        (("batch",), options.trt or options.triton_server is not None, "needs --trt or --triton-server"),
        (QUANTISATION_OPTIONS, quantises, "needs --precision int8 or fp8"),
        (("max_drop",), options.arch is None, "needs a model.pt: random weights have no accuracy"),
    ):
        given = [name for name in names if getattr(options, name) is not None]
        if given and not active:
            raise UserError(f"--{given[0].replace('_', '-')} {needs}")
    if _is_onnx(options):
        _check_onnx(options)


def _check_numbers(options: argparse.Namespace) -> None:
    if options.tolerance is not None and not 0 < options.tolerance < float("inf"):
        raise UserError(f"--tolerance must be positive, not {options.tolerance}")
    for name, low, high in (("max_batch", 1, 4096), ("calibration_images", 2, 65536)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, not {options.seed}")


def _is_onnx(options: argparse.Namespace) -> bool:
    return options.checkpoint is not None and options.checkpoint.endswith(".onnx")


def _check_onnx(options: argparse.Namespace) -> None:
    """From an ONNX file, engines and repositories are made; it is what it is."""
    if not options.trt and options.triton_server is None:
        raise UserError(f"{options.checkpoint} is exported already: add --trt or --triton-server, or give a model.pt")
    given = [name for name in ("precision", "data_dir", "max_batch") if getattr(options, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is for a model.pt: an ONNX file is what it is")
    names = ("out", "images", "tolerance", "no_parity")
    given = [name for name in names if getattr(options, name) not in (None, False)]
    if given and not options.trt:
        option = given[0].replace("_", "-")
        raise UserError(f"--{option} needs --trt: the ONNX file is neither written nor checked again")


def command(arguments: list[str]) -> int:
    """Export, and say what was made. Exit code 1 when a check of the result fails; then nothing is written."""
    options = _parse(arguments)
    if not _is_onnx(options):
        require("torch", "train")
    from rd_deploy.export.files import write_artefacts
    from rd_deploy.export.report import written
    from rd_deploy.export.run import check_served, from_network, from_onnx, serve

    try:
        result = from_onnx(options) if _is_onnx(options) else from_network(options, say=_say)
    except CheckFailed as error:
        print(f"rd-export: {printable(error)}; nothing was written", file=sys.stderr)
        return 1
    if options.triton_server is not None:
        check_served(options, result.served)
    write_artefacts(result.new)
    for line in (*result.report, *map(written, result.new)):
        print(line)
    if options.triton_server is not None:
        print(serve(options, result.served))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Entry point of the console script."""
    return run_command("rd-export", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
