"""What a finished run leaves for its reader: ``curves.png``, ``report.md`` and ``report.html``."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rd_deploy.common import atomic_path, write_text
from rd_train.audit import plot_audit
from rd_train.data import Dataset
from rd_train.evaluation import Predictions
from rd_train.html_report import page
from rd_train.metrics import read_rows
from rd_train.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_TERMS = {"phase", "epoch", "step", "lr", "muon_lr", "loss", "seconds", "val_loss", "corrupt_images"}
NOT_TERMS |= {"gradient_norm", "images_per_second", "loader_images_per_second", "model_images_per_second"}


def write(folder: Path, recipe: Recipe, result: dict, dataset: Dataset, seen: Predictions) -> None:
    """Write the files of a finished run; ``seen``: the student's predictions of the test split."""
    rows = read_rows(folder)
    figure = curves(rows, result)
    with atomic_path(folder / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    audit = plot_audit(folder / "audit.png", rows)
    write_text(folder / "report.md", _markdown(rows, recipe, result, audit is not None))
    plots = {_in_words(rows): inline_svg(figure)}
    if audit is not None:
        plots["Gradients of each stage through the student and through the teacher, and their cosine"] = inline_svg(
            audit
        )
    write_text(folder / "report.html", page(recipe, result, rows, dataset, seen, plots))


def inline_svg(figure: "Figure") -> str:
    """A figure as an SVG element whose black parts follow the colour of the text around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def curves(rows: list[dict], result: dict) -> "Figure":
    """Loss terms on the left, accuracy of student and teacher on the right, over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    student = [row for row in rows if row["phase"] == "student"]
    teacher = [row for row in rows if row["phase"] == "teacher"]
    epochs = [row["epoch"] for row in student]
    losses.plot(epochs, [row["loss"] for row in student], color="black", marker=".", linewidth=2, label="loss")
    for name in _terms(student):  # an epoch without a splice, say, has none of its terms
        values = [row.get(name, math.nan) for row in student]
        losses.plot(epochs, values, label=name.replace("_", " "), linewidth=1.2, marker=".")
    losses.plot(
        epochs, [row["val_loss"] for row in student], ":", marker=".", color="black", label="validation cross-entropy"
    )
    losses.set(xlabel="epoch", ylabel="loss (student)", yscale="log")
    for name, style in (("train_accuracy", "--"), ("val_accuracy", "-")):
        accuracies.plot(
            epochs, [100 * row[name] for row in student], style, marker=".", color="C0", label=_label("student", name)
        )
        if teacher:
            epochs_teacher = [row["epoch"] for row in teacher]
            values = [100 * row[name] for row in teacher]
            accuracies.plot(epochs_teacher, values, style, marker=".", color="C1", label=_label("teacher", name))
    if "teacher_val_accuracy" in student[0]:
        values = [100 * row["teacher_val_accuracy"] for row in student]
        accuracies.plot(epochs, values, marker=".", color="C1", label="teacher, validation")
    if result["teacher_test_accuracy"] is not None:
        percent = 100 * result["teacher_test_accuracy"]
        accuracies.axhline(percent, color="C1", linewidth=0.8, alpha=0.6, label="teacher, test")
    accuracies.axhline(100 * result["test_accuracy"], color="C0", linewidth=0.8, alpha=0.6, label="student, test")
    accuracies.set(xlabel="epoch", ylabel="accuracy, %")
    title = f"{result['arch']}, {result['method']}, {result['data']}: test {result['test_accuracy']:.2%}"
    if result["teacher_test_accuracy"] is not None:
        title += f" (teacher {result['teacher_test_accuracy']:.2%})"
    figure.suptitle(title)
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    return figure


def _in_words(rows: list[dict]) -> str:
    """What the curves show, for those who cannot see them."""
    student = [row for row in rows if row["phase"] == "student"]
    loss, accuracy = ([row[name] for row in student] for name in ("loss", "val_accuracy"))
    return (
        f"Loss and accuracy over {len(student)} epochs of the student: loss from {loss[0]:.3f} to {loss[-1]:.3f}, "
        f"validation accuracy from {accuracy[0]:.2%} to {accuracy[-1]:.2%}"
    )


def _terms(rows: list[dict]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in NOT_TERMS and "accuracy" not in name and not name.startswith("audit")]


def _label(who: str, name: str) -> str:
    return f"{who}, {'training' if name.startswith('train') else 'validation'}"


def _markdown(rows: list[dict], recipe: Recipe, result: dict, audited: bool) -> str:
    teacher = result["teacher_test_accuracy"]
    last, corrupt = rows[-1], result["corrupt_images"]
    lines = [
        f"# {result['arch']} by {result['method']} on {result['data']}",
        "",
        "| | |",
        "|---|---|",
        f"| test accuracy | {result['test_accuracy']:.2%} of {result['test_images']:,} images |",
        f"| mean of the classes' test accuracies | {result['mean_class_accuracy']:.2%} |",
        f"| teacher's test accuracy | {'none' if teacher is None else f'{teacher:.2%}'} |",
        f"| validation accuracy | {result['val_accuracy']:.2%}, epoch {result['best_epoch']} of {result['epochs']} |",
        f"| initialisation, seed | {result['init']}, {result['seed']} |",
        f"| parameters, MACs per image | {result['parameters']:,}, {result['macs_per_image']:,} |",
        *([f"| corrupt images left out | {corrupt}, see skipped.txt |"] if corrupt else []),
        f"| cost of a step | {result['step_cost']:.2f} x a plain cross-entropy step |",
        f"| time | {result['seconds']:.0f} s, the teacher's own training {result['teacher_seconds']:.0f} s "
        f"({recipe.device}, {recipe.threads} threads, {recipe.precision}, torch {result['torch']}) |",
        f"| speed at the end | {last['images_per_second']:.0f} images/s (loader alone "
        f"{last['loader_images_per_second']:.0f}, model alone {last['model_images_per_second']:.0f}) |",
        "",
        "One run with one seed: differences of a point or two between such runs mean nothing.",
        "",
        "![curves](curves.png)",
        "",
        *(["![gradient audit](audit.png)", ""] if audited else []),
        "Curves, mistakes and classes in a browser: `report.html`.",
        "",
        "Again with exactly this recipe: `rd-train recipe.yaml`. Next: `rd-export model.pt`.",
        "",
    ]
    return "\n".join(lines)
