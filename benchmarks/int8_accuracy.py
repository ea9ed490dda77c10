"""What int8 and fp8 cost in accuracy: trained networks on their data's whole test split, by ONNX Runtime.

    python benchmarks/int8_accuracy.py MODEL.pt [MODEL.pt ...] --results FILE.json [--data-dir FOLDER]

Ranges come from 512 training images, the calibrator is chosen on validation images, accuracies are of the test split.
Q/DQ is computed literally, in float32 between Q and DQ. A row is written as soon as it is done; rows that are in FILE
already, by the packages of today, are not done again. When and by which commit and packages a row was made is in its
``environment``; the file's own date is that of its latest row. Exit code 1 when a network loses more than rd-export
allows by default.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rd_deploy.bench.environment import capture, packages
from rd_deploy.common import UserError, check_file, run_command, write_json
from rd_deploy.export.source import Source, source_from_checkpoint
from rd_deploy.quantize import KINDS, MAX_DROP, quantization_data, quantize_network, stored_bytes

THREADS = 2


def row(source: Source, kind: str, data_dir: str | None) -> dict:
    """One network in one precision; nothing is gated, the loss is in ``gate``."""
    started, chain = time.perf_counter(), source.chain
    result = quantize_network(chain, kind, quantization_data(chain, source.checkpoint, data_dir), max_drop=100)
    report = {name: value for name, value in result.report.items() if name != "ranges"}
    return {
        "model": f"{chain.name}, {source.checkpoint.recipe['data']}",
        "precision": kind,
        "checkpoint_sha256": chain.provenance["checkpoint_sha256"],
        "recipe": chain.provenance["recipe"],
        **report,
        "weight_bytes": stored_bytes(result.model),
        "weight_bytes_fp32": 4 * chain.parameters(),
        "seconds": time.perf_counter() - started,
        "environment": capture(THREADS),
    }


def line(entry: dict) -> str:
    """What a row says in short."""
    gate = entry["gate"]
    return (
        f"{entry['model']} {entry['precision']}: {gate['original_accuracy']:.2%} to {gate['accuracy']:.2%}, "
        f"{gate['drop_points']:+.2f} points lost, {entry['calibrator']}, {entry['seconds']:.0f} s"
    )


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of results, none where there is no file; a damaged one is a `UserError`."""
    if not path.exists():
        return []
    text = check_file(path, "file of results", 16 << 20).read_bytes()
    try:
        rows = json.loads(text)["results"]
        for entry in rows:
            _ = (line(entry), is_of(entry, "", ""), _date(entry), entry["environment"]["packages"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} holds no results of this script; move it away, or give another --results") from error
    return rows


def _date(entry: dict) -> str:
    return entry["environment"]["date"][:10]


def is_of(entry: dict, digest: str, kind: str) -> bool:
    """Whether a row is that of a checkpoint, by its SHA-256, in a precision."""
    return (entry["checkpoint_sha256"], entry["precision"]) == (digest, kind)


def command() -> int:
    """Every network in every precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="MODEL.pt")
    parser.add_argument("--results", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--data-dir", help="of the data set (default: where the training found it)")
    options = parser.parse_args()
    rows, today = read_rows(options.results), packages()
    for path in options.checkpoints:
        source = source_from_checkpoint(path)
        digest = source.chain.provenance["checkpoint_sha256"]
        for kind in KINDS:
            if any(is_of(entry, digest, kind) and entry["environment"]["packages"] == today for entry in rows):
                continue
            made = row(source, kind, options.data_dir)
            print(line(made), flush=True)
            rows = [*(entry for entry in rows if not is_of(entry, digest, kind)), made]  # not that of other packages
            write_json(options.results, {"date": max(map(_date, rows)), "results": rows})
    return int(any(entry["gate"]["drop_points"] > MAX_DROP for entry in rows))


if __name__ == "__main__":
    sys.exit(run_command("int8_accuracy", command))
