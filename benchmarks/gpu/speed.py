"""Part b: latency and throughput on resident images, each engine's two networks interleaved, and ours against the best.

A row's ``model`` is plain-50 and its ``compare`` ResNet-50; a ratio above 1 means that plain-50 is faster. One graph
replay is one run, on the suite's random images and with logits that were found right (`Suite.session`); ``host`` rows
are NumPy images in, NumPy logits out.
"""

import time
from collections.abc import Iterator

from gpu.suite import COMPARE, ENGINES, MODEL, OURS, Row, Suite, Unsupported
from gpu.timing import BURST_MS, DRY, Length, compare, resident

HOST_BATCHES = (1, 32)
AGAINST_BEST = "ours-against-best"


def rows(suite: Suite) -> Iterator[Row]:
    for precision, batch in suite.settings:
        at = f"b/{precision}/{batch}"
        for engine in suite.engines:
            setting = (engine, precision, batch)
            kernels = precision if engine == OURS else None
            yield Row(f"{at}/{engine}", lambda setting=setting: _pair(suite, *setting), kernels)
            _drop_outdated(suite, precision, batch)  # now that the row is there
            if batch in HOST_BATCHES:
                yield Row(f"{at}/{engine}/host", lambda setting=setting: _host(suite, *setting), kernels)
        yield Row(f"{at}/{AGAINST_BEST}", lambda setting=(precision, batch): _against_best(suite, *setting))


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
    calls = (lambda session=session: session.run(images) for session in (plain, residual))
    return _compared(suite, *calls, host=True)


def _against_best(suite: Suite, precision: str, batch: int) -> dict:
    """plain-50 on our engine against ResNet-50 on the best of the others.

    Where ResNet-50 is fastest on our engine, the stricter comparison is that engine's own row: ``best_engine``.
    ``considered``: the engines that were measured by then; with others the row is made again (`_drop_outdated`).
    """
    choice = _choice(suite, precision, batch)
    best = choice["compare_engine"]
    if OURS not in choice["considered"] or best is None:
        raise Unsupported("needs our engine's row and another engine's of this setting")
    if left_out := [engine for engine in (OURS, best) if engine not in suite.engines]:
        raise Unsupported(f"needs {' and '.join(left_out)} among --engines")
    _keep(suite, precision, batch, OURS)
    plain, _ = suite.session(OURS, MODEL, precision, batch)
    residual, _ = suite.session(best, COMPARE, precision, batch)
    return _compared(suite, plain.enqueue, residual.enqueue) | choice


def _choice(suite: Suite, precision: str, batch: int) -> dict:
    """The engines that were measured at this setting, and the fastest one for ResNet-50 without and with ours."""
    medians = _medians(suite, precision, batch)
    return {
        "considered": list(medians),
        "compare_engine": min((engine for engine in medians if engine != OURS), key=medians.get, default=None),
        "best_engine": min(medians, key=medians.get, default=None),
    }


def _drop_outdated(suite: Suite, precision: str, batch: int) -> None:
    """Let go of a comparison with the best of other engines than those that are measured by now."""
    key = f"b/{precision}/{batch}/{AGAINST_BEST}"
    row = suite.record.rows.get(key, {})
    choice = _choice(suite, precision, batch)
    if row.get("status") == "measured" and choice != {name: row.get(name) for name in choice}:
        suite.record.drop(key)


def _compared(suite: Suite, first, second, host: bool = False) -> dict:
    """Times of one run of each, by the GPU's clock or from ``host`` to host, and the seconds that were asked for."""
    length = DRY if suite.dry else Length(suite.seconds)
    clock = time.perf_counter_ns if host else resident(suite.dry)
    burst_ms = 0 if host or suite.dry else BURST_MS
    found = compare(suite.timed(first), suite.timed(second), clock, length, suite.dry, burst_ms)
    return found | {"sampling_seconds": suite.seconds}


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
    """ResNet-50's time on every engine that was measured at this setting, in this sitting or an earlier one."""
    rows = suite.record.rows
    found = {engine: rows.get(f"b/{precision}/{batch}/{engine}", {}) for engine in ENGINES}
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
