"""``report.html``: a finished run in one file that needs no network: curves, mistakes, recipe, cost.

Class names are names of folders, which anybody may have chosen: everything passes through `escaped`, and a policy in
the page forbids scripts and requests besides.
"""

import base64
import io
import math
from html import escape

import numpy as np
from PIL import Image

from rd_deploy.preprocessing import Preprocessing
from rd_train.data import Dataset
from rd_train.evaluation import Predictions
from rd_train.recipe import Recipe, defaults

LARGEST_MATRIX = 20  # classes that a confusion matrix can have and still be read; beyond, pairs are listed
LARGEST_PICTURE = 200  # and that it can have as a picture, whose pattern is seen
RIGHT, WRONG = (31, 119, 180), (179, 38, 30)  # in pictures
PAIRS = 30
WORST = 24
THUMBNAIL = 160  # pixels that an image of the report has at most on a side
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --page: #ffffff; --soft: #5c5c66; --line: #d5d5dc; --bar: #1f77b4;
  --wrong: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --page: #17171b; --soft: #a9a9b6; --line: #3a3a44; --bar: #4b9cd3; --wrong: #ff8a80 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
caption, figcaption, .soft { color: var(--soft) }
caption { text-align: left; padding: .3rem 0 } summary { cursor: pointer }
table { border-collapse: collapse; min-width: min(100%, 26rem); font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: right; font-weight: normal }
th { text-align: left } thead th { color: var(--soft); text-align: right; vertical-align: bottom }
thead th:first-child { text-align: left }
td.bar { background: linear-gradient(to right, color-mix(in srgb, var(--bar) 35%, transparent) var(--share),
  transparent var(--share)) }
table.matrix th[scope=col]:not(:first-child) { text-align: center }
table.matrix td { text-align: center; min-width: 2rem;
  background: color-mix(in srgb, var(--hue, var(--wrong)) var(--share, 0%), transparent) }
table.matrix td.right { --hue: var(--bar) } .scroll { overflow-x: auto }
.plot svg { width: 100%; height: auto; color: var(--ink) } .plot svg text { fill: currentColor } figure { margin: 0 }
.cards { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; padding: 0; list-style: none }
.cards strong { display: block; font-size: 1.7rem; line-height: 1.2 }
.matrix img { width: min(100%, 40rem); image-rendering: pixelated; border: 1px solid var(--line) }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; padding: 0;
  list-style: none }
.worst img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; display: block }
"""


def page(
    recipe: Recipe, result: dict, rows: list[dict], dataset: Dataset, seen: Predictions, plots: dict[str, str]
) -> str:
    """The whole page. ``plots``: inline SVG by what it shows, in words; ``seen``: of the test split by the student."""
    title = f"{result['arch']} by {result['method']} on {result['data']}"
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="soft">One run with seed {recipe.seed}: differences of a point or two between such runs '
        "mean nothing.</p>",
        _cards(result),
        "<h2>Training</h2>",
        *(_plot(words, svg) for words, svg in plots.items()),
        _epochs(rows),
        "<h2>Mistakes on the test images</h2>",
        _confusion(dataset.classes, seen),
        _worst(dataset, seen),
        "<h2>Classes</h2>",
        _per_class(dataset.classes, seen),
        "<h2>Cost</h2>",
        _cost(recipe, result),
        "<h2>Recipe</h2>",
        _recipe(recipe),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escaped(value: object) -> str:
    """Any text for HTML: markup is escaped; what cannot be printed or turns the writing direction is replaced."""
    return escape("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(value)))


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """The 95% interval of an accuracy in [0, 1] measured on so many images (Wilson 1927)."""
    z = 1.96
    centre = (accuracy + z * z / (2 * images)) / (1 + z * z / images)
    spread = accuracy * (1 - accuracy) / images + z * z / (4 * images * images)
    half = z / (1 + z * z / images) * math.sqrt(spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion_matrix(seen: Predictions, classes: int) -> np.ndarray:
    """Numbers of images (classes, classes): of true class (row) and predicted class (column)."""
    pairs = np.bincount(seen.labels.numpy() * classes + seen.predicted.numpy(), minlength=classes * classes)
    return pairs.reshape(classes, classes)


def most_confused(seen: Predictions, classes: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the most frequent mistakes, without making the matrix."""
    wrong = seen.labels != seen.predicted
    pairs, counts = np.unique((seen.labels * classes + seen.predicted)[wrong].numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:PAIRS]
    return [(*map(int, divmod(pairs[index], classes)), int(counts[index])) for index in order]


