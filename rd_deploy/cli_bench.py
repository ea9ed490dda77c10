"""``rd-bench``: is the plain network faster and smaller than the ResNet, on this machine, on every engine?"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rd_deploy.common import UserError, nearest, run_command, write_json

DESCRIPTION = """Compare a network's latency and feature-map memory with another's, on every engine that is installed.
Times are host to host: NumPy images in, NumPy logits out. The two networks are measured interleaved (A B B A)."""
PRECISIONS = ("fp32", "bf16")
QUICK_SECONDS = 0.2
QUICK_QUADS = 3


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="rd-bench", exit_on_error=False, description=DESCRIPTION)
    parser.add_argument(
        "model",
        nargs="?",
        default="plain50",
        metavar="MODEL",
        help="an architecture (plain50), model.pt, model.onnx, torchvision:NAME or timm:NAME",
    )
    parser.add_argument(
        "--compare",
        type=str | None,
        default=None,
        metavar="MODEL",
        help="likewise; a name takes MODEL's input, classes, stem and width (null: MODEL's ResNet, else resnet50)",
    )
    parser.add_argument(
        "--engines",
        type=str | None,
        default=None,
        help="torch,onnxruntime,openvino; null: those installed",
    )
    parser.add_argument("--batch", type=str, default="1,8", help="batch sizes")
    parser.add_argument("--precision", type=str, default="fp32,bf16", help="precisions")
    parser.add_argument("--threads", type=int | None, default=None, help="null: the CPUs this process may use")
    parser.add_argument("--size", type=int | None, default=None, help="pixels, for named networks; null: 224 or 32")
    parser.add_argument("--seconds", type=float, default=10.0, help="sampling time per pair")
    parser.add_argument("--seed", type=int, default=0, help="of random weights, images and the bootstrap")
    parser.add_argument("--quick", action="store_true", help="a smoke run: short sampling, no conclusions")
    parser.add_argument("--out", type=str, default="bench", help="folder of the results")
    parser.add_argument(
        "--require",
        action="append",
        default=None,
        metavar="CLAIM=NUMBER",
        help="exit 1 unless it holds: speed=1.4 (best engine against best engine), memory=1.25 (in-place ledger)",
    )
    return parser


def _parse(arguments: list[str]) -> Namespace:
    try:
        return _parser().parse_args(arguments)
    except ArgumentError as error:
        raise UserError(f"{str(error).strip()} (see rd-bench --help)") from error


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


def _engines(text: str | None) -> tuple[list, list[dict]]:
    """The engines to run and, for the default list, what was left out and why; one asked for must be there."""
    from rd_deploy.engines import ENGINES, get_engine

    chosen, skipped = [], []
    for name in dict.fromkeys(ENGINES if text is None else text.split(",")):
        engine = get_engine(name)
        reason = engine.missing()
        if reason is None:
            chosen.append(engine)
        elif text is not None:
            raise UserError(reason)
        else:
            skipped.append({"engine": name, "precision": None, "batch": None, "reason": reason})
    return chosen, skipped


def _check_numbers(options: Namespace) -> None:
    for option, low, high in (("threads", 1, 4096), ("size", 1, 4096), ("seconds", 0.01, 3600), ("seed", 0, 2**31)):
        value = options[option]
        if value is not None and not low <= value <= high:
            raise UserError(f"--{option} {value} must be from {low} to {high}")


def _folder(name: str) -> Path:
    """Make the output folder and try to write there now, rather than fail after minutes of measuring."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror or error}; choose another folder") from error
    return folder


def _subjects(options: Namespace) -> tuple:
    from dataclasses import replace

    from rd_deploy.bench.models import check_comparable, counterpart, load_subject

    model = load_subject(options.model, size=options.size, seed=options.seed)
    compare = load_subject(options.compare or counterpart(model), like=model, size=options.size, seed=options.seed)
    check_comparable(model, compare)
    if compare.name == model.name:
        compare = replace(compare, name=f"{compare.name} (compare)")
    return model, compare


def _plan(options: Namespace, engines: list):
    from rd_deploy.bench.environment import available_threads
    from rd_deploy.bench.measure import Plan
    from rd_deploy.bench.timer import MIN_QUADS

    return Plan(
        engines=engines,
        batches=_numbers(options.batch, "--batch"),
        precisions=_precisions(options.precision),
        threads=options.threads or available_threads(),
        seconds=min(options.seconds, QUICK_SECONDS) if options.quick else options.seconds,
        warm_up=1.0 if options.quick else 10.0,
        min_quads=QUICK_QUADS if options.quick else MIN_QUADS,
        seed=options.seed,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(options: Namespace, say: Callable[[str], None] = _say) -> dict:
    """Measure as the options say; returns the content of ``bench.json`` and writes it and the pictures."""
    from rd_deploy.bench import environment
    from rd_deploy.bench.measure import document, measure

    engines, skipped = _engines(options.engines)
    plan = _plan(options, engines)
    model, compare = _subjects(options)
    folder = _folder(options.out)
    machine, before = environment.capture(plan.threads), environment.cpu_ticks()
    report = measure(model, compare, plan, skipped, say)
    machine["steal_share"] = environment.steal_share(before, environment.cpu_ticks())
    if options.quick:
        report.warnings.insert(0, "--quick: a smoke run; its times support no conclusion")
    result = document(model, compare, plan, report, machine)
    _write(folder, result, (model, compare), plan)
    return result


def _write(folder: Path, result: dict, subjects: tuple, plan) -> None:
    from rd_deploy.bench.feature_maps import BYTES, POLICIES
    from rd_deploy.bench.memory_plot import plot_ledgers
    from rd_deploy.bench.plot import plot_bench
    from rd_deploy.memory import ledger

    precision, batch = plan.precisions[0], plan.batches[0]
    counted = {
        policy: {subject.name: ledger(subject.model, batch, BYTES[precision], policy) for subject in subjects}
        for policy in POLICIES
    }
    write_json(folder / "bench.json", result)
    plot_bench(folder / "bench.png", result, counted)
    plot_ledgers(folder / "memory.png", counted)


def command(arguments: list[str]) -> int:
    """Parse, measure, print; 1 when a required claim is not met, else 0."""
    from rd_deploy.bench.claims import parse_requirements, unmet
    from rd_deploy.bench.report import render

    options = _parse(arguments)
    _check_numbers(options)
    requirements = parse_requirements(options.require or [])
    result = run(options)
    print(render(result))
    print(f"\nwrote {options.out}/bench.json, bench.png, memory.png")
    failures = unmet(requirements, result["claims"])
    for failure in failures:
        print(f"rd-bench: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    """Entry point of the console script."""
    return run_command("rd-bench", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
