"""A whole comparison: load, check, time, count memory, judge; the result is ``bench.json``'s content."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from rd_deploy.bench import claims as judge
from rd_deploy.bench.agreement import Reference, compare, random_images, reference
from rd_deploy.bench.models import Subject
from rd_deploy.bench.statistics import Ratio, instability, paired_ratio, summarise
from rd_deploy.bench.timer import PairedSamples, time_pair
from rd_deploy.common import UserError
from rd_deploy.engines import Engine, Session, Unsupported
from rd_deploy.memory import Ledger, ledger

FORMAT = "residual-distillation/bench/1"
POLICIES = ("separate", "in-place")
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Plan:
    """What to measure. ``seconds``: sampling time per pair, after warm-up of at most ``warm_up`` seconds each."""

    engines: list[Engine]
    batches: list[int]
    precisions: list[str]
    threads: int
    seconds: float
    warm_up: float
    seed: int = 0


@dataclass
class Report:
    """``bench.json`` in the making; lists of plain dicts."""

    results: list[dict] = field(default_factory=list)
    ratios: list[dict] = field(default_factory=list)
    best: list[dict] = field(default_factory=list)
    memory: list[dict] = field(default_factory=list)
    agreement: list[dict] = field(default_factory=list)
    claims: list[judge.Claim] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """One engine's sessions of both networks and how they did."""

    sessions: tuple[Session, Session]
    medians: tuple[float, float]
    ratio: Ratio


def measure(model: Subject, against: Subject, plan: Plan, skipped: list[dict], say: Callable[[str], None]) -> Report:
    """Measure ``model`` and ``against`` on every engine, precision and batch of the plan.

    What an engine cannot do is listed in ``skipped`` with the reason; that nothing at all can be measured is a
    `UserError`. ``say`` is told what happens.
    """
    report = Report(skipped=list(skipped))
    truths = tuple(_reference(subject, plan) for subject in (model, against))
    for precision in plan.precisions:
        for batch in plan.batches:
            _setting(model, against, truths, precision, batch, plan, report, say)
    if not report.results:
        reasons = "; ".join(sorted({f"{entry['engine']}: {entry['reason']}" for entry in report.skipped}))
        raise UserError(f"nothing could be measured: {reasons}")
    count_memory(model, against, plan, report)
    judge_memory(model, against, report)
    return report


def document(model: Subject, against: Subject, plan: Plan, report: Report, machine: dict) -> dict:
    """``bench.json``: see ``schema.json`` beside this file and docs/bench-json.md."""
    return {
        "format": FORMAT,
        "model": model.name,
        "compare": against.name,
        "networks": [
            {"name": subject.name, "source": subject.source, "input": list(subject.shape), "classes": subject.classes}
            for subject in (model, against)
        ],
        "timing": "host to host: NumPy images in, NumPy logits out",
        "seconds_per_pair": plan.seconds,
        "results": report.results,
        "ratios": report.ratios,
        "best": report.best,
        "memory": report.memory,
        "claims": [claim.to_dict() for claim in report.claims],
        "agreement": report.agreement,
        "skipped": report.skipped,
        "warnings": report.warnings,
        "environment": machine,
    }


def _reference(subject: Subject, plan: Plan) -> Reference:
    try:
        return reference(subject.model, plan.batches, subject.shape, plan.seed)
    except Unsupported as reason:
        raise UserError(f"{subject.name}: {reason}") from reason


def _setting(model, against, truths, precision: str, batch: int, plan: Plan, report: Report, say) -> None:
    """All engines at one precision and batch, then the best against the best."""
    pairs: dict[str, Pair] = {}
    for engine in plan.engines:
        label = f"{engine.name} {precision} batch {batch}"
        try:
            sessions = _load(engine, (model, against), truths, precision, batch, plan, report)
        except Unsupported as reason:
            report.skipped.append(_skip(engine.name, precision, batch, str(reason)))
            report.claims.append(
                judge.not_measured(_claim("speed", engine.name, precision, batch), judge.SPEED, str(reason))
            )
            say(f"{label}: skipped: {reason}")
            continue
        say(f"{label}: timing {model.name} and {against.name} interleaved")
        pairs[engine.name] = _time(sessions, (model.name, against.name), label, plan, report)
    if pairs:
        _best_against_best(model, against, pairs, plan, report, say)


def _load(engine: Engine, subjects, truths, precision: str, batch: int, plan: Plan, report: Report):
    sessions = []
    for subject, truth in zip(subjects, truths, strict=True):
        session = engine.load(subject.model, precision, plan.threads, batch)
        agreement = compare(subject.name, session, truth)
        report.agreement.append(agreement.to_dict())
        if not agreement.agrees:
            raise Unsupported(agreement.text)
        sessions.append(session)
    return tuple(sessions)


