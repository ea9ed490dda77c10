"""report.html: what it counts, that it is one accessible page, and that class names cannot break out of it."""

import base64
import io
import re
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from rd_deploy.preprocessing import Preprocessing
from rd_train.augment import Augment
from rd_train.data import Dataset, MemorySplit, load_dataset
from rd_train.evaluation import Predictions
from rd_train.html_report import (
    WORST,
    confusion_matrix,
    escaped,
    interval,
    most_confident_mistakes,
    most_confused,
    page,
    pixels_of,
)
from rd_train.recipe import Recipe
from rd_train.run import run

HOSTILE = [
    "<script>document.title='broken'</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b",
    "\u202egnp.exe",
    "b\udcff",
]
VOID = {"meta", "img", "br", "path", "use", "rect"}
RECIPE = Recipe(method="ce", arch="plain20", width=0.25, epochs=1, batch_size=50, warmup_epochs=0.2, train_limit=200,
                device="cpu", threads=1, precision="fp32")  # fmt: skip


class Page(HTMLParser):
    """What is asserted of a page: its elements with attributes, its text, and that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def made(classes: list[str], images: int = 200, channels: int = 3) -> tuple[Dataset, Predictions]:
    """Random images and predictions, a third of them right."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 8, 8, channels), dtype=np.uint8)
    preprocessing = Preprocessing(8, 8, channels, (0.3,) * channels, (0.2,) * channels)
    labels = torch.from_numpy(generator.integers(0, len(classes), images))
    predicted = torch.from_numpy(generator.integers(0, len(classes), images))
    predicted[::3] = labels[::3]
    confidence = torch.from_numpy(generator.random(images, dtype=np.float32))
    split = MemorySplit(pixels, labels, preprocessing, Augment())
    return Dataset("made", split, split, split, classes, preprocessing), Predictions(
        torch.arange(images), labels, predicted, confidence, 1 - confidence, 0.5
    )


def written(dataset: Dataset, seen: Predictions, recipe: Recipe | None = None, **more) -> str:
    row = {"phase": "student", "epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5, "lr": 0.1, **more,
           "images_per_second": 100.0, "seconds": 1.0}  # fmt: skip
    result = {
        "arch": "plain20", "method": "ce", "data": "made", "test_accuracy": seen.accuracy, "torch": "2",
        "test_images": len(seen.labels), "teacher_test_accuracy": 0.5, "val_accuracy": 0.5, "best_epoch": 1,
        "epochs": 1, "parameters": 1, "macs_per_image": 1, "step_cost": 1.0, "train_images": 10, "seconds": 1.0,
        "teacher_seconds": 0.0,
    }  # fmt: skip
    return page(recipe or Recipe(method="ce"), result, [row], dataset, seen, {"curves": "<svg></svg>"})


def test_counts_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    _, seen = made([str(number) for number in range(7)])
    theirs = metrics.confusion_matrix(seen.labels, seen.predicted)
    assert np.array_equal(confusion_matrix(seen, 7), theirs)
    np.fill_diagonal(theirs, 0)
    pairs = most_confused(seen, 7)
    assert all(theirs[true, guess] == count for true, guess, count in pairs)
    assert [count for *_, count in pairs] == sorted(theirs.ravel(), reverse=True)[: len(pairs)]
    wrong = most_confident_mistakes(seen)
    assert all(seen.labels[index] != seen.predicted[index] for index in wrong)
    rest = [index for index in range(200) if seen.labels[index] != seen.predicted[index] and index not in wrong]
    assert min(seen.confidence[wrong]) >= max(seen.confidence[rest])


@pytest.mark.parametrize(("right", "images"), [(0, 10), (7, 10), (9_134, 10_000), (10, 10)])
def test_the_interval_is_wilsons(right, images):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, images).proportion_ci(method="wilson")
    assert interval(right / images, images) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_shown_as_they_were(channels):
    dataset, seen = made(["a", "b", "c"], channels=channels)
    text = written(dataset, seen)
    everything = dataset.test.images(torch.arange(200)).numpy()
    shown = np.stack([pixels_of(image, dataset.preprocessing) for image in everything])
    assert np.array_equal(shown, dataset.test.pixels)
    images = Page(text).all("img")
    chosen = most_confident_mistakes(seen)
    assert len(images) == len(chosen) == WORST
    for index, image in zip(chosen, images, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
        assert np.array_equal(shown.reshape(8, 8, channels), dataset.test.pixels[index])
        classes = [dataset.classes[numbers[index]] for numbers in (seen.labels, seen.predicted)]
        assert image["alt"] == f"Test image {index}: {classes[0]}, taken for {classes[1]}"


def assert_whole(text: str) -> Page:
    """One file, accessible, and nothing in it that runs or asks the network."""
    whole = Page(text)
    tags = {tag for tag, _ in whole.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "base", "embed"}
    for _, attributes in whole.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "url(http" not in text
    assert "@import" not in text
    assert all(image["alt"] for image in whole.all("img"))
    assert text.count("<table") == text.count("<caption>")
    assert all(header["scope"] in ("row", "col") for header in whole.all("th"))
    assert whole.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme: dark" in text
    return whole


def test_hostile_class_names_stay_text():
    text = written(*made(HOSTILE))
    whole = assert_whole(text)
    assert len(whole.all("img")) == WORST
    for name in HOSTILE[:3]:
        assert name in whole.text
    assert "\u202e" not in text
    text.encode("utf-8")
    assert escaped("b\udcff") == "b\N{REPLACEMENT CHARACTER}"


def test_many_classes_have_a_picture_of_the_matrix():
    dataset, seen = made([f"class {number}" for number in range(40)])
    text = written(dataset, seen)
    (address,) = re.findall(r'<figure class="matrix"><img alt="[^"]*" src="data:image/png;base64,([^"]*)"', text)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address))))
    matrix = confusion_matrix(seen, 40)
    assert np.array_equal(pixels[..., 3] > 0, matrix > 0)
    red = pixels[..., 0] > pixels[..., 2]
    assert np.array_equal(red[matrix > 0], ~np.eye(40, dtype=bool)[matrix > 0])  # wrong where it is not the diagonal
    true, guess = np.unravel_index((matrix / matrix.sum(1, keepdims=True).clip(min=1)).argmax(), matrix.shape)
    assert pixels[true, guess, 3] == pixels[..., 3].max()
    assert "The most frequent mistakes" in text


