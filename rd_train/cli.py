"""``rd-train``: train a network by a preset, flags override."""

import json
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rd_deploy.common import UserError, expanded, nearest, require, run_command
from rd_train.recipe import (
    RUN_FILES,
    Recipe,
    as_released,
    check_as_released,
    preset_names,
    preset_values,
    read_values,
    what_it_takes,
    when_not_given,
)

TYPES = get_type_hints(Recipe)


def _parser(defaults: dict) -> ArgumentParser:
    parser = ArgumentParser(
        prog="rd-train",
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a plain CNN by residual distillation. Without arguments: the digits preset. "
        "rd-train finetune MODEL.pt --data-dir DIR starts from a trained network instead.",
    )
    parser.add_argument("preset", nargs="?", default="digits", help="a preset's name (see --list) or a recipe.yaml")
    parser.add_argument("--list", action="store_true", help="name the presets and stop")
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of the run (default: runs/PRESET-METHOD-sSEED)"
    )
    parser.add_argument(
        "--dry", action="store_true", help="print the plan, and by a few steps the time, memory and disk it takes; stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that --out already holds")
    parser.add_argument("--resume", type=str | None, default=None, metavar="RUN", help="go on with an interrupted run")
    parser.add_argument(
        "--as_released", action="store_true", help="set what the released code of the paper runs, see docs/method.md"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    parser.add_class_arguments(Recipe, as_group=True, skip={"summary"})
    parser.set_defaults(defaults)
    return parser


def _parse(arguments: list[str], defaults: dict) -> Namespace:
    """Options from the command line over ``defaults``; ``--data-dir`` is ``--data_dir``, a bare flag is true."""
    parser = _parser({name: value for name, value in defaults.items() if name != "summary"})
    try:
        return parser.parse_args(_normalised(arguments))
    except ArgumentError as error:
        raise UserError(f"{_explained(str(error))} (see rd-train --help)") from error


def _finetune(arguments: list[str]) -> list[str]:
    """``finetune MODEL.pt ...`` as options; other arguments as they are."""
    others = {"--help", "-h", "--list", "--resume"}
    if arguments[:1] != ["finetune"] or any(argument.partition("=")[0] in others for argument in arguments):
        return arguments
    for argument in arguments:
        if argument.partition("=")[0] in ("--arch", "--shortcuts", "--stem", "--width", "--reparam"):
            raise UserError(f"the network of a fine-tuning is that of its model.pt; leave {argument} away")
    if len(arguments) > 1 and not arguments[1].startswith("-"):
        return ["finetune", f"--start-weights={arguments[1]}", *arguments[2:]]
    if any(argument.replace("_", "-").startswith("--start-weights") for argument in arguments):
        return arguments
    raise UserError("name the network to start from: rd-train finetune MODEL.pt --data folder --data-dir DIR")


def _normalised(arguments: list[str]) -> list[str]:
    result = []
    for number, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = name[:2] + name[2:].replace("-", "_") + equals + value
            following = arguments[number + 1] if number + 1 < len(arguments) else "--"
            annotation = TYPES.get(argument[2:])
            if bool in (annotation, *get_args(annotation)) and following.lower() not in ("true", "false"):
                argument += "=true"
        result.append(argument)
    return result


def _named(arguments: list[str]) -> set[str]:
    """The options that are given."""
    return {word[2:].partition("=")[0] for word in _normalised(arguments) if word.startswith("--")}


def _explained(message: str) -> str:
    """The parser's message in the words of a user: which option, what it got, what it takes."""
    unknown = re.search(r"unrecognized arguments: --(\S+)", message)
    if unknown:
        name = unknown[1].partition("=")[0].replace("_", "-")
        known = [*set(TYPES) - {"summary"}, "list", "out", "dry", "overwrite", "resume", "as_released", "tensorboard"]
        return f"unknown option --{name}{nearest(name, [option.replace('_', '-') for option in known])}"
    wrong = re.search(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)$', message, re.DOTALL)
    if not wrong or wrong[1] not in TYPES:
        return message.strip()
    return f"{wrong[1]}={wrong[2].strip()} is not {what_it_takes(TYPES[wrong[1]])}"


def _recipe(options: Namespace) -> Recipe:
    names = set(Recipe.__dataclass_fields__) - {"summary"}
    return Recipe(**{name: options[name] for name in names})


def list_presets() -> str:
    """One line per preset."""
    width = max(map(len, preset_names()))
    return "\n".join(f"{name:{width}}  {preset_values(name)['summary']}" for name in preset_names())


def _new_folder(options: Namespace) -> Path:
    """Where the run goes: --out, which must hold no run unless --overwrite, or the first free default name."""
    from rd_train.run import check_new

    if options.out is None and options.overwrite:
        raise UserError("--overwrite replaces the run that --out names; give both")
    if options.out is None:
        stem = Path("runs") / f"{Path(options.preset).stem}-{options.method}-s{options.seed}"
        number = 1
        while (folder := stem if number == 1 else Path(f"{stem}-{number}")).exists():
            number += 1
        return folder
    folder = expanded("--out", options.out, "folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if not options.overwrite:
        check_new(folder)
    present = [(folder / name).resolve() for name in RUN_FILES if (folder / name).exists()]
    for what, file in (("teacher", options.teacher_weights), ("start_weights", options.start_weights)):
        if file and Path(file).expanduser().resolve() in present:
            raise UserError(f"--overwrite would delete the {what} {file}; choose another --out")
    return folder


def _released(arguments: list[str], preset: dict) -> Namespace:
    """The options with what --as-released sets; a preset or an option that contradicts it is a `UserError`."""
    require("torch", "train")
    from rd_train.networks import parse_arch

    given = _parse(arguments, preset)
    arch = parse_arch(given.arch)
    if arch.shortcuts == "all":
        raise UserError(f"--as-released is for plain students, not for {given.arch}")
    stem = given.stem or arch.stem
    check_as_released(preset, stem)
    options = _parse(arguments, preset | as_released(stem))
    check_as_released(vars(options), stem)
    return options


def _for_others(values: dict) -> dict:
    """The entries of a preset or recipe file; of a run's own without those that were settled by its method, say.

    They are to go by what is given now: another method has other defaults.
    """
    if {each.name for each in fields(Recipe)} - set(values) - ADDED:  # somebody wrote it, and meant what it names
        return values
    settled = when_not_given(values)
    return {name: value for name, value in values.items() if name not in settled or value != settled[name]}


def _from_preset(arguments: list[str], name: str, values: dict) -> Namespace:
    """The options over the entries of a preset or recipe file; defaults that they change there are told."""
    kept = _for_others(values)
    options = _parse(arguments, kept)
    recipe, settled = _recipe(options), [each for each in values if each not in kept and options[each] is None]
    changed = [
        f"{each}={getattr(recipe, each)} ({values[each]} there)"
        for each in settled
        if getattr(recipe, each) != values[each]
    ]
    if changed:
        print(f"note     by default otherwise than in {name}: {', '.join(changed)}")
    return options


def _start(options: Namespace, named: set[str]) -> dict | None:
    """Train, or estimate that; ``named``: the entries that the preset or an option names."""
    require("torch", "train")
    from rd_train import distributed  # torch is slow to import; --list and --help do without
    from rd_train.run import dry_run, run, settle

    recipe = settle(_recipe(options), named=named)
    if distributed.launched() and not options.out:
        raise UserError("with torchrun, name the folder of the run with --out, so that restarted processes find it")
    if distributed.launched() and options.overwrite:
        raise UserError(
            f"--overwrite does not go with torchrun, whose restarted processes could not tell the old run from theirs: "
            f"remove {options.out} first"
        )
    if distributed.restarted() and _holds_run(out := expanded("--out", options.out, "folder"), recipe):
        return _go_on(out, options.tensorboard)
    folder = _new_folder(options)
    if options.dry and distributed.launched():
        raise UserError("--dry measures one process; run it without torchrun")
    if options.dry:
        dry_run(recipe, folder)
        return None
    return {"folder": folder, **run(recipe, folder, overwrite=options.overwrite, tensorboard=options.tensorboard)}


def _holds_run(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run of this recipe; what was settled on another machine may differ."""
    if not (folder / "recipe.yaml").is_file():
        return False
    there = Recipe(**read_values(folder / "recipe.yaml"))
    return replace(there, device=recipe.device, precision=recipe.precision, threads=recipe.threads) == recipe


# What a run may go on with otherwise than it began: where its files are, and what does not change its sums.
RESUMABLE = ("data_dir", "teacher_weights", "workers", "max_corrupt", "save_minutes")
# Entries that earlier versions lacked, whose defaults do as these did.
ADDED = {"flip", "crop_padding", "smallest_crop", "save_minutes"}


def _resume(arguments: list[str]) -> dict:
    options = _parse(arguments, {"preset": ""})
    given = _named(arguments)
    if options.preset or given - {"resume", "tensorboard", *RESUMABLE}:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in RESUMABLE)
        raise UserError(
            f"--resume takes everything but {others} from the run's recipe.yaml; leave the other options away"
        )
    folder = expanded("--resume", options.resume, "folder")
    require("torch", "train")
    return _go_on(folder, options.tensorboard, {name: options[name] for name in RESUMABLE if name in given})


def _go_on(folder: Path, tensorboard: bool, changes: dict | None = None) -> dict:
    """Resume the run in ``folder`` with some entries of its recipe changed, which its ``recipe.yaml`` then has."""
    from rd_train import distributed
    from rd_train.run import run, settle

    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no run (no recipe.yaml); name the folder that --out named")
    if (folder / "result.json").exists():
        if distributed.restarted():  # a process died when everything was written
            return {"folder": folder, **json.loads((folder / "result.json").read_text(encoding="utf-8"))}
        raise UserError(f"{folder} is already complete; see {folder / 'report.html'}")
    values = read_values(folder / "recipe.yaml")
    missing = {each.name for each in fields(Recipe)} - set(values)
    if missing - ADDED:  # an entry that is missing may have another default today
        raise UserError(f"{folder / 'recipe.yaml'} was written by another version of rd-train; start a new run")
    changes = changes or {}
    without = {"data_dir": values["data"] == "digits", "teacher_weights": values["teacher_weights"] is None}
    for name in without:
        if name in changes and (without[name] or changes[name] is None):
            raise UserError(f"the run in {folder} has no {name} to change; leave --{name.replace('_', '-')} away")
    recipe = Recipe(**values | changes)
    settled = settle(recipe, begun=True)
    if replace(settled, **{name: getattr(recipe, name) for name in changes}) != recipe:
        raise UserError(f"{folder / 'recipe.yaml'} was not written by rd-train on this machine; start a new run")
    recipe = settled
    return {"folder": folder, **run(recipe, folder, resume=True, tensorboard=tensorboard)}


def command(arguments: list[str]) -> int:
    """Parse, train, and say where everything is."""
    arguments = _finetune(arguments)
    options = _parse(arguments, {})
    if options.list:
        print(list_presets())
        return 0
    if options.resume is not None:
        result = _resume(arguments)
    else:  # parsed again, now with the preset's values as defaults
        values = preset_values(options.preset)
        if options.as_released:
            options = _released(arguments, values)
        else:
            options = _from_preset(arguments, options.preset, values)
        result = _start(options, _named(arguments) | set(values))
    if result is None:  # a dry run
        return 0
    folder = result["folder"]
    teacher = result["teacher_test_accuracy"]
    versus = "" if teacher is None else f" (teacher {teacher:.2%})"
    print(f"test accuracy {result['test_accuracy']:.2%}{versus}")
    if result["corrupt_images"]:
        print(f"left out {result['corrupt_images']} corrupt images, named in {folder}/skipped.txt")
    print(f"wrote {folder}/model.pt, result.json, report.html, report.md, curves.png, metrics.jsonl, recipe.yaml")
    return 0


def main() -> int:
    """Entry point of the console script, and of ``torchrun -m rd_train``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's; asked without torch, which is slow to import
        from rd_train.distributed import leave, run_together

        leave(run_together("rd-train", lambda: command(sys.argv[1:])))
    return run_command("rd-train", lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
