"""``rd-bench``: is the plain network faster and smaller than the ResNet, on this machine, on every engine?"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rd_deploy.common import Parser, Stopped, UserError, expanded, nearest, run_command, write_json

DESCRIPTION = """Compare a network's latency and feature-map memory with another's, on every engine that is installed.
Times are host to host: NumPy images in, NumPy logits out. The two networks are measured interleaved (A B B A)."""
PRECISIONS = ("fp32", "fp16", "bf16")
# What is measured unless the user says otherwise.
DEFAULTS = {
    "cpu": {"precision": "fp32,bf16", "batch": "1,8"},
    "cuda": {"precision": "fp16,bf16", "batch": "1,32"},
}
SECONDS, SEED, OUT = 10.0, 0, "bench"
# What a plan does not depend on; None, False or an empty list where it is not given, so that --plan can refuse it.
MEASUREMENT_OPTIONS = ("engines", "precision", "threads", "seconds", "seed", "profile", "quick", "out", "require")
PLAN_CARD = "h100"  # whose plan is shown where there is no GPU
QUICK_SECONDS = QUICK_WARM_UP = 0.2
QUICK_QUADS = 3
MAX_WARM_UP = 10.0  # seconds per network


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rd-bench", allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument(
        "model",
        nargs="?",
        default="plain50",
        metavar="MODEL",
        help="an architecture, model.pt, model.onnx, torchvision:NAME or timm:NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        metavar="MODEL",
        help="likewise; a name takes MODEL's input, classes, stem and width (default: MODEL's ResNet)",
    )
    parser.add_argument(
        "--engines",
        metavar="NAMES",
        help="torch,onnxruntime,openvino,native on the CPU, torch-cuda,inductor-cuda,onnxruntime-cuda,"
        "onnxruntime-tensorrt,onnxruntime-rtx,tensorrt,tensorrt-rtx,cuda on an NVIDIA GPU (default: those installed); "
        "RD_ISA, for cuda RD_FUSION, RD_TUNE and RD_PDL in the environment set how ours run",
    )
    parser.add_argument(
        "--device", choices=DEFAULTS, help="whose engines are the default (default: cpu, or that of --engines)"
    )
    parser.add_argument("--batch", help="batch sizes (default: 1,8; on a GPU 1,32)")
    parser.add_argument("--precision", help="fp32, fp16, bf16 (default: fp32,bf16; on a GPU fp16,bf16)")
    parser.add_argument("--threads", type=int, help="(default: the CPUs this process may use)")
    parser.add_argument("--size", type=int, help="pixels, for named networks (default: 224, or 32 for that family)")
    parser.add_argument(
        "--seconds", type=float, help=f"sampling time per pair (default: {SECONDS}; with --quick {QUICK_SECONDS})"
    )
    parser.add_argument("--seed", type=int, help=f"of weights, images, bootstrap (default: {SEED})")
    parser.add_argument(
        "--profile", action="store_true", help="also time the native engine's steps, against this machine's limits"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only print how the cuda engine would run both networks, with predicted times; needs no GPU",
    )
    parser.add_argument("--card", metavar="NAME", help=f"of --plan (default: the GPU here, or {PLAN_CARD})")
    parser.add_argument("--quick", action="store_true", help="a smoke run: short sampling, no conclusions")
    parser.add_argument("--out", metavar="FOLDER", help=f"of the results (default: {OUT})")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="CLAIM=NUMBER",
        help="exit 1 unless it holds: speed=1.4 (best engine against best engine), memory=1.25 (in-place ledger)",
    )
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    for option, low, high in (("threads", 1, 4096), ("size", 1, 4096), ("seconds", 0.01, 3600), ("seed", 0, 2**31)):
        value = getattr(options, option)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{option} {value} must be from {low} to {high}")
    if options.card and not options.plan:
        raise UserError("--card names the GPU of --plan: a measurement takes the GPU that is here")
    if options.plan:
        _check_plan(options)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    for option, default in (("seconds", seconds), ("seed", SEED), ("out", OUT)):
        if getattr(options, option) is None:
            setattr(options, option, default)
    options.out = str(expanded("--out", options.out, "folder"))
    return options


def _check_plan(options: argparse.Namespace) -> None:
    """Refuse what a plan would ignore."""
    values = {name: getattr(options, name) for name in MEASUREMENT_OPTIONS}
    given = [name for name, value in values.items() if not (value is None or value is False or value == [])]
    if given:
        raise UserError(f"--{given[0]} is for a measurement, and --plan makes none: leave one of them away")
    if options.device == "cpu":
        raise UserError("--plan is of the cuda engine, which is not on --device cpu: leave one of them away")


def _choose_device(options: argparse.Namespace) -> None:
    """Fill in what depends on the device: one run compares engines of one device."""
    from rd_deploy.engines import get_engine

    named = {name: get_engine(name).device for name in (options.engines or "").split(",") if name}
    devices = {options.device, *named.values()} - {None}
    if options.plan:
        devices = {"cuda"}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in named.items())
        raise UserError(f"engines of one device at a time, please: {where}{_device_note(options)}")
    options.device = devices.pop() if devices else "cpu"
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def _device_note(options: argparse.Namespace) -> str:
    return f"; --device is {options.device}" if options.device else ""


def _numbers(text: str, option: str) -> list[int]:
    """``"1,8"`` to ``[1, 8]``, without doubles."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= 4096 for number in numbers):
        raise UserError(f"{option} {text}: give whole numbers from 1 to 4096, such as 1,8")
    return list(dict.fromkeys(numbers))