def _time(sessions: tuple[Session, Session], names: tuple[str, str], label: str, plan: Plan, report: Report) -> Pair:
    """Time both sessions of one engine and enter them, and the engine's own memory figures, in the report."""
    samples, ratio = _interleave(sessions, plan)
    summaries = [summarise(values, plan.seed) for values in (samples.a, samples.b)]
    where = _where(sessions[0])
    for name, summary, values, inner, warm in zip(
        names, summaries, (samples.a, samples.b), samples.inner, samples.warm_up, strict=True
    ):
        times = {f"{key}_ms": getattr(summary, key) for key in ("median", "low", "high", "p90", "p99")}
        steady = {"cv": summary.cv, "inner": inner, "warm_up": asdict(warm)}
        report.results.append({"model": name, **where, **times, **steady, "samples_ms": values})
    report.ratios.append({**where, **_ratio(ratio)})
    report.warnings += [f"{label}: {text}" for text in instability(dict(zip(names, summaries, strict=True)), ratio)]
    report.warnings += _not_steady(samples, names, label)
    report.memory += [_engine_row(name, session) for name, session in zip(names, sessions, strict=True)]
    name = _claim("speed", where["engine"], where["precision"], where["batch"])
    report.claims.append(judge.at_least(name, judge.SPEED, ratio.value, ratio.low, ratio.high))
    return Pair(sessions, (summaries[0].median, summaries[1].median), ratio)


def _best_against_best(model, against, pairs: dict[str, Pair], plan: Plan, report: Report, say) -> None:
    """Each network on its fastest engine; when those differ, the two sessions are measured interleaved as well."""
    fastest = [min(pairs, key=lambda name: pairs[name].medians[side]) for side in (0, 1)]
    chosen = tuple(pairs[name].sessions[side] for side, name in enumerate(fastest))
    ratio = pairs[fastest[0]].ratio
    setting = {"precision": chosen[0].precision, "batch": chosen[0].batch}
    label = f"best engines {setting['precision']} batch {setting['batch']}"
    if fastest[0] != fastest[1]:
        say(f"{label}: timing {model.name} on {fastest[0]} and {against.name} on {fastest[1]} interleaved")
        samples, ratio = _interleave(chosen, plan)
        summaries = {
            f"{name} on {engine}": summarise(values, plan.seed)
            for name, engine, values in zip((model.name, against.name), fastest, (samples.a, samples.b), strict=True)
        }
        report.warnings += [f"{label}: {text}" for text in instability(summaries, ratio)]
        report.warnings += _not_steady(samples, tuple(summaries), label)
    engines = {"model_engine": fastest[0], "compare_engine": fastest[1]}
    report.best.append({**setting, **engines, **_ratio(ratio)})
    note = f": {model.name} on {fastest[0]} against {against.name} on {fastest[1]}"
    name = _claim("speed", "best", **setting)
    report.claims.append(judge.at_least(name, judge.SPEED, ratio.value, ratio.low, ratio.high, note))


def _interleave(sessions: tuple[Session, Session], plan: Plan) -> tuple[PairedSamples, Ratio]:
    images = random_images(sessions[0].batch, sessions[0].shape[1:], plan.seed)
    first, second = (lambda: sessions[0].run(images)), (lambda: sessions[1].run(images))
    samples = time_pair(first, second, seconds=plan.seconds, max_warm_up=plan.warm_up)
    return samples, paired_ratio(samples.a, samples.b, plan.seed)


def _not_steady(samples: PairedSamples, names: tuple[str, str], label: str) -> list[str]:
    return [
        f"{label}: {name} was not steady after {warm.seconds:.1f} s of warm-up (still changing by {warm.change:.0%})"
        for name, warm in zip(names, samples.warm_up, strict=True)
        if not warm.steady
    ]


def count_memory(model: Subject, against: Subject, plan: Plan, report: Report) -> None:
    """Ledger rows for both networks and policies at every precision and batch; engines' rows stand already."""
    for subject in (model, against):
        for precision in plan.precisions:
            for batch in plan.batches:
                for policy in POLICIES:
                    counted = ledger(subject.model, batch, BYTES[precision], policy)
                    report.memory.append(_ledger_row(subject.name, precision, batch, counted))


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


def _engine_row(name: str, session: Session) -> dict:
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


def judge_memory(model: Subject, against: Subject, report: Report) -> None:
    """Claims on memory: once per policy (ratios do not depend on batch or precision), and per engine's own figure."""
    seen: set[str] = set()
    for ours in [row for row in report.memory if row["model"] == model.name]:
        where = (ours["precision"], ours["batch"])
        name = f"memory/{ours['policy']}" if ours["policy"] else _claim("memory", ours["engine"], *where)
        if name in seen:
            continue
        seen.add(name)
        theirs = next(row for row in report.memory if row["model"] == against.name and _same(row, ours))
        report.claims.append(_memory_claim(name, ours, theirs))
        if ours["policy"]:
            report.claims.append(judge.share_claim(f"share/{ours['policy']}", theirs["shortcut_share"]))


def _same(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in ("policy", "engine", "precision", "batch"))


def _memory_claim(name: str, ours: dict, theirs: dict) -> judge.Claim:
    if not ours["peak_bytes"] or not theirs["peak_bytes"]:
        return judge.not_measured(name, judge.MEMORY, ours["how"].partition(": ")[2])
    ratio = theirs["peak_bytes"] / ours["peak_bytes"]
    return judge.at_least(name, judge.MEMORY, ratio, ratio, ratio)


def _claim(kind: str, who: str, precision: str, batch: int) -> str:
    return f"{kind}/{who}/{precision}/batch-{batch}"


def _skip(engine: str, precision: str | None, batch: int | None, reason: str) -> dict:
    return {"engine": engine, "precision": precision, "batch": batch, "reason": reason}


def _where(session: Session) -> dict:
    return {
        "engine": session.engine.name,
        "precision": session.precision,
        "batch": session.batch,
        "threads": session.threads,
    }


def _ratio(ratio: Ratio) -> dict:
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "no_difference": ratio.no_difference}
