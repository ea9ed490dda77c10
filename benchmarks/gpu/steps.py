"""Part d: every launch of our engine, measured and predicted, against what the card can do at most."""

from collections.abc import Iterator

from gpu.suite import COMPARE, MODEL, OURS, Row, Suite, Unsupported
from gpu.timing import median_ms

BATCHES = (32, 128, 1)


def rows(suite: Suite) -> Iterator[Row]:
    precision = suite.precisions[0]
    kernels = precision if OURS in suite.engines else None
    yield Row(f"d/{precision}/limits", lambda: _limits(suite, precision))
    for batch in (batch for batch in BATCHES if batch in suite.batches):
        for network in (MODEL, COMPARE):
            given = (network, precision, batch)
            yield Row(f"d/{precision}/{batch}/{network}", lambda given=given: _steps(suite, *given), kernels)


def _limits(suite: Suite, precision: str) -> dict:
    from gpu.limits import measured

    return {"limits": measured(suite, precision)}


def _steps(suite: Suite, network: str, precision: str, batch: int) -> dict:
    row = suite.record.rows.get(f"d/{precision}/limits", {})
    if OURS not in suite.engines or row.get("status") != "measured":
        raise Unsupported(f"needs the engine {OURS} and the card's limits")
    session, _ = suite.load(OURS, network, precision, batch)
    session.run(suite.images(batch))  # which the launches then read: not the zeros of loading
    whole_us = 1e3 * median_ms(suite.timed(session.enqueue), suite.dry)
    times = session.profile()
    steps = [
        _step(step, seconds, row["limits"], suite.card.l2_bytes)
        for step, seconds in zip(session.plan.steps, times, strict=True)
    ]
    return {
        "steps": steps,
        "sum_us": sum(times) * 1e6,
        "whole_us": whole_us,
        "tuned_us": session.plan.us,
        "predicted_us": session.plan.predicted_us,
        "worst": [step["name"] for step in worst(steps)],
    }


def _step(step, seconds: float, limits: dict, l2_bytes: int) -> dict:
    """A launch alone, repeated: maps that fit half the L2 cache stay there, while its weights come from DRAM each time.

    ``us``: measured here; ``tuned_us``: by the tuner, when it chose (as predicted, where it did not measure).
    """
    moved = step.map_bytes + step.weight_bytes
    maps = "l2" if step.map_bytes <= l2_bytes / 2 else "dram"
    parts = {"dram": step.weight_bytes / limits["dram_gb_s"] * 1e-9}
    parts[maps] = parts.get(maps, 0) + step.map_bytes / limits[f"{maps}_gb_s"] * 1e-9
    arithmetic, memory = step.flops / limits["tflops"] * 1e-12, sum(parts.values())
    least, limit = max(arithmetic, memory), "arithmetic" if arithmetic > memory else max(parts, key=parts.get)
    return {
        "name": step.name,
        "kernel": step.kernel,
        "settings": step.settings,
        "us": seconds * 1e6,
        "tuned_us": step.us,
        "predicted_us": step.predicted_us,
        "tflops": step.flops / seconds * 1e-12,
        "gb_s": moved / seconds * 1e-9,
        "limit": limit,
        "share": least / seconds,
        "lost_us": (seconds - least) * 1e6,
    }


def worst(steps: list[dict], count: int = 2) -> list[dict]:
    """The steps that lose most time against their limit."""
    return sorted(steps, key=lambda step: -step["lost_us"])[:count]
