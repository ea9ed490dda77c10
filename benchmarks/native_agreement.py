"""Does the compiled engine classify a data set as the trained network does? All test images, every precision.

Where the CPU has them, fp32 also by two bf16 for each number (amx_bf16x2), which is only taken by name.

    python benchmarks/native_agreement.py MODEL.pt [MODEL.pt ...] --results FILE.json [--data-dir FOLDER]

The reference is the unfolded torch network in float32. Written: top-1 agreement, accuracies, errors of the logits.
"""

import argparse
import datetime
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from rd_deploy.bench.environment import capture
from rd_deploy.common import write_json
from rd_deploy.export.images import trained_on
from rd_deploy.export.native import PRECISIONS, to_rdp
from rd_deploy.export.source import source_from_checkpoint
from rd_deploy.native import Flag, Network, Plan, available_isas
from rd_deploy.parity import torch_logits

BATCH, THREADS = 100, 2
PLANS = {"": Flag.NONE, ", small": Flag.SMALL}
BY_NAME = {"fp32": "amx_bf16x2"}  # the instruction set of a precision besides the best one


def test_images(checkpoint, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """All test images of the data that the checkpoint was trained on, (n, C, size, size) float32, and their classes."""
    import torch

    test = trained_on(checkpoint, data_dir, "no test images", "use another checkpoint", "pass --data-dir").test
    every = torch.arange(len(test))
    return test.images(every).numpy(), np.asarray(test.labels)


def native_logits(plan: Plan, images: np.ndarray) -> np.ndarray:
    """In batches of `BATCH`; the images' number is a multiple of it, or the last batch is filled up."""
    context = plan.context()
    filled = images[np.arange(-(-len(images) // BATCH) * BATCH) % len(images)]
    parts = [context.run(filled[at : at + BATCH]) for at in range(0, len(filled), BATCH)]
    return np.concatenate(parts)[: len(images)]


def compare(path: str, data_dir: str | None) -> list[dict]:
    """A row per precision and plan."""
    source = source_from_checkpoint(path)
    images, labels = test_images(source.checkpoint, data_dir)
    expected = torch_logits(source.network, images, BATCH)
    rows = []
    for precision in PRECISIONS:
        network = Network.from_bytes(to_rdp(source.chain, precision))
        isas = [None, *({BY_NAME.get(precision)} & {*available_isas()})]
        for isa, (suffix, flags) in itertools.product(isas, PLANS.items()):
            plan = network.plan(BATCH, THREADS, isa, flags)
            logits = native_logits(plan, images)
            error = np.abs(logits - expected).max() / expected.std()
            agreement = float((logits.argmax(1) == expected.argmax(1)).mean())
            accuracies = [float((found.argmax(1) == labels).mean()) for found in (expected, logits)]
            rows.append(
                {
                    "model": f"{source.chain.name}, {source.checkpoint.recipe['data']}",
                    "checkpoint_sha256": source.chain.provenance["checkpoint_sha256"],
                    "recipe": source.chain.provenance["recipe"],
                    "plan": precision + suffix,
                    "isa": plan.info.isa,
                    "images": len(images),
                    "top1_agreement": agreement,
                    "accuracy_torch": accuracies[0],
                    "accuracy_native": accuracies[1],
                    "max_error": float(error),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Compare every checkpoint and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="MODEL.pt")
    parser.add_argument("--results", required=True, metavar="FILE.json")
    parser.add_argument("--data-dir", help="of the data set (default: where the training found it)")
    options = parser.parse_args()
    rows = [row for path in options.checkpoints for row in compare(path, options.data_dir)]
    machine = capture(THREADS)
    write_json(Path(options.results), {"date": f"{datetime.date.today()}", "results": rows, "environment": machine})
    return 0


if __name__ == "__main__":
    sys.exit(main())
