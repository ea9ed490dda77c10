"""``rd-train``: train a network by a preset, flags override."""

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from rd_deploy.common import UserError, expanded, first_line, nearest, require, run_command
from rd_train import cli_evaluate
from rd_train.recipe import RUN_FILES, Recipe, as_released, check_as_released, what_it_takes, when_not_given
from rd_train.recipe_files import preset_names, preset_values, read_values

TYPES = get_type_hints(Recipe)


def _parser(defaults: dict) -> ArgumentParser:
    parser = ArgumentParser(
        prog="rd-train",
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a plain CNN by residual distillation. Without arguments: the digits preset. Defaults below "
        "are those that no preset and no method sets otherwise: with --dry the plan says what a run would do. Options "
        "may be written with dashes, --data-dir. "
        "rd-train finetune MODEL.pt --data-dir DIR starts from a trained network instead; rd-train evaluate MODEL.pt "
        "measures one.",
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
        "--go_on", action="store_true", help="if --out holds this run, go on with it or tell its result; else start it"
    )
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
    except (ValueError, OverflowError) as error:  # a number that no float holds, or too long to be printed
        raise UserError(f"an option has a value out of all range ({first_line(error)}); see rd-train --help") from error


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
    raise UserError(
        "name the network to start from, right after the word: rd-train finetune MODEL.pt --data folder --data-dir DIR"
    )


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
        known = {*TYPES, "list", "out", "dry", "overwrite", "resume", "go_on", "as_released", "tensorboard"} - {
            "summary"
        }
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


LOGITS = {"kd_weight", "kd_start", "kd_probability"}


def _for_others(values: dict, arguments: list[str]) -> dict:
    """The entries of a preset or recipe file; of a run's own without those that were settled by its method, say.

    They are to go by what is given now, in ``arguments``: another method has other defaults.
    """
    if {each.name for each in fields(Recipe)} - set(values) - ADDED:  # somebody wrote it, and meant what it names
        return values
    settled = when_not_given(values)
    left = {name for name, value in values.items() if name in settled and value == settled[name]}
    if not left >= LOGITS:  # one decision: which steps distil goes with how much
        left -= LOGITS
    if values["kd_weight"] == 0 and _parse(arguments, values).method != values["method"]:
        left |= LOGITS  # no weight says nothing to a method that distils
    return {name: value for name, value in values.items() if name not in left}


def _from_preset(arguments: list[str], name: str, values: dict) -> Namespace:
    """The options over the entries of a preset or recipe file; defaults that they change there are told."""
    kept = _for_others(values, arguments)
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
    from rd_train.plan import settle
    from rd_train.run import dry_run, run

    for refused, reason in _conflicts(options, distributed.launched()):
        if refused:
            raise UserError(reason)
    asked = _recipe(options)
    recipe = settle(asked, named=named)
    if options.go_on or distributed.restarted():
        folder = expanded("--out", options.out, "folder")
        if there := _run_in(folder, asked, recipe, options.go_on):
            return _go_on(folder, options.tensorboard, _changes(there, asked, recipe, named), told=True)
    folder = _new_folder(options)
    if options.dry:
        dry_run(recipe, folder)
        return None
    return {"folder": folder, **run(recipe, folder, overwrite=options.overwrite, tensorboard=options.tensorboard)}


def _conflicts(options: Namespace, launched: bool) -> list[tuple[bool, str]]:
    """Options that contradict each other, or torchrun: (whether these do, what to say)."""
    return [
        (options.go_on and not options.out, "--go-on goes on with the run that --out names; give both"),
        (options.go_on and options.overwrite, "--go-on keeps the run that --overwrite replaces; give one of the two"),
        (options.go_on and options.dry, "--dry measures a new run; leave --go-on away"),
        (
            launched and not options.out,
            "with torchrun, name the folder of the run with --out, so that restarted processes find it",
        ),
        (
            launched and options.overwrite,
            "--overwrite does not go with torchrun, whose restarted processes could not tell the old run from theirs: "
            f"remove {options.out} first",
        ),
        (launched and options.dry, "--dry measures one process; run it without torchrun"),
    ]


# How a run is computed: to go on otherwise changes the rounding of its sums, which is said.
MACHINE = ("device", "precision", "threads", "compile")
# What a run may go on with otherwise than it began: also where its files are, and what does not change its sums.
RESUMABLE = ("data_dir", "workers", "max_corrupt", "save_minutes", *MACHINE)
# Entries that earlier versions lacked, whose defaults do as these did.
ADDED = {"flip", "crop_padding", "smallest_crop", "save_minutes"}


