"""Part a: every kernel against float64, every engine on whole networks against torch in fp32, run against run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from gpu import kernels
from gpu.suite import MODEL, OURS, Row, Suite, Unsupported
from rd_deploy import parity
from rd_deploy.engines.base import image_input
from rd_deploy.engines.torch import run_calls, translate

KERNEL_BATCH, BATCH = 2, 8
FIRST_PDL = 90  # the capability from which programmatic dependent launch exists
# Ways to run our engine that must be right whatever the tuner takes.
FORCED = {"never-fused": {"RD_FUSION": "never"}, "always-fused": {"RD_FUSION": "always"}}


def rows(suite: Suite) -> Iterator[Row]:
    others = [engine for engine in suite.engines if engine != OURS]
    for precision in suite.precisions:
        if OURS in suite.engines:
            for network in suite.checked:
                yield from _ours(suite, network, precision)
            yield from _kernels(suite, precision)
        for engine in others:
            for network in suite.checked:
                key = f"a/{precision}/{network}/{engine}"
                yield Row(key, lambda given=(engine, network, precision): _engine(suite, *given))


def _ours(suite: Suite, network: str, precision: str) -> Iterator[Row]:
    yield Row(f"a/{precision}/{network}/{OURS}", lambda: _engine(suite, OURS, network, precision))
    for name, settings in FORCED.items():
        if suite.dry and (network, name) != (MODEL, "always-fused"):
            continue  # the interpreter is slow
        given = (OURS, network, precision, settings | {"RD_TUNE": "0"})
        yield Row(f"a/{precision}/{network}/{OURS}/{name}", lambda given=given: _engine(suite, *given))
    yield Row(f"a/{precision}/{network}/{OURS}/pdl", lambda given=(network, precision): _pdl(suite, *given))


def _kernels(suite: Suite, precision: str) -> Iterator[Row]:
    """One row for each kernel that any of the networks can use, all its configurations for this card.

    In a dry run one of each kind, one configuration.
    """
    seen, kinds = set(), set()
    for network in suite.checked:
        chain = suite.chain(network)
        for piece in kernels.pieces(chain, 1 if suite.dry else KERNEL_BATCH):
            if piece.kernel not in seen and not (suite.dry and type(piece.kernel) in kinds):
                seen.add(piece.kernel)
                kinds.add(type(piece.kernel))
                key = f"a/{precision}/kernel/{piece.kernel}"
                yield Row(key, lambda given=(piece, chain, precision): _kernel(suite, *given))


def _kernel(suite: Suite, piece, chain, precision: str) -> dict:
    configs = tuple(piece.kernel.configs(suite.card))[: 1 if suite.dry else None]
    pdl = not suite.dry and suite.card.capability >= FIRST_PDL
    suite.prepare(precision)
    batch = 1 if suite.dry else KERNEL_BATCH
    found = kernels.check(piece, configs, chain, batch, precision, pdl, suite.device)
    return found | _verdict([f"{entry['config']}: {', '.join(entry['faults'])}" for entry in found["wrong"]])


def _engine(suite: Suite, engine: str, network: str, precision: str, settings: dict | None = None) -> dict:
    """Logits against torch in fp32 on the same device, and against a second replay."""
    batch = 1 if suite.dry else BATCH
    with _environment(settings or {}):
        session, seconds = suite.load(engine, network, precision, batch)
    images = suite.images(batch)
    logits, again = (session.run(images) for _ in range(2))
    expected = _reference(suite, network, images)
    found = parity.compare(expected, logits, parity.TOLERANCES[precision])
    repeated = bool(np.array_equal(logits, again))
    faults = [] if found.passes else [f"off by {found.max_error:.2g} deviations (tolerance {found.tolerance:g})"]
    faults += ["two replays differ"] if not repeated and engine == OURS else []  # libraries may sum in any order
    error = found.max_error if np.isfinite(found.max_error) else None
    kept = {"max_error": error, "tolerance": found.tolerance, "top1_agreement": found.top1_agreement}
    rejected = list(getattr(session, "rejected", ()))
    warnings = [f"{len(rejected)} configurations rejected, the first: {rejected[0]}"] if rejected else []
    return {**kept, "replays_equal": repeated, "load_seconds": seconds, "warnings": warnings} | _verdict(faults)


def _pdl(suite: Suite, network: str, precision: str) -> dict:
    """The same plan with and without programmatic dependent launch."""
    if suite.dry or suite.card.capability < FIRST_PDL:
        raise Unsupported("programmatic dependent launch needs a GPU of sm_90 or later")
    logits = []
    for wanted in ("1", "0"):
        with _environment({"RD_TUNE": "0", "RD_PDL": wanted}):
            session, _ = suite.load(OURS, network, precision, BATCH)
        logits.append(session.run(suite.images(BATCH)))
    return _verdict([] if np.array_equal(*logits) else ["logits differ"])


def _verdict(faults: list[str]) -> dict:
    return {"status": "failed", "reason": "; ".join(faults)[:400]} if faults else {"status": "passed"}


def _reference(suite: Suite, network: str, images: np.ndarray) -> np.ndarray:
    """torch in fp32, without TF32."""
    import torch

    model = suite.model(network)
    calls = translate(model, torch.float32, suite.device)
    names = image_input(model).name, model.graph.output[0].name
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = torch.from_numpy(images).to(suite.device)
        return run_calls(calls, {names[0]: x}, names[1]).cpu().numpy()


@contextmanager
def _environment(settings: dict[str, str]):
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
