"""What TensorRT-RTX plans for the feature maps of plain-50 and ResNet-50: its builder's account, without a GPU.

    python benchmarks/trt_memory.py

Builds both networks (random weights, 224x224) for one batch size each and for a range of them, in every precision, and
counts the layers it fuses them into. Writes benchmarks/results/rtx-builder/DATE-trt-memory.json.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rd_deploy.bench.environment import git_commit
from rd_deploy.chain import Chain
from rd_deploy.common import run_command, write_json
from rd_deploy.export.onnx import to_onnx
from rd_deploy.export.source import chain_from_name
from rd_deploy.memory import ledger
from rd_deploy.quantize import KINDS, calibrate, qdq_counts, quantization_data, to_qdq
from rd_deploy.trt.build import Built, Profile, build
from rd_deploy.trt.flavours import Flavour, load_flavour
from rd_deploy.trt.layers import widened

NETWORKS = ("plain50", "resnet50")
COUNTED = tuple(f"{kind}{depth}" for depth in (20, 56, 18, 34, 50) for kind in ("plain", "resnet"))
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
BATCHES = ("1", "8", "64", "1:8:64")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
TARGET = "sm89"
CALIBRATION_IMAGES = 8  # of noise: ranges change neither memory nor fusion
FOLDER = Path(__file__).parent / "results" / "rtx-builder"


def _model(chain: Chain, precision: str):
    """The network's ONNX file in a precision."""
    if precision not in KINDS:
        return to_onnx(chain, precision)
    data = quantization_data(chain, calibration_images=CALIBRATION_IMAGES)
    ranges = calibrate(chain, precision, "minmax", data.calibration.batches(CALIBRATION_IMAGES))
    return to_qdq(chain, ranges, precision)


def _row(network: str, precision: str, profile: Profile, built: Built, maps: int) -> dict:
    return {
        "network": network,
        "precision": precision,
        "profile": profile.to_list(),
        "activation_bytes": built.activation_bytes,
        "ledger_bytes": maps,
        "weight_bytes": built.weight_bytes,
        "engine_bytes": len(built.content),
        "layers": len(built.layers),
        "reformats": sum(layer.is_reformat for layer in built.layers),
        "widened": widened(built.layers),
        "seconds": round(built.seconds, 2),
    }


def _rows(flavour: Flavour, network: str) -> list[dict]:
    """All builds of a network."""
    chain, rows = chain_from_name(network), []
    for precision in PRECISIONS:
        content = _model(chain, precision).SerializeToString(deterministic=True)
        for profile in map(Profile.parse, BATCHES):
            built = build(content, flavour, profile, (TARGET,))
            maps = ledger(to_onnx(chain), profile.maximum, BYTES[precision], "in-place").peak_bytes
            rows.append(_row(network, precision, profile, built, maps))
            print(f"{network} {precision} batch {profile}: {rows[-1]['activation_bytes']:,} bytes", flush=True)
    return rows


def command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    flavour = load_flavour("rtx")
    rows = [row for network in NETWORKS for row in _rows(flavour, network)]
    path = FOLDER / f"{datetime.now(UTC):%Y-%m-%d}-trt-memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "builder": flavour.title,
        "target": TARGET,
        "commit": git_commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "rows": rows,
        "qdq": {network: qdq_counts(_model(chain_from_name(network), "int8")) for network in COUNTED},
    }
    write_json(path, document)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("trt_memory", lambda: command(sys.argv[1:])))
