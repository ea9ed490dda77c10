"""Part b: latency and throughput on resident images, each engine's two networks interleaved, and ours against the best.

A row's ``model`` is plain-50 and its ``compare`` ResNet-50; a ratio above 1 means that plain-50 is faster. One graph
replay is one run, on the suite's random images and with logits that were found right (`Suite.session`); ``host`` rows
are NumPy images in, NumPy logits out.
"""

import time
from collections.abc import Iterator

from gpu.suite import COMPARE, MODEL, OURS, Row, Suite, Unsupported
from gpu.timing import BURST_MS, DRY, Length, compare, resident

HOST_BATCHES = (1, 32)


def rows(suite: Suite) -> Iterator[Row]:
    for precision, batch in suite.settings:
        at = f"b/{precision}/{batch}"
        for engine in suite.engines:
            setting = (engine, precision, batch)
            kernels = precision if engine == OURS else None
            yield Row(f"{at}/{engine}", lambda setting=setting: _pair(suite, *setting), kernels)
            if batch in HOST_BATCHES:
                yield Row(f"{at}/{engine}/host", lambda setting=setting: _host(suite, *setting), kernels)
        yield Row(f"{at}/ours-against-best", lambda setting=(precision, batch): _against_best(suite, *setting))


def _pair(suite: Suite, engine: str, precision: str, batch: int) -> dict:
    """Both networks on one engine."""
    (plain, plain_s), (residual, residual_s) = _sessions(suite, engine, precision, batch)
    found = _compared(suite, plain.enqueue, residual.enqueue)
    for side, session, seconds in (("model", plain, plain_s), ("compare", residual, residual_s)):
        found[side] |= _about(session, seconds, batch, found[side]["median_ms"])
    if engine == OURS:
        for side, network in (("model", MODEL), ("compare", COMPARE)):
            found[side]["compile_seconds"] = suite.compile_seconds(network, precision, batch)
    return found


def _host(suite: Suite, engine: str, precision: str, batch: int) -> dict:
    """The same from host to host."""
    (plain, _), (residual, _) = _sessions(suite, engine, precision, batch)
    images = suite.images(batch)
    length = DRY if suite.dry else Length(suite.seconds)
    calls = (suite.timed(lambda session=session: session.run(images)) for session in (plain, residual))
    return compare(*calls, time.perf_counter_ns, length, suite.dry, 0)


def _against_best(suite: Suite, precision: str, batch: int) -> dict:
    """plain-50 on our engine against ResNet-50 on the best of the others.

    Where ResNet-50 is fastest on our engine, the stricter comparison is that engine's own row: ``best_engine``.
    """
    medians = _medians(suite, precision, batch)
    others = {engine: ms for engine, ms in medians.items() if engine != OURS}
    if OURS not in medians or not others:
        raise Unsupported("needs our engine's row and another engine's of this setting")
    best = min(others, key=others.get)
    _keep(suite, precision, batch, OURS)
    plain, _ = suite.session(OURS, MODEL, precision, batch)
    residual, _ = suite.session(best, COMPARE, precision, batch)
    found = _compared(suite, plain.enqueue, residual.enqueue)
    return found | {"compare_engine": best, "best_engine": min(medians, key=medians.get)}


def _compared(suite: Suite, first, second) -> dict:
    length = DRY if suite.dry else Length(suite.seconds)
    first, second = suite.timed(first), suite.timed(second)
    return compare(first, second, resident(suite.dry), length, suite.dry, 0 if suite.dry else BURST_MS)


def _sessions(suite: Suite, engine: str, precision: str, batch: int):
    _keep(suite, precision, batch, engine)
    return tuple(suite.session(engine, network, precision, batch) for network in (MODEL, COMPARE))


def _keep(suite: Suite, precision: str, batch: int, engine: str) -> None:
    """Of this setting: the engine at work, and what the last comparison will need."""
    medians = _medians(suite, precision, batch)
    others = [name for name in medians if name != OURS]
    wanted = [(engine, network, precision, batch) for network in (MODEL, COMPARE)]
    wanted.append((OURS, MODEL, precision, batch))
    if others:
        wanted.append((min(others, key=medians.get), COMPARE, precision, batch))
    suite.keep(wanted)


def _medians(suite: Suite, precision: str, batch: int) -> dict[str, float]:
    """ResNet-50's time on every engine that was measured at this setting."""
    rows = suite.record.rows
    found = {engine: rows.get(f"b/{precision}/{batch}/{engine}", {}) for engine in suite.engines}
    return {engine: row["compare"]["median_ms"] for engine, row in found.items() if row.get("status") == "measured"}


def _about(session, seconds: float, batch: int, median_ms: float) -> dict:
    """What a session says of itself beside its time."""
    plan = getattr(session, "plan", None)
    predicted = {} if plan is None else {"predicted_ms": plan.predicted_us / 1e3, "launches": len(plan.steps)}
    rejected = list(getattr(session, "rejected", ()))
    return {
        "images_per_second": 1e3 * batch / median_ms,
        "load_seconds": seconds,
        "variant": session.variant,
        **predicted,
        **({"rejected": rejected} if rejected else {}),
    }
