"""What the model of docs/gpu.md says, step by step, before anything was measured: for `benchmarks/gpu_suite.py` to be
compared with.

    python benchmarks/gpu_predictions.py --card h100

Writes benchmarks/results/CARD/DATE-predictions.json.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rd_deploy.bench.environment import git_commit
from rd_deploy.common import run_command, write_json
from rd_deploy.cuda.plan import FUSIONS, Plan, build_plan
from rd_deploy.export.source import chain_from_name
from rd_deploy.triton_kernels import cost
from rd_deploy.triton_kernels.cards import get_card

NETWORKS, BATCHES = ("plain50", "resnet50"), (1, 8, 32, 128, 256)
FOLDER = Path(__file__).parent / "results"


def _plan_row(network: str, fusion: str, plan: Plan) -> dict:
    return {
        "network": network,
        "fusion": fusion,
        "batch": plan.batch,
        "us": round(plan.predicted_us, 1),
        "launches": len(plan.steps),
        "feature_map_bytes": plan.feature_map_bytes,
        "arena_bytes": plan.arena_bytes,
        "steps": [
            {
                "name": step.name,
                "kernel": step.kernel,
                "config": step.settings,
                "us": round(step.predicted_us, 2),
                "limit": step.prediction.limit,
                "waves": round(step.prediction.waves, 2),
            }
            for step in plan.steps
        ],
    }


def command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100")
    card = get_card(parser.parse_args(arguments).card)
    rows = []
    for network in NETWORKS:
        chain = chain_from_name(network)
        rows += [
            _plan_row(network, fusion, build_plan(chain, batch, card, fusion))
            for batch in BATCHES
            for fusion in FUSIONS
        ]
    model = {name.lower(): value for name, value in vars(cost).items() if name.isupper() and name != "KIB"}
    path = FOLDER / card.name / f"{datetime.now(UTC):%Y-%m-%d}-predictions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"card": vars(card), "commit": git_commit(), "model": model, "plans": rows})
    times = {(row["network"], row["fusion"], row["batch"]): row["us"] for row in rows}
    for batch in BATCHES:
        plain, residual = times["plain50", "auto", batch], times["resnet50", "auto", batch]
        print(f"batch {batch}: plain50 {plain:,.0f} us, resnet50 {residual:,.0f} us, ratio {residual / plain:.2f}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("gpu_predictions", lambda: command(sys.argv[1:])))