def _precisions(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PRECISIONS:
            raise UserError(f"unknown precision '{name}'{nearest(name, PRECISIONS)}")
    return names


def _engines(text: str | None, device: str) -> tuple[list, list[dict]]:
    """The engines to run and, for the default list, what was left out and why; one asked for must be there."""
    from rd_deploy.engines import ENGINES, get_engine

    chosen, skipped = [], []
    wanted = [name for name, engine in ENGINES.items() if engine.device == device] if text is None else text.split(",")
    for name in dict.fromkeys(wanted):
        engine = get_engine(name)
        reason = engine.missing()
        if reason is None:
            chosen.append(engine)
        elif text is not None:
            raise UserError(reason)
        else:
            skipped.append({"engine": name, "precision": None, "batch": None, "reason": reason})
    if not chosen:
        raise UserError("no engine can run here: " + "; ".join(f"{row['engine']}: {row['reason']}" for row in skipped))
    return chosen, skipped


def _check_profile(options: argparse.Namespace, engines: list) -> None:
    if options.profile and not any(engine.name == "native" for engine in engines):
        raise UserError("--profile times the steps of the native engine: add it to --engines")


def _check_folder(name: str) -> None:
    """Try to write into the output folder now, rather than fail after minutes of measuring; nothing stays behind."""
    folder = Path(name)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror or error}; choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _subjects(options: argparse.Namespace) -> tuple:
    from dataclasses import replace

    from rd_deploy.bench.models import check_comparable, counterpart, load_subject

    model = load_subject(options.model, size=options.size, seed=options.seed)
    against = counterpart(model) if options.compare is None else options.compare
    compare = load_subject(against, like=model, size=options.size, seed=options.seed)
    check_comparable(model, compare, max(_numbers(options.batch, "--batch")))
    if compare.name == model.name:
        compare = replace(compare, name=f"{compare.name} (compare)")
    return model, compare


def _plan(options: argparse.Namespace, engines: list):
    from rd_deploy.bench.measure import Plan
    from rd_deploy.bench.timer import MIN_QUADS
    from rd_deploy.cpus import available_threads

    return Plan(
        engines=engines,
        batches=_numbers(options.batch, "--batch"),
        precisions=_precisions(options.precision),
        threads=options.threads or available_threads(),
        seconds=options.seconds,
        warm_up=QUICK_WARM_UP if options.quick else MAX_WARM_UP,
        min_quads=QUICK_QUADS if options.quick else MIN_QUADS,
        seed=options.seed,
        quick=options.quick,
        profile=options.profile,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, say: Callable[[str], None] = _say) -> tuple:
    """Measure as the options say; returns the content of ``bench.json`` and its `Report`, and writes nothing."""
    from rd_deploy.bench import claims as judge
    from rd_deploy.bench import environment
    from rd_deploy.bench.measure import document, measure

    _choose_device(options)
    engines, skipped = _engines(options.engines, options.device)
    _check_profile(options, engines)
    plan = _plan(options, engines)
    machine, before = environment.capture(plan.threads), environment.cpu_ticks()
    model, compare = _subjects(options)
    _check_folder(options.out)
    machine["gpu"] = environment.gpu() if options.device == "cuda" else None  # now: it may be lost in what follows
    report = measure(model, compare, plan, skipped, say)
    machine["steal_share"] = environment.steal_share(before, environment.cpu_ticks())
    if machine["gpu"]:
        machine["gpu"]["ptxas"] = environment.ptxas(machine["gpu"]["capability"])
    report.warnings += environment.doubts(machine)
    if options.quick:
        report.warnings.insert(0, "--quick: a smoke run; its times support no conclusion")
        report.claims[:] = [judge.unjudged(claim, "--quick") for claim in report.claims]
    return document(model, compare, plan, report, machine), report


def _planned(options: argparse.Namespace) -> str:
    """The text of ``--plan``."""
    from rd_deploy.bench.cuda_plan import choose_card, render_plans

    _choose_device(options)
    card = choose_card(options.card, PLAN_CARD)
    return render_plans(_subjects(options), _numbers(options.batch, "--batch"), card)


def _draw(folder: Path, result: dict, ledgers: dict) -> list[str]:
    """Draw what there is; returns the files written. An earlier run's picture of ledgers does not stay beside it."""
    from rd_deploy.bench.memory_plot import plot_ledgers
    from rd_deploy.bench.plot import plot_bench

    plot_bench(folder / "bench.png", result, ledgers)
    if not ledgers:
        (folder / "memory.png").unlink(missing_ok=True)
        return ["bench.png"]
    plot_ledgers(folder / "memory.png", ledgers)
    return ["bench.png", "memory.png"]


def command(arguments: list[str]) -> int:
    """Parse, measure, print; 1 when a required claim is not met, else 0. `Stopped` after Ctrl-C, with what there is."""
    from rd_deploy.bench.claims import parse_requirements, unmet
    from rd_deploy.bench.report import render

    options = _parse(arguments)
    if options.plan:
        print(_planned(options))
        return 0
    requirements = parse_requirements(options.require)
    result, report = run(options)
    folder = Path(options.out)
    try:
        write_json(folder / "bench.json", result)
    finally:  # minutes of measuring are shown even when the disk is full
        print(render(result), flush=True)
    written = ["bench.json", *_draw(folder, result, report.ledgers)]
    print(f"\nwrote {folder}/{', '.join(written)}")
    if report.interrupted:
        raise Stopped(f"interrupted: {folder} has what was measured until then", 130)
    failures = unmet(requirements, result["claims"])
    for failure in failures:
        print(f"rd-bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    """Entry point of the console script."""
    return run_command("rd-bench", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
