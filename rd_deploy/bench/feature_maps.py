"""Feature-map memory in a benchmark: the analytic ledger and each engine's own figures, side by side."""

import itertools
from collections.abc import Sequence

from rd_deploy.bench.claims import MEMORY, SHARE, Claim, at_least, claim_name, not_measured, share_claim
from rd_deploy.bench.models import Subject
from rd_deploy.common import UserError
from rd_deploy.engines import Figure, Session
from rd_deploy.engines.base import ELEMENT_BYTES, weight_elements
from rd_deploy.memory import Ledger, ledger

POLICIES = ("separate", "in-place")
SETTING = ("policy", "engine", "precision", "batch")


def count_memory(
    subjects: Sequence[Subject], precisions: Sequence[str], batches: Sequence[int]
) -> tuple[list[dict], dict[str, dict[str, Ledger]]]:
    """Rows of the ledger for every precision, batch, policy and network, and the ledgers to draw.

    A network whose shapes are not known before it runs has rows without figures, whose ``how`` says why. Drawn is the
    first setting at which all ledgers are known, as policy to network to ledger; there may be none.
    """
    rows, drawn = [], {}
    for precision, batch in itertools.product(precisions, batches):
        known: dict[str, dict[str, Ledger]] = {policy: {} for policy in POLICIES}
        for policy, subject in itertools.product(POLICIES, subjects):
            try:
                counted = ledger(subject.model, batch, ELEMENT_BYTES[precision], policy)
                known[policy][subject.name] = counted
                rows.append(_ledger_row(subject, precision, counted))
            except UserError as reason:
                rows.append(_unknown_row(subject, precision, batch, policy, str(reason)))
        if not drawn and all(len(pair) == len(subjects) for pair in known.values()):
            drawn = known
    return rows, drawn


def _ledger_row(subject: Subject, precision: str, counted: Ledger) -> dict:
    how = "counted over the fused graph"
    return _row(subject, precision, counted.batch, counted.policy, how) | {
        "peak_bytes": counted.peak_bytes,
        "shortcut_peak_bytes": counted.shortcut_peak_bytes,
        "shortcut_share": counted.shortcut_share,
        "traffic_bytes": counted.traffic_bytes,
    }


def _unknown_row(subject: Subject, precision: str, batch: int, policy: str, reason: str) -> dict:
    figures = ("peak_bytes", "shortcut_peak_bytes", "shortcut_share", "traffic_bytes")
    return _row(subject, precision, batch, policy, reason) | dict.fromkeys(figures)


def _row(subject: Subject, precision: str, batch: int, policy: str, how: str) -> dict:
    source = f"ledger, {policy}"
    return {
        "model": subject.name,
        "precision": precision,
        "batch": batch,
        "engine": None,
        "policy": policy,
        "source": source,
        "weight_bytes": weight_elements(subject.model) * ELEMENT_BYTES[precision],
        "how": f"{source}: {how}",
    }


def engine_rows(name: str, session: Session) -> list[dict]:
    """A row for each account that the session's engine gives of its feature maps."""
    setting = (name, session.precision, session.batch, session.engine.name, session.weight_bytes)
    return [figure_row(*setting, figure) for figure in session.feature_maps()]


def figure_row(
    model: str, precision: str, batch: int, engine: str | None, weight_bytes: int, figure: Figure
) -> dict[str, object]:
    """A row of somebody else's account; ``engine``: whose session it is of, None where nothing was run."""
    return {
        "model": model,
        "precision": precision,
        "batch": batch,
        "engine": engine,
        "policy": None,
        "source": figure.source,
        "peak_bytes": figure.peak_bytes,
        "shortcut_peak_bytes": None,
        "shortcut_share": None,
        "traffic_bytes": None,
        "weight_bytes": weight_bytes,
        "how": f"{figure.source}: {figure.how}",
    }


def judge_memory(model: str, against: str, rows: Sequence[dict]) -> list[Claim]:
    """Verdicts per policy, at the first setting counted (ratios depend on no batch or precision), and per account."""
    pairs: dict[str, tuple[dict, dict]] = {}
    for row in rows:
        pair, name = tuple(_account(side, row, rows) for side in (model, against)), _claim_of(row)
        if all(pair) and (name not in pairs or _lacks(pairs[name])):
            pairs[name] = pair
    verdicts = []
    for name, pair in pairs.items():
        verdicts.append(_memory_claim(name, *pair))
        if pair[0]["policy"]:
            verdicts.append(_share_claim(f"share/{pair[0]['policy']}", pair[1]))
    return verdicts


def _claim_of(row: dict) -> str:
    if row["policy"]:
        return f"memory/{row['policy']}"
    return claim_name("memory", row["source"].replace(" ", "-"), row["precision"], row["batch"])


def _account(model: str, of: dict, rows: Sequence[dict]) -> dict | None:
    """A network's row of the same account as ``of``; where its engine gives no such account, the row that says why."""
    same = [row for row in rows if row["model"] == model and all(row[key] == of[key] for key in SETTING)]
    alike = (row for row in same if row["source"] == of["source"])
    return next(alike, next((row for row in same if row["peak_bytes"] is None), None))


def _lacks(pair: Sequence[dict]) -> dict | None:
    """The first row without a figure, if any."""
    return next((row for row in pair if not row["peak_bytes"]), None)


def _memory_claim(name: str, ours: dict, theirs: dict) -> Claim:
    missing = _lacks((ours, theirs))
    if missing:
        return not_measured(name, MEMORY, _reason(missing))
    ratio = theirs["peak_bytes"] / ours["peak_bytes"]
    note = "" if ours["policy"] else f": {_words(ours)}"
    return at_least(name, MEMORY, ratio, ratio, ratio, note)


def _share_claim(name: str, row: dict) -> Claim:
    if row["shortcut_share"] is None:
        return not_measured(name, SHARE, _reason(row))
    return share_claim(name, row["shortcut_share"])


def _reason(row: dict) -> str:
    return f"{row['model']}: {_words(row)}"


def _words(row: dict) -> str:
    return row["how"].partition(": ")[2]
