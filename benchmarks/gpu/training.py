"""Part e: images per second of `rd_train` on the card, as a user gets them: data loading and augmentation included."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu.suite import Row, Suite
from rd_deploy.common import require

NETWORKS = ("plain20", "resnet20")
EPOCHS = 3  # the first one is slow: libraries choose kernels


def rows(suite: Suite) -> Iterator[Row]:
    for network in NETWORKS:
        yield Row(f"e/{network}", lambda network=network: _train(suite, network))


def _train(suite: Suite, network: str) -> dict:
    """Ordinary training; without the files of Fashion-MNIST the row is skipped with `rd_train`'s own reason."""
    require("jsonargparse", "train")
    from rd_train.plan import settle
    from rd_train.recipe import Recipe
    from rd_train.run import run

    recipe = Recipe(data="fashion-mnist", arch=network, method="ce", epochs=EPOCHS, device="cuda", precision="bf16")
    if suite.dry:
        small = {"data": "digits", "epochs": 2, "train_limit": 128, "batch_size": 64}
        recipe = replace(recipe, **small, device="cpu", precision="fp32", threads=suite.threads, width=0.25)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            result = run(settle(recipe), Path(folder))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines]
    return {
        "images_per_second": max(rates[1:]),
        "epochs": rates,
        "test_accuracy": result["test_accuracy"],
        "recipe": {
            name: getattr(recipe, name) for name in ("data", "arch", "precision", "batch_size", "channels_last")
        },
    }
