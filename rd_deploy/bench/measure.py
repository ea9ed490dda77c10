"""A whole comparison: load, check, time, count memory, judge; the result is ``bench.json``'s content."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from rd_deploy.bench import claims as judge
from rd_deploy.bench.agreement import Reference, compare, random_images, reference
from rd_deploy.bench.builder_memory import SOURCE as BUILDER
from rd_deploy.bench.builder_memory import builder_rows
from rd_deploy.bench.claims import claim_name
from rd_deploy.bench.feature_maps import count_memory, engine_rows, judge_memory
from rd_deploy.bench.models import Subject
from rd_deploy.bench.profile import profile
from rd_deploy.bench.statistics import Ratio, Summary, paired_ratio, summarise
from rd_deploy.bench.timer import MIN_QUADS, PairedSamples, doubts, time_pair
from rd_deploy.common import UserError, first_line
from rd_deploy.engines import Engine, Session, Unsupported
from rd_deploy.engines.native import NativeSession
from rd_deploy.memory import Ledger

FORMAT = "residual-distillation/bench/1"
PROFILE_SECONDS = 2.0
OURS = ("native", "cuda")  # this package's engines, one for each device


@dataclass(frozen=True)
class Plan:
    """What to measure. ``seconds``: sampling time per pair, after warm-up of at most ``warm_up`` seconds each.

    ``quick``: a smoke run, whose times support no conclusion. ``profile``: also time the native engine's steps.
    """

    engines: list[Engine]
    batches: list[int]
    precisions: list[str]
    threads: int
    seconds: float
    warm_up: float
    min_quads: int = MIN_QUADS
    seed: int = 0
    quick: bool = False
    profile: bool = False

    def options(self) -> dict:
        """What someone else must set to measure the same."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"engines": [engine.name for engine in self.engines]}


@dataclass
class Report:
    """``bench.json`` in the making; lists of plain dicts. ``ledgers``: to draw, policy to network to ledger.

    ``interrupted``: by Ctrl-C, with something measured before.
    """

    results: list[dict] = field(default_factory=list)
    ratios: list[dict] = field(default_factory=list)
    best: list[dict] = field(default_factory=list)
    native_against_others: list[dict] = field(default_factory=list)
    memory: list[dict] = field(default_factory=list)
    agreement: list[dict] = field(default_factory=list)
    claims: list[judge.Claim] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    profiles: list[dict] = field(default_factory=list)
    ledgers: dict[str, dict[str, Ledger]] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class Timing:
    """How two sessions did against each other; ``times``: of each, as ``bench.json`` keeps them."""

    medians: tuple[float, float]
    times: tuple[dict, dict]
    ratio: Ratio
    warnings: list[str]


@dataclass(frozen=True)
class Pair:
    """One engine's sessions of both networks and how they did."""

    sessions: tuple[Session, Session]
    medians: tuple[float, float]
    ratio: Ratio


def measure(model: Subject, against: Subject, plan: Plan, skipped: list[dict], say: Callable[[str], None]) -> Report:
    """Measure ``model`` and ``against`` on every engine, precision and batch of the plan.

    What an engine cannot do, or fails in, is listed in ``skipped`` with the reason; that nothing at all can be measured
    is a `UserError`. ``say`` is told what happens. Ctrl-C ends it with what there is.
    """
    report = Report(skipped=list(skipped))
    report.memory, report.ledgers = count_memory((model, against), plan.precisions, plan.batches)
    try:
        report.memory += builder_rows((model, against), plan.precisions, plan.batches)
    except UserError as reason:
        report.skipped.append(_skip(BUILDER, None, None, str(reason)))
    truths = tuple(_reference(subject, plan) for subject in (model, against))
    settings, done = list(itertools.product(plan.precisions, plan.batches)), 0
    try:
        for setting in settings:
            _setting(model, against, truths, *setting, plan, report, say)
            done += 1
    except KeyboardInterrupt:
        if not report.results:
            raise
        report.interrupted = True
        report.warnings.append(f"interrupted: {done} of {len(settings)} settings (precision and batch) are complete")
    if not report.results:
        reasons = "; ".join(sorted({f"{entry['engine']}: {entry['reason']}" for entry in report.skipped}))
        raise UserError(f"nothing could be measured: {reasons}")
    report.claims += judge_memory(model.name, against.name, report.memory)
    return report


