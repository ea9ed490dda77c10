"""``rd-train``: train a network by a preset, flags override."""

import sys
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rd_deploy.common import UserError, require, run_command
from rd_train.recipe import Recipe, preset_names, preset_values, read_values

# What marks a folder as a run.
RUN_FILES = ("recipe.yaml", "metrics.jsonl", "model.pt", "result.json")


def _parser(defaults: dict) -> ArgumentParser:
    parser = ArgumentParser(
        prog="rd-train",
        exit_on_error=False,
        description="Train a plain CNN by residual distillation. Without arguments: the digits preset.",
    )
    parser.add_argument("preset", nargs="?", default="digits", help="a preset's name (see --list) or a recipe.yaml")
    parser.add_argument("--list", action="store_true", help="name the presets and stop")
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of the run (default: runs/PRESET-METHOD-sSEED)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that --out already holds")
    parser.add_argument("--resume", type=str | None, default=None, metavar="RUN", help="go on with an interrupted run")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    parser.add_class_arguments(Recipe, as_group=True, skip={"summary"})
    parser.set_defaults(defaults)
    return parser


def _parse(arguments: list[str], defaults: dict) -> Namespace:
    try:
        return _parser({name: value for name, value in defaults.items() if name != "summary"}).parse_args(arguments)
    except ArgumentError as error:
        raise UserError(f"{str(error).strip()} (see rd-train --help)") from error


def _recipe(options: Namespace) -> Recipe:
    names = set(Recipe.__dataclass_fields__) - {"summary"}
    return Recipe(**{name: options[name] for name in names})


def list_presets() -> str:
    """One line per preset."""
    width = max(map(len, preset_names()))
    return "\n".join(f"{name:{width}}  {preset_values(name)['summary']}" for name in preset_names())


def _new_folder(options: Namespace) -> Path:
    """Where the run goes: --out, which must hold no run unless --overwrite, or the first free default name."""
    if options.out is None:
        stem = Path("runs") / f"{Path(options.preset).stem}-{options.method}-s{options.seed}"
        number = 1
        while (folder := stem if number == 1 else Path(f"{stem}-{number}")).exists():
            number += 1
        return folder
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    present = [name for name in RUN_FILES if (folder / name).exists()]
    if present and not options.overwrite:
        raise UserError(f"{folder} already holds a run; --resume {folder}, --overwrite, or choose another --out")
    return folder


def _start(options: Namespace) -> dict:
    require("torch", "train")
    from rd_train.run import run, settle  # torch is slow to import; --list and --help do without

    recipe = settle(_recipe(options))
    folder = _new_folder(options)
    return {"folder": folder, **run(recipe, folder, tensorboard=options.tensorboard)}


def _resume(arguments: list[str], options: Namespace) -> dict:
    allowed = {"--resume", "--tensorboard", options.resume, f"--resume={options.resume}"}
    if set(arguments) - allowed:
        raise UserError("--resume takes everything from the run's recipe.yaml; leave the other options away")
    require("torch", "train")
    from rd_train.run import run

    folder = Path(options.resume)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no run (no recipe.yaml); name the folder that --out named")
    recipe = _recipe(_parse([], read_values(folder / "recipe.yaml")))
    if (folder / "result.json").exists():
        raise UserError(f"{folder} is already complete; see {folder / 'report.md'}")
    return {"folder": folder, **run(recipe, folder, resume=True, tensorboard=options.tensorboard)}


def command(arguments: list[str]) -> int:
    """Parse, train, and say where everything is."""
    options = _parse(arguments, {})
    if options.list:
        print(list_presets())
        return 0
    result = _resume(arguments, options) if options.resume else _start(_parse(arguments, preset_values(options.preset)))
    folder = result["folder"]
    teacher = result["teacher_test_accuracy"]
    versus = "" if teacher is None else f" (teacher {teacher:.2%})"
    print(f"test accuracy {result['test_accuracy']:.2%}{versus}")
    print(f"wrote {folder}/model.pt, result.json, report.md, curves.png, metrics.jsonl, recipe.yaml")
    return 0


def main() -> int:
    """Entry point of the console script."""
    return run_command("rd-train", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
