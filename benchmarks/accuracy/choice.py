"""Accuracy of finished runs on the training images that they were not trained on: what a recipe can be chosen by.

    python benchmarks/accuracy/choice.py runs/table/plain20-rd-tuned-n20000-e10-s0 ... --results FILE.json

The experiments train on 20,000 of the 55,000 training images of Fashion-MNIST. The others, 35,000, tell runs apart that
the 5,000 validation images do not (a standard error of 0.13 points instead of 0.36 at 93%), without a look at the test
images. Each folder is of a run of rd-train by ``--train-limit`` on images that are read at once; its ``model.pt``, the
epoch that validation chose, is run as the run's recipe says. Written are, for each run, both accuracies, that of the
test and what its recipe has otherwise than rd-train's default for its network had been when the first was measured.
``--earlier`` takes over what such files hold of other runs, whose folders need not be there.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from runner import IN_ALL_STEPS, OF_THE_MACHINE, ROOT, document, with_origin

from rd_deploy.common import UserError, check_file, one_line, run_command, write_json
from rd_train import bf16
from rd_train.checkpoint import load_checkpoint
from rd_train.context import Context
from rd_train.data import Dataset, MemorySplit, load_dataset
from rd_train.evaluation import evaluate
from rd_train.recipe import IN_MEMORY, Recipe, defaults
from rd_train.recipe_files import read_values
from rd_train.splits import limited

# Of a recipe what all runs that are compared share, and what another column or the run's name says.
SHARED = {
    "arch",
    "data",
    "method",
    "seed",
    "size",
    "train_limit",
    "epochs",
    "precision",
    "teacher_weights",
} | OF_THE_MACHINE

# Defaults of rd when the first runs were measured that are others now, so that lines of all days say the same.
FIRST = {"kd_weight": 0.0, **IN_ALL_STEPS}


def read_run(folder: Path) -> tuple[Recipe, dict]:
    """A finished run's recipe and result."""
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} holds no finished run; give folders that have a result.json")
    recipe = Recipe(**read_values(folder / "recipe.yaml"))
    if recipe.data not in IN_MEMORY or recipe.train_limit is None:
        raise UserError(f"{folder} was trained on all images, or on files: it left none out that could be read here")
    return recipe, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def left_out(recipe: Recipe) -> Dataset:
    """The run's data set with the images that it left out as its training split."""
    every = load_dataset(recipe.data, recipe.data_dir, size=recipe.size)
    split, chosen = every.train, limited(every.train.labels.numpy(), recipe.train_limit)
    rest = np.setdiff1d(np.arange(len(split)), chosen)
    kept = MemorySplit(split.pixels[rest], split.labels[torch.from_numpy(rest)], split.preprocessing, split.augment)
    return replace(every, train=kept)


def measured(folder: Path, recipe: Recipe, result: dict, dataset: Dataset) -> dict:
    """What there is to say of a run."""
    device = torch.device(recipe.device)
    context = Context(recipe, dataset, folder, device, Event())
    with bf16.products(emulated=recipe.precision == bf16.EMULATED):
        network = context.place(load_checkpoint(folder / "model.pt").network())
        accuracy, _ = evaluate(network, dataset.train, context)
    return {
        "name": folder.name,
        "arch": recipe.arch,
        "seed": recipe.seed,
        "options": differences(recipe),
        "teacher": recipe.teacher_weights and Path(recipe.teacher_weights).parent.name,
        "left_out_accuracy": accuracy,
        "left_out_images": len(dataset.train),
        "val_accuracy": result["val_accuracy"],
        "val_images": len(dataset.val),
        "test_accuracy": result["test_accuracy"],
        "precision": recipe.precision,
    }


def differences(recipe: Recipe) -> dict:
    """The entries that have an effect and are not what they were by default beside the others."""
    usual = defaults(vars(recipe)) | (FIRST if recipe.method == "rd" else {})
    names = {field.name for field in fields(Recipe)} - SHARED - {*recipe.unused()}
    if recipe.kd_weight == 0:
        names -= {*IN_ALL_STEPS}
    return {name: getattr(recipe, name) for name in sorted(names) if getattr(recipe, name) != usual[name]}


def read_earlier(path: Path) -> list[dict]:
    """The results in a file of this script, checked for what their table is made of, with where they are from."""
    text = check_file(path, "file of results", 16 << 20).read_bytes()
    try:
        results = with_origin(json.loads(text), path)
        for each in results:
            if type(each["options"]) is not dict or type(each["seed"]) is not int:
                raise ValueError("options are no object, or the seed is no number")
            if not all(type(each[key]) is str for key in ("name", "arch")):
                raise ValueError("name or network is no text")
            if not isinstance(each["teacher"], str | None):
                raise ValueError("teacher is no text")
            for part in ("left_out", "val"):
                if type(each[f"{part}_images"]) is not int:
                    raise ValueError(f"{part}_images is no number")
            for part in ("left_out", "val", "test"):
                if not 0 <= each[f"{part}_accuracy"] <= 1:
                    raise ValueError(f"{part}_accuracy is not from 0 to 1")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {one_line(error)[:100]}; --earlier takes what choice.py wrote") from error
    return results


def _line(each: dict) -> tuple[str, str, str | None]:
    """What tells a result from others: runs of one name may be of other settings, when a default has changed."""
    return each["name"], json.dumps(each["options"], sort_keys=True), each["teacher"]


def command() -> None:
    """Read the runs, then measure each and write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="FOLDER", help="finished runs")
    parser.add_argument("--results", type=Path, default=Path("runs/accuracy-choice.json"))
    parser.add_argument("--note", default="", help="what a reader must know of the machine meanwhile")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], metavar="JSON", help="take over their results")
    parser.set_defaults(workers=1)
    options = parser.parse_args()
    runs = {folder: read_run(folder) for folder in options.runs}
    what = "accuracy on training images that runs were not trained on"
    script = f"python {Path(__file__).relative_to(ROOT).as_posix()} {' '.join(folder.name for folder in runs)}"
    # Of the same line in several files, that of the first.
    found = {_line(each): each for path in reversed(options.earlier) for each in read_earlier(path)}
    datasets = {}
    for folder, (recipe, result) in runs.items():
        torch.set_num_threads(recipe.threads)
        key = (recipe.data, recipe.data_dir, recipe.size, recipe.train_limit)
        if key not in datasets:
            datasets[key] = left_out(recipe)
        each = measured(folder, recipe, result, datasets[key])
        found.pop(_line(each), None)
        found[_line(each)] = each
        print(f"{each['name']:48} left out {each['left_out_accuracy']:.2%}, validation {each['val_accuracy']:.2%}")
        write_json(options.results, {**document(what, script, options), "results": [*found.values()]})
    print(f"wrote {options.results}")


if __name__ == "__main__":
    sys.exit(run_command("choice", command))