def document(model: Subject, against: Subject, plan: Plan, report: Report, machine: dict) -> dict:
    """``bench.json``: see ``schema.json`` beside this file and docs/bench-json.md."""
    return {
        "format": FORMAT,
        "model": model.name,
        "compare": against.name,
        "networks": [
            {
                **{"name": subject.name, "source": subject.source, "sha256": subject.sha256},
                **{"input": list(subject.shape), "classes": subject.classes},
            }
            for subject in (model, against)
        ],
        "timing": "host to host: NumPy images in, NumPy logits out",
        "options": plan.options(),
        "results": report.results,
        "ratios": report.ratios,
        "best": report.best,
        "native_against_others": report.native_against_others,
        "memory": report.memory,
        "claims": [claim.to_dict() for claim in report.claims],
        "agreement": report.agreement,
        "skipped": report.skipped,
        "warnings": report.warnings,
        "profiles": report.profiles,
        "environment": machine,
    }


def _reference(subject: Subject, plan: Plan) -> Reference:
    try:
        return reference(subject.model, plan.batches, subject.shape, plan.seed, plan.threads)
    except (Unsupported, UserError) as reason:
        raise UserError(f"{subject.name}: {reason}") from reason


def _setting(model, against, truths, precision: str, batch: int, plan: Plan, report: Report, say) -> None:
    """All engines at one precision and batch, then the best against the best."""
    pairs: dict[str, Pair] = {}
    for engine in plan.engines:
        label = f"{engine.name} {precision} batch {batch}"
        try:
            sessions = _load(engine, (model, against), truths, precision, batch, plan, report)
        except Exception as error:  # engines raise classes of their own
            if isinstance(error, UserError) and not report.results:
                raise  # a mistake in the input, as it seems, and there is nothing to lose yet
            _leave_out(engine.name, precision, batch, error, report, say)
            continue
        say(f"{label}: timing {model.name} and {against.name} interleaved")
        try:
            pairs[engine.name] = _time(sessions, (model.name, against.name), label, plan, report)
        except Exception as error:
            _leave_out(engine.name, precision, batch, error, report, say)
    if pairs:
        _best_against_best(model, against, pairs, plan, report, say)
        _native_against_others(model, against, pairs, plan, report, say)
    else:
        name = claim_name("speed", "best", precision, batch)
        report.claims.append(judge.not_measured(name, judge.SPEED, "no engine could"))


def _leave_out(who: str, precision: str, batch: int, error: Exception, report: Report, say) -> None:
    """Go on without a measurement, and say why: it is refused, or failed."""
    reason = str(error) if isinstance(error, Unsupported) else f"it failed: {first_line(error)}"
    report.skipped.append(_skip(who, precision, batch, reason))
    report.claims.append(judge.not_measured(claim_name("speed", who, precision, batch), judge.SPEED, reason))
    say(f"{who} {precision} batch {batch}: skipped: {reason}")


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
    """Time both sessions of one engine and enter them, and the engine's own memory figures, in the report.

    All is measured before anything is entered: an engine that fails leaves no half of its rows.
    """
    timing, where = _interleave(sessions, names, label, plan), _where(sessions[0])
    memory, profiles = [], []
    for name, session in zip(names, sessions, strict=True):
        memory += engine_rows(name, session)
        if plan.profile and isinstance(session, NativeSession):
            try:
                profiles.append(profile(name, session, _images(session, plan), min(plan.seconds, PROFILE_SECONDS)))
            except Exception as error:  # that must not cost the times measured
                reason = f"its profile of {name} failed: {first_line(error)}"
                report.skipped.append(_skip(where["engine"], where["precision"], where["batch"], reason))
    report.results += [{"model": name, **where, **times} for name, times in zip(names, timing.times, strict=True)]
    report.ratios.append({**where, **_ratio(timing.ratio)})
    report.warnings += timing.warnings
    report.memory += memory
    report.profiles += profiles
    name = claim_name("speed", where["engine"], where["precision"], where["batch"])
    report.claims.append(_speed_claim(name, timing.ratio))
    return Pair(sessions, timing.medians, timing.ratio)


def _best_against_best(model, against, pairs: dict[str, Pair], plan: Plan, report: Report, say) -> None:
    """Each network on its fastest engine."""
    fastest = [_fastest(pairs, side) for side in (0, 1)]
    _across("best", (model, against), pairs, fastest, report.best, plan, report, say)


