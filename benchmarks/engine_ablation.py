"""What each idea of the compiled engine is worth in time: its plans against the default plan, interleaved.

python benchmarks/engine_ablation.py --results FILE.json [--seconds 6]
"""

import argparse
import sys
from pathlib import Path

from rd_deploy.bench.agreement import random_images
from rd_deploy.bench.environment import capture
from rd_deploy.bench.statistics import paired_ratio, summarise
from rd_deploy.bench.timer import doubts, time_pair
from rd_deploy.common import write_json
from rd_deploy.cpus import available_threads
from rd_deploy.export.native import to_rdp
from rd_deploy.export.source import chain_from_name
from rd_deploy.native import Flag, Network

SETTINGS = (("bf16", 1), ("fp32", 1), ("fp32", 8))
PLANS = {
    "layer by layer": Flag.UNFUSED,
    "without Winograd": Flag.NO_WINOGRAD,
    "neither": Flag.UNFUSED | Flag.NO_WINOGRAD,
    "small": Flag.SMALL,
}


def measure(network: Network, batch: int, flags: Flag, seconds: float) -> dict:
    """Time of a plan / time of the default plan, with the 95% interval and reasons to doubt it."""
    threads = available_threads()
    contexts = [network.plan(batch, threads, flags=chosen).context() for chosen in (Flag.NONE, flags)]
    images = random_images(batch, contexts[0].input_shape[1:])
    first, second = (lambda: contexts[0].run(images)), (lambda: contexts[1].run(images))
    samples = time_pair(first, second, seconds=seconds)
    ratio = paired_ratio(samples.a, samples.b)
    summaries = {
        "the default plan": summarise(samples.a, samples.calls[0]),
        "the other plan": summarise(samples.b, samples.calls[1]),
    }
    return {
        **{"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "quads": len(samples.a) // 2},
        **{"samples_ms": samples.a, "other_samples_ms": samples.b},
        "warnings": doubts(samples, summaries, ratio),
    }


def main() -> int:
    """Measure every plan of both networks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", required=True, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=6, help="of sampling per pair (default: %(default)s)")
    options = parser.parse_args()
    environment, rows = capture(available_threads()), []  # before there is a load of our own
    for model in ("plain50", "resnet50"):
        chain = chain_from_name(model)
        for precision, batch in SETTINGS:
            network = Network.from_bytes(to_rdp(chain, precision))
            for name, flags in PLANS.items():
                found = measure(network, batch, flags, options.seconds)
                rows.append({"model": model, "precision": precision, "batch": batch, "plan": name, **found})
                print({key: value for key, value in rows[-1].items() if "samples" not in key}, flush=True)
    write_json(Path(options.results), {"results": rows, "environment": environment})
    return 0


if __name__ == "__main__":
    sys.exit(main())