def test_a_thousand_classes_have_pairs_and_no_matrix():
    names = [f"class {number}" for number in range(1000)]
    dataset, seen = made(names, images=3000)
    text = written(dataset, seen)
    whole = assert_whole(text)
    assert len(text) < 1_000_000
    assert "Confusion matrix" not in text
    true, guess, count = most_confused(seen, 1000)[0]
    assert f'<th scope="row">{names[true]}</th><td>{names[guess]}</td><td>{count}</td>' in text
    assert all(f">{name}</th>" in text for name in names)  # accuracy of each
    assert "All 1,000 classes" in whole.text


def test_no_mistakes_and_classes_without_images():
    dataset, seen = made(["a", "b", "never"], images=30)
    labels = seen.labels.clamp(max=1)
    seen = replace(seen, labels=labels, predicted=labels)
    text = written(dataset, seen)
    assert_whole(text)
    assert "No test image was classified wrongly" in text
    assert "none to measure" in text


def listed(text: str, caption: str) -> list[str]:
    """The first cells of the table with this caption."""
    (found,) = re.findall(f"<table[^>]*><caption>{caption}</caption>(.*?)</table>", text, re.DOTALL)
    return re.findall('<th scope="row">([^<]*)</th>', found)


@pytest.mark.parametrize("given", [{}, {"arch": "plain56"}, {"method": "kd"}, {"arch": "resnet20", "method": "ce"}])
def test_what_others_decide_is_a_default(given):
    dataset, seen = made(["a", "b", "c"])
    text = written(dataset, seen, Recipe(**given))
    assert {*listed(text, "Entries of recipe.yaml that are not defaults.")} == {*given}
    everything = {field.name for field in fields(Recipe)} - {"summary"}
    assert {*listed(text, "Entries at their defaults.")} == everything - {*given}
    text = written(dataset, seen, Recipe(**given, clip_norm=0.5, seed=3))
    assert {*listed(text, "Entries of recipe.yaml that are not defaults.")} == {*given, "clip_norm", "seed"}


def test_the_rates_of_both_optimisers_are_shown():
    dataset, seen = made(["a", "b", "c"])
    cells = "<td>50.00%</td><td>50.00%</td><td>0.1</td>{}<td>100</td>"
    text = written(dataset, seen)
    assert cells.format("") in text
    assert ">learning rate<" in text
    text = written(dataset, seen, muon_lr=0.015)
    assert cells.format("<td>0.015</td>") in text
    assert ">learning rate of SGD</th>" in text
    assert ">of Muon</th>" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose classes have hostile names, with every index that was read of the test split."""
    folder, dataset, read = tmp_path_factory.mktemp("run"), load_dataset("digits", limit=200), []

    class Counted(MemorySplit):
        def images(self, indices):
            read.extend(indices.tolist())
            return super().images(indices)

    test = dataset.test
    counted = Counted(test.pixels, test.labels, test.preprocessing, test.augment)
    hostile = replace(dataset, test=counted, classes=[*HOSTILE[:4], *dataset.classes[4:]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rd_train.plan.load_dataset", lambda *arguments, **options: hostile)
        result = run(RECIPE, folder)
    return folder, result, read


def test_the_test_split_is_scored_once(finished):
    folder, result, read = finished
    count = result["test_images"]
    assert read[:count] == list(range(count))
    shown = [int(number) for number in re.findall(r'alt="Test image (\d+):', (folder / "report.html").read_text())]
    assert read[count:] == shown  # the pictures of the worst, not another pass
    assert len(shown) == WORST


def test_the_report_of_a_run_is_whole(finished):
    folder, result, _ = finished
    whole = assert_whole((folder / "report.html").read_text(encoding="utf-8"))
    assert f"{result['test_accuracy']:.2%}" in whole.text
    assert whole.all("svg")
    assert "validation cross-entropy" in whole.text  # of the legend: text stays text
    right = [attributes for attributes in whole.all("td") if attributes.get("class") == "right"]
    assert len(right) == 10
    assert "report.html" in (folder / "report.md").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_runs_nothing_and_shows_the_names(finished, tmp_path):
    folder, *_ = finished
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*command, (folder / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>plain20 by ce on digits</title>" in done.stdout
    assert "&lt;script&gt;" in done.stdout
    assert "<script>" not in done.stdout