def _native_against_others(model, against, pairs: dict[str, Pair], plan: Plan, report: Report, say) -> None:
    """Our engine's answer to the question of who has the ResNet on the best engine there was before."""
    others = {name: pair for name, pair in pairs.items() if name not in OURS}
    for ours in pairs.keys() & set(OURS) if others else ():
        engines = [ours, _fastest(others, 1)]
        rows = report.native_against_others
        _across(f"{ours}-against-others", (model, against), pairs, engines, rows, plan, report, say)


def _fastest(pairs: dict[str, Pair], side: int) -> str:
    return min(pairs, key=lambda name: pairs[name].medians[side])


def _across(
    who: str, subjects, pairs: dict[str, Pair], engines: list[str], rows: list[dict], plan, report, say
) -> None:
    """Each network on its engine, a row; when those differ, the two sessions are measured interleaved as well."""
    chosen = tuple(pairs[name].sessions[side] for side, name in enumerate(engines))
    ratio, times = pairs[engines[0]].ratio, (None, None)
    setting = {"precision": chosen[0].precision, "batch": chosen[0].batch}
    names = tuple(f"{subject.name} on {engine}" for subject, engine in zip(subjects, engines, strict=True))
    if engines[0] != engines[1]:
        label = f"{who} {setting['precision']} batch {setting['batch']}"
        say(f"{label}: timing {names[0]} and {names[1]} interleaved")
        try:
            timing = _interleave(chosen, names, label, plan)
        except Exception as error:
            _leave_out(who, *setting.values(), error, report, say)
            return
        ratio, times = timing.ratio, timing.times
        report.warnings += timing.warnings
    note = f": {names[0]} against {names[1]}"
    report.claims.append(_speed_claim(claim_name("speed", who, **setting), ratio, note))
    used = {"model_engine": engines[0], "compare_engine": engines[1]}
    rows.append({**setting, **used, **_ratio(ratio), "model_times": times[0], "compare_times": times[1]})


def _speed_claim(name: str, ratio: Ratio, note: str = "") -> judge.Claim:
    return judge.at_least(name, judge.SPEED, ratio.value, ratio.low, ratio.high, note)


def _interleave(sessions: tuple[Session, Session], names: tuple[str, str], label: str, plan: Plan) -> Timing:
    """``names``, ``label``: what warnings call the two sides and their setting."""
    images = _images(sessions[0], plan)
    first, second = (lambda: sessions[0].run(images)), (lambda: sessions[1].run(images))
    samples = time_pair(first, second, seconds=plan.seconds, min_quads=plan.min_quads, max_warm_up=plan.warm_up)
    ratio, summaries = paired_ratio(samples.a, samples.b, plan.seed), _summaries(samples, plan)
    found = doubts(samples, dict(zip(names, summaries, strict=True)), ratio)
    warnings = [f"{label}: {text}" for text in found]
    return Timing((summaries[0].median, summaries[1].median), _times(samples, summaries), ratio, warnings)


def _images(session: Session, plan: Plan) -> np.ndarray:
    return random_images(session.batch, session.shape[1:], plan.seed)


def _summaries(samples: PairedSamples, plan: Plan) -> tuple[Summary, Summary]:
    sides = zip((samples.a, samples.b), samples.calls, strict=True)
    return tuple(summarise(values, calls, plan.seed) for values, calls in sides)


def _times(samples: PairedSamples, summaries: tuple[Summary, Summary]) -> tuple[dict, dict]:
    """Everything about the timing of both sides that ``bench.json`` keeps."""
    return tuple(
        {
            **{f"{key}_ms": getattr(summary, key) for key in ("median", "low", "high", "p90", "p99")},
            "cv": summary.cv,
            "inner": inner,
            "calls": len(calls),
            "warm_up": asdict(warm),
            "samples_ms": [round(value, 6) for value in values],  # to the clock's nanosecond
        }
        for summary, values, inner, calls, warm in zip(
            summaries, (samples.a, samples.b), samples.inner, samples.calls, samples.warm_up, strict=True
        )
    )


def _skip(engine: str, precision: str | None, batch: int | None, reason: str) -> dict:
    return {"engine": engine, "precision": precision, "batch": batch, "reason": reason}


def _where(session: Session) -> dict:
    return {
        "engine": session.engine.name,
        "variant": session.variant,
        "precision": session.precision,
        "batch": session.batch,
        "threads": session.threads,
    }


def _ratio(ratio: Ratio) -> dict:
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "no_difference": ratio.no_difference}