def _run_in(folder: Path, asked: Recipe, recipe: Recipe, go_on: bool) -> Recipe | None:
    """The recipe of the run that the folder holds, if it is the one ``asked`` for, which is ``recipe`` when settled.

    Another run there is a `UserError` of --go-on; None for torchrun's restarts, which it refuses as any new run.
    """
    from rd_train import distributed

    path = folder / "recipe.yaml"
    there = Recipe(**read_values(path)) if path.is_file() else None
    difference = None if there is None else _difference(there, asked, recipe)
    same = there is not None and difference is None
    if not distributed.same_everywhere(int(same)):
        raise UserError(f"the processes see different files in {folder}; all machines must share that folder")
    if go_on and difference is not None:
        raise UserError(f"{folder} holds another run, {difference}; give the options of that one, or another --out")
    return there if same else None


def _difference(there: Recipe, asked: Recipe, recipe: Recipe) -> str | None:
    """In words, the first entry that makes a run another one than is asked for; a precision that is named is one."""
    may_differ = {*RESUMABLE} if asked.precision == "auto" else {*RESUMABLE} - {"precision"}
    may_differ |= {*there.unused(), *recipe.unused()}
    for name in [each.name for each in fields(Recipe) if each.name not in may_differ]:
        found, wanted = getattr(there, name), getattr(recipe, name)
        if found != wanted and {found, wanted} != {"bf16", "bf16-emulated"}:
            return f"{name}={found} there, {wanted} here"
    return None


def _changes(there: Recipe, asked: Recipe, recipe: Recipe, named: set[str]) -> dict:
    """What is asked for by name otherwise than the run has it, of what it may go on with."""
    given = {name for name in RESUMABLE if name in named and getattr(asked, name) not in (None, "auto")}
    return {name: getattr(recipe, name) for name in given if getattr(recipe, name) != getattr(there, name)}


def _resume(arguments: list[str]) -> dict:
    options = _parse(arguments, {"preset": ""})
    given = _named(arguments)
    if options.preset or given - {"resume", "tensorboard", *RESUMABLE}:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in (*RESUMABLE, "tensorboard"))
        raise UserError(
            f"--resume takes everything but {others} from the run's recipe.yaml; leave the other options away"
        )
    folder = expanded("--resume", options.resume, "folder")
    require("torch", "train")
    from rd_train import distributed

    changes = {name: options[name] for name in RESUMABLE if name in given}
    return _go_on(folder, options.tensorboard, changes, told=distributed.restarted())


def _go_on(folder: Path, tensorboard: bool, changes: dict, *, told: bool) -> dict:
    """Resume the run in ``folder`` with some entries of its recipe changed, which its ``recipe.yaml`` then has.

    A complete one is an error, or with ``told`` what it found. (torchrun restarts also those that ended with a process
    dying when everything was written.)
    """
    from rd_train import distributed
    from rd_train.plan import settle
    from rd_train.run import run

    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no run (no recipe.yaml); name the folder that --out named")
    if distributed.any_process((folder / "result.json").exists()):  # which a file system may show to some first
        if told:
            print(f"note     {folder} holds this run, complete")
            found = distributed.of_first(json.dumps(_found(folder / "result.json") if distributed.first() else None))
            return {"folder": folder, **json.loads(found)}
        raise UserError(f"{folder} is already complete; see {folder / 'report.html'}")
    values = read_values(folder / "recipe.yaml")
    missing = {each.name for each in fields(Recipe)} - set(values)
    if missing - ADDED:  # an entry that is missing may have another default today
        raise UserError(f"{folder / 'recipe.yaml'} was written by another version of rd-train; start a new run")
    if "data_dir" in changes and (values["data"] == "digits" or changes["data_dir"] is None):
        raise UserError(f"the run in {folder} has no data_dir to change; leave --data-dir away")
    before, recipe = Recipe(**values), settle(Recipe(**values | changes), begun=True)
    otherwise = [
        f"{name}={getattr(recipe, name)} ({getattr(before, name)} before)"
        for name in MACHINE
        if getattr(recipe, name) != getattr(before, name)
    ]
    if otherwise:
        print(f"note     goes on with {', '.join(otherwise)}: not bit-equal to a run without interruption")
    return {"folder": folder, **run(recipe, folder, resume=True, tensorboard=tensorboard)}


def _found(path: Path) -> dict:
    """What of a complete run's result is told."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {name: result[name] for name in ("test_accuracy", "teacher_test_accuracy", "corrupt_images")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; start a new run") from error


def command(arguments: list[str]) -> int:
    """Parse, train (or evaluate), and say where everything is."""
    if arguments[:1] == ["evaluate"]:
        return cli_evaluate.command(arguments[1:])
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