def most_confident_mistakes(seen: Predictions) -> list[int]:
    """Indices of the wrongly predicted images, those of the highest probability first."""
    wrong = (seen.labels != seen.predicted).nonzero().flatten()
    return wrong[seen.confidence[wrong].argsort(descending=True, stable=True)][:WORST].tolist()


def pixels_of(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """A network's float32 input (C, H, W) as the uint8 image (H, W, C) that it was."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.rint(255 * (image * std + mean)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def data_url(pixels: np.ndarray) -> str:
    """A PNG of an image uint8 (H, W, 1 or 3), large ones made smaller."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _png(image)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(caption: str, head: list[str], body: list[list[str]], kind: str = "") -> str:
    """A table of cells that are escaped already; the first of a row is its header. A cell may be a whole ``<td>``."""
    rows = [
        f'<tr><th scope="row">{first}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in body
    ]
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{caption}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"


def _cards(result: dict) -> str:
    low, high = interval(result["test_accuracy"], result["test_images"])
    spread = f"test accuracy, {result['test_images']:,} images (95%: {low:.2%} to {high:.2%})"
    cards = [(f"{result['test_accuracy']:.2%}", spread)]
    if result["teacher_test_accuracy"] is not None:
        cards.append((f"{result['teacher_test_accuracy']:.2%}", "its teacher"))
    best = f"validation accuracy, epoch {result['best_epoch']} of {result['epochs']}, which was kept"
    cards.append((f"{result['val_accuracy']:.2%}", best))
    items = "".join(f"<li><strong>{value}</strong>{what}</li>" for value, what in cards)
    return f'<ul class="cards">{items}</ul>'


def _plot(words: str, svg: str) -> str:
    return (
        f'<figure class="plot"><div role="img" aria-label="{escaped(words)}">{svg}</div>'
        f"<figcaption>{escaped(words)}.</figcaption></figure>"
    )


def _epochs(rows: list[dict]) -> str:
    rates = {"lr": "learning rate"}
    if any("muon_lr" in row for row in rows):  # earlier versions did not log it
        rates = {"lr": "learning rate of SGD", "muon_lr": "of Muon"}
    head = ["phase, epoch", "loss", "training accuracy", "validation accuracy", *rates.values(), "images/s", "seconds"]
    body = [
        [f"{escaped(row['phase'])} {escaped(row['epoch'])}", f"{row['loss']:.4f}", f"{row['train_accuracy']:.2%}",
         f"{row['val_accuracy']:.2%}", *(f"{row[name]:.4g}" if name in row else "" for name in rates),
         f"{row['images_per_second']:.0f}", f"{row['seconds']:.0f}"]
        for row in rows
    ]  # fmt: skip
    return _folded("The epochs as a table", table("Each epoch; seconds since the phase began.", head, body))


def _confusion(classes: list[str], seen: Predictions) -> str:
    count = len(classes)
    if count > LARGEST_MATRIX:
        pairs = most_confused(seen, count)
        caption = f"The most frequent mistakes, of {int((seen.labels != seen.predicted).sum()):,}."
        body = [[escaped(classes[true]), escaped(classes[guess]), f"{number:,}"] for true, guess, number in pairs]
        listed = table(caption, ["true class", "predicted", "images"], body)
        return listed if count > LARGEST_PICTURE else f"{_picture(seen, count)}\n{listed}"
    matrix = confusion_matrix(seen, count)
    shares = _shares(matrix)
    body = []
    for true, name in enumerate(classes):
        cells = [
            f'<td class="{"right" if guess == true else "wrong"}" style="--share:{_tint(shares[true, guess])}%">'
            f"{matrix[true, guess]}</td>"
            for guess in range(count)
        ]
        body.append([escaped(name), *cells])
    caption = "Confusion matrix: test images by true class (row) and predicted class (column)."
    return table(caption, ["true / predicted", *map(escaped, classes)], body, "matrix")


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Per cent of each row."""
    return 100 * matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)


def matrix_pixels(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix (classes, classes) as an image uint8 (classes, classes, 4), stronger where a share is larger.

    Rare mistakes are still seen. Empty cells are transparent.
    """
    shares = _shares(matrix)
    diagonal = np.eye(len(matrix), dtype=bool)[..., None]
    colours = np.where(diagonal, np.array(RIGHT), np.array(WRONG))
    alpha = np.where(matrix > 0, 255 * np.sqrt(shares / 100).clip(min=0.15), 0)
    return np.concatenate([colours, alpha[..., None]], axis=2).astype(np.uint8)


def _picture(seen: Predictions, count: int) -> str:
    image = Image.fromarray(matrix_pixels(confusion_matrix(seen, count)))
    said = (
        "Confusion matrix: a row for each true class and a column for each predicted one, in the order of the classes' "
        "numbers; blue is right, red is wrong, the stronger, the larger its share of the row."
    )
    return f'<figure class="matrix"><img alt="{said}" src="{_png(image)}"><figcaption>{said}</figcaption></figure>'


def _tint(percent: float) -> int:
    """Strength of a cell's colour: rare mistakes are still seen, and text on the strongest still read."""
    return 0 if percent == 0 else round(10 + 0.5 * percent)


def _worst(dataset: Dataset, seen: Predictions) -> str:
    chosen = most_confident_mistakes(seen)
    if not chosen:
        return "<p>No test image was classified wrongly.</p>"
    images = dataset.test.images(seen.indices[chosen]).cpu().numpy()
    items = []
    for index, image in zip(chosen, images, strict=True):
        true, guess = (escaped(dataset.classes[int(numbers[index])]) for numbers in (seen.labels, seen.predicted))
        sure, truth = float(seen.confidence[index]), float(seen.truth[index])
        alt = f"Test image {int(seen.indices[index])}: {true}, taken for {guess}"
        items.append(
            f'<li><img alt="{alt}" src="{data_url(pixels_of(image, dataset.preprocessing))}">'
            f'{guess} <span class="soft">{sure:.1%}</span><br>is {true} <span class="soft">{truth:.1%}</span></li>'
        )
    return (
        f'<h3>The {len(items)} most confident mistakes</h3>\n<p class="soft">The predicted class with its '
        'probability, then the true class with its own.</p>\n<ul class="worst">\n' + "\n".join(items) + "\n</ul>"
    )


def _per_class(classes: list[str], seen: Predictions) -> str:
    labels, right = seen.labels.numpy(), (seen.labels == seen.predicted).numpy()
    images = np.bincount(labels, minlength=len(classes))
    accuracy = np.bincount(labels[right], minlength=len(classes)) / images.clip(min=1)
    body = [
        [escaped(classes[index]), str(index), f"{images[index]:,}",
         f'<td class="bar" style="--share:{100 * accuracy[index]:.1f}%">{accuracy[index]:.2%}</td>'
         if images[index] else "none to measure"]
        for index in np.argsort(accuracy, kind="stable")
    ]  # fmt: skip
    caption = f"Test accuracy of each class, the lowest first. Their mean is {seen.mean_class_accuracy:.2%}."
    content = table(caption, ["class", "number", "test images", "accuracy"], body)
    return content if len(classes) <= LARGEST_MATRIX else _folded(f"All {len(classes):,} classes", content)


def _cost(recipe: Recipe, result: dict) -> str:
    body = [
        ["parameters", f"{result['parameters']:,}"],
        ["multiply-accumulates per image", f"{result['macs_per_image']:,}"],
        ["a step, in steps of ordinary training of the plain network", f"{result['step_cost']:.2f}"],
        ["training images", f"{result['train_images']:,}"],
        ["seconds of training", f"{result['seconds']:.0f}"],
        ["seconds of the teacher's own training", f"{result['teacher_seconds']:.0f}"],
        ["machine", f"{escaped(recipe.device)}, {recipe.threads} threads, {recipe.precision}"],
        ["torch", escaped(result["torch"])],
    ]
    return table("What the network and its training cost.", ["what", "figure"], body)


def _recipe(recipe: Recipe) -> str:
    values = {name: value for name, value in recipe.to_dict().items() if name != "summary"}
    usual = defaults(vars(recipe))
    changed = {name for name, value in values.items() if value != usual[name]}
    head = ["entry", "value"]
    body = [[name, escaped(values[name])] for name in values if name in changed]
    rest = [[name, escaped(values[name])] for name in values if name not in changed]
    return (
        table("Entries of recipe.yaml that are not defaults.", head, body)
        + _folded("All other entries", table("Entries at their defaults.", head, rest))
        + "<p>Again with exactly this recipe: <code>rd-train recipe.yaml</code>. Next: "
        "<code>rd-export model.pt</code>.</p>"
    )
