"""``rd-train evaluate``: the accuracy of a trained network on a split of a data set."""

import argparse
import math
import threading
from dataclasses import replace
from pathlib import Path

from rd_deploy.common import Parser, UserError, check_replaceable, expanded, printable, require, write_json
from rd_train.recipe import Recipe

SPLITS = ("train", "val", "test")  # and all
MOST_LINES = 20  # classes that are printed; all of them are in the JSON
MOST_CONFUSED = 1000  # classes of a confusion matrix, which has the square of them


def command(arguments: list[str]) -> int:
    """Evaluate by the options; print, and write with ``--out``."""
    options = _parse(arguments)
    require("torch", "train")
    from rd_train import distributed

    if distributed.launched():
        raise UserError("rd-train evaluate is one process; run it without torchrun")
    result = evaluate_checkpoint(options)
    print(f"network  {result['arch']}, of {result['model']}")
    print(
        f"data     {result['data']}: {result['images']:,} images ({_of(result)}, of {result['images_of_splits']:,} "
        f"in the three splits), {len(result['classes'])} classes"
        + (f"; {result['corrupt_images']} corrupt left out" if result["corrupt_images"] else "")
    )
    low, high = result["interval"]
    print(
        f"accuracy {result['accuracy']:.2%} ({low:.2%} to {high:.2%}, 95%), mean of the classes "
        f"{result['mean_class_accuracy']:.2%}, cross-entropy {result['loss']:.4f}"
    )
    if len(result["classes"]) <= MOST_LINES:
        for each in result["classes"]:
            share = "-" if each["accuracy"] is None else f"{each['accuracy']:.2%}"
            print(f"  {share:>7} of {each['images']:>6,}  {printable(each['name'])}")
    if options.out is not None:
        write_json(options.out, result)
        print(f"wrote {options.out}")
    return 0


def _of(result: dict) -> str:
    """Which images of the data set."""
    seed = result["split_seed"]
    return result["split"] if seed is None else f"{result['split']} of split seed {seed}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rd-train evaluate",
        description="The accuracy of a model.pt on a split of the data it was trained on, or of others of its classes.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL.pt")
    parser.add_argument("--data", help="a data set, as for rd-train (default: the one that it was trained on)")
    parser.add_argument("--data-dir", metavar="DIR", help="where its files are (default: where they were)")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        help="which division of Caltech101 (default: that of its training)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: as rd-train, bf16 where the machine multiplies it (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: all)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode image files (default: the CPUs)"
    )
    parser.add_argument(
        "--max-corrupt", type=int, metavar="N", help="image files that may be unreadable (default: as in its training)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help=f"write the figures, with the confusion matrix up to {MOST_CONFUSED:,} classes",
    )
    options = parser.parse_args(arguments)
    if options.out is not None:
        options.out = expanded("--out", options.out, "file")
        check_replaceable(options.out)
        if not options.out.parent.is_dir():
            raise UserError(f"--out {options.out}: name a file in a folder that is there")
    return options


def evaluate_checkpoint(options: argparse.Namespace) -> dict:
    """What ``--out`` gets: accuracies in [0, 1], their 95% interval, and the confusion matrix (true class by row).

    The matrix is None with more than `MOST_CONFUSED` classes; ``split_seed``: None where the data are not divided by
    one. Images are preprocessed as the network was trained for, whichever data set they are of. Data with other
    classes, or of another kind, are a `UserError`.
    """
    import torch

    from rd_train.checkpoint import load_checkpoint
    from rd_train.context import Context
    from rd_train.evaluation import joined, predict
    from rd_train.html_report import confusion_matrix, interval
    from rd_train.plan import computing, data_of, settle

    checkpoint = load_checkpoint(options.model)
    recipe = settle(replace(_recipe(checkpoint.recipe, options), size=checkpoint.preprocessing.size))
    torch.set_num_threads(recipe.threads)
    dataset = data_of(recipe, checkpoint.preprocessing)
    try:
        if dataset.classes != checkpoint.classes:
            raise UserError(
                f"{options.model} and {recipe.data} differ in {_unlike(checkpoint.classes, dataset.classes)}"
            )
        if dataset.preprocessing != checkpoint.preprocessing:
            raise UserError(f"images of {recipe.data} are not prepared as those that {options.model} was trained on")
        context = Context(recipe, dataset, Path(), torch.device(recipe.device), threading.Event())
        splits = [getattr(dataset, name) for name in (SPLITS if options.split == "all" else (options.split,))]
        with computing(recipe):
            network = context.place(checkpoint.network())
            seen = joined([predict(network, split, context) for split in splits])
    finally:
        dataset.workers.close()
    if not math.isfinite(seen.loss):
        raise UserError(f"{options.model} gives NaN or infinite logits for these images; train again")
    count = len(dataset.classes)
    right = torch.bincount(seen.labels[seen.labels == seen.predicted], minlength=count).tolist()
    every = torch.bincount(seen.labels, minlength=count).tolist()
    per_class = [
        {"name": name, "images": images, "accuracy": hits / images if images else None}
        for name, images, hits in zip(dataset.classes, every, right, strict=True)
    ]
    return {
        "model": str(options.model),
        "arch": checkpoint.arch.name,
        "data": dataset.name,
        "split": options.split,
        "split_seed": None if "split_seed" in recipe.without_effect() else recipe.split_seed,
        "images": len(seen.labels),
        "images_of_splits": sum(dataset.counts),
        "corrupt_images": sum(map(len, splits)) - len(seen.labels),
        "accuracy": seen.accuracy,
        "interval": interval(seen.accuracy, len(seen.labels)),
        "mean_class_accuracy": seen.mean_class_accuracy,
        "loss": seen.loss,
        "classes": per_class,
        "confusion": confusion_matrix(seen, count).tolist() if count <= MOST_CONFUSED else None,
        "precision": recipe.precision,
        "device": recipe.device,
        "torch": str(torch.__version__),
    }


def _recipe(trained: object, options: argparse.Namespace) -> Recipe:
    """The part of a recipe that evaluating needs: the data of the options, or else those that ``trained`` names."""
    trained = trained if isinstance(trained, dict) else {}
    data = options.data or trained.get("data")
    if not isinstance(data, str):
        raise UserError(f"{options.model} does not say which data it was trained on; pass --data and --data-dir")
    kept = {}
    if data == trained.get("data"):  # what divides the images, above all: test images must not be those of training
        kept = {name: trained[name] for name in ("split_seed", "max_corrupt") if name in trained}
        if _same_place(options.data_dir, trained.get("data_dir")):
            kept |= {name: trained[name] for name in ("data_dir", "train_limit") if name in trained}
    names = ("data_dir", "split_seed", "max_corrupt", "device", "precision", "threads", "workers")
    values = kept | {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        return Recipe(data=data, method="ce", **values)
    except (TypeError, ValueError) as error:  # a hostile file's
        raise UserError(f"the recipe in {options.model} holds wrong values ({error}); train again") from error


def _same_place(given: str | None, known: object) -> bool:
    """Whether an option names the folder that a checkpoint does, however it is written."""
    if given is None:
        return True
    return isinstance(known, str) and expanded("--data-dir", given).resolve() == expanded("data_dir", known).resolve()


def _unlike(known: list[str], there: list[str]) -> str:
    """How two lists of classes differ."""
    if sorted(known) == sorted(there):
        return "the order of their classes"
    if len(known) != len(there):
        return f"the number of classes, {len(known)} and {len(there)}"
    one, other = next(pair for pair in zip(known, there, strict=True) if pair[0] != pair[1])
    return f"their classes: '{printable(one)}' and '{printable(other)}', say"
