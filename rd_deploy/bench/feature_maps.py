"""Feature-map memory in a benchmark: the analytic ledger and each engine's own figure, side by side."""

import itertools
from collections.abc import Sequence

from rd_deploy.bench.claims import MEMORY, Claim, at_least, claim_name, not_measured, share_claim
from rd_deploy.bench.models import Subject
from rd_deploy.engines import Session
from rd_deploy.memory import Ledger, ledger

POLICIES = ("separate", "in-place")
BYTES = {"fp32": 4, "bf16": 2}


def count_memory(subjects: Sequence[Subject], precisions: Sequence[str], batches: Sequence[int]) -> list[dict]:
    """Rows of the ledger for every network, precision, batch and policy."""
    return [
        _ledger_row(subject.name, precision, batch, ledger(subject.model, batch, BYTES[precision], policy))
        for subject, precision, batch, policy in itertools.product(subjects, precisions, batches, POLICIES)
    ]


def _ledger_row(name: str, precision: str, batch: int, counted: Ledger) -> dict:
    return {
        "model": name,
        "precision": precision,
        "batch": batch,
        "engine": None,
        "policy": counted.policy,
        "peak_bytes": counted.peak_bytes,
        "shortcut_peak_bytes": counted.shortcut_peak_bytes,
        "shortcut_share": counted.shortcut_share,
        "traffic_bytes": counted.traffic_bytes,
        "how": f"ledger, {counted.policy}: counted over the fused graph",
    }


def engine_row(name: str, session: Session) -> dict:
    info = session.info()
    return {
        "model": name,
        "precision": session.precision,
        "batch": session.batch,
        "engine": session.engine.name,
        "policy": None,
        "peak_bytes": info.feature_map_bytes,
        "shortcut_peak_bytes": None,
        "shortcut_share": None,
        "traffic_bytes": None,
        "how": f"{session.engine.name}: {info.feature_map_how}",
    }


def judge_memory(model: str, against: str, rows: Sequence[dict]) -> list[Claim]:
    """Verdicts once per policy (their ratios do not depend on batch or precision), and per engine's own figure."""
    verdicts: dict[str, Claim] = {}
    for ours in [row for row in rows if row["model"] == model]:
        theirs = next(row for row in rows if row["model"] == against and _same(row, ours))
        policy = ours["policy"]
        name = f"memory/{policy}" if policy else claim_name("memory", ours["engine"], ours["precision"], ours["batch"])
        if name not in verdicts:
            verdicts[name] = _memory_claim(name, ours, theirs)
            if policy:
                verdicts[f"share/{policy}"] = share_claim(f"share/{policy}", theirs["shortcut_share"])
    return list(verdicts.values())


def _same(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in ("policy", "engine", "precision", "batch"))


def _memory_claim(name: str, ours: dict, theirs: dict) -> Claim:
    if not ours["peak_bytes"] or not theirs["peak_bytes"]:
        return not_measured(name, MEMORY, ours["how"].partition(": ")[2])
    ratio = theirs["peak_bytes"] / ours["peak_bytes"]
    return at_least(name, MEMORY, ratio, ratio, ratio)
