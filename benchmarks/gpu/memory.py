"""Part c: memory of feature maps by every engine's own account, beside the ledger's two policies."""

from collections.abc import Iterator

from gpu.suite import COMPARE, MODEL, OURS, Row, Suite, free
from rd_deploy.memory import ledger

POLICIES = ("separate", "in-place")


def rows(suite: Suite) -> Iterator[Row]:
    for batch in suite.batches:
        yield Row(f"c/{batch}/ledger", lambda batch=batch: _ledger(suite, batch))
        for engine in suite.engines:
            setting = (engine, suite.precisions[0], batch)
            kernels = suite.precisions[0] if engine == OURS else None
            yield Row(f"c/{batch}/{engine}", lambda setting=setting: _engine(suite, *setting), kernels)


def _ledger(suite: Suite, batch: int) -> dict:
    """The least that layer-by-layer execution needs, in two-byte elements; an analysis, not a measurement."""
    counted = {
        f"ledger {policy}": {
            network: ledger(suite.model(network), batch, 2, policy).peak_bytes for network in (MODEL, COMPARE)
        }
        for policy in POLICIES
    }
    return {"peaks": counted}


def _engine(suite: Suite, engine: str, precision: str, batch: int) -> dict:
    """Each account's peak for both networks, and what torch's allocator holds for the session's life."""
    peaks: dict[str, dict[str, int | None]] = {}
    how: dict[str, str] = {}
    for network in (MODEL, COMPARE):
        free()
        before = _held(suite)
        session, _ = suite.load(engine, network, precision, batch)
        free()
        held = None if before is None else max(0, _held(suite) - before - session.weight_bytes)
        peaks.setdefault("torch.cuda held by the session", {})[network] = held
        for figure in session.feature_maps():
            peaks.setdefault(figure.source, {})[network] = figure.peak_bytes
            how[figure.source] = figure.how
        if engine == OURS:
            peaks.setdefault("cuda scratch", {})[network] = session.plan.scratch_bytes
        del session
    return {"peaks": peaks, "how": how, "precision": precision}


def _held(suite: Suite) -> int | None:
    """Bytes that torch has taken from the GPU; images are among them, weights are taken off by the caller."""
    if suite.dry:
        return None
    import torch

    torch.cuda.synchronize()
    return torch.cuda.memory_reserved()
