"""Part a: every kernel against float64, every engine on whole networks against torch in fp32, run against run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from gpu import kernels, reference
from gpu.suite import MODEL, OURS, Row, Suite, Unsupported
from rd_deploy.triton_kernels.compile import Job, fill_cache
from rd_deploy.triton_kernels.launch import FIRST_PDL

KERNEL_BATCH, BATCH = 2, 8
# Ways to run our engine that must be right whatever the tuner takes.
FORCED = {"never-fused": {"RD_FUSION": "never"}, "always-fused": {"RD_FUSION": "always"}}


def rows(suite: Suite) -> Iterator[Row]:
    """Kernels first, so that one that faults is named and not the network that ran it."""
    others = [engine for engine in suite.engines if engine != OURS]
    for precision in suite.precisions:
        if OURS in suite.engines:
            yield from _kernels(suite, precision)
            for network in suite.checked:
                yield from _ours(suite, network, precision)
        for engine in others:
            for network in suite.checked:
                key = f"a/{precision}/{network}/{engine}"
                yield Row(key, lambda given=(engine, network, precision): _engine(suite, *given))


def _ours(suite: Suite, network: str, precision: str) -> Iterator[Row]:
    yield Row(f"a/{precision}/{network}/{OURS}", lambda: _engine(suite, OURS, network, precision), precision)
    for name, settings in FORCED.items():
        if suite.dry and (network, name) != (MODEL, "always-fused"):
            continue  # the interpreter is slow
        given = (OURS, network, precision, settings | {"RD_TUNE": "0"})
        yield Row(f"a/{precision}/{network}/{OURS}/{name}", lambda given=given: _engine(suite, *given), precision)
    yield Row(f"a/{precision}/{network}/{OURS}/pdl", lambda: _pdl(suite, network, precision), precision)


def _kernels(suite: Suite, precision: str) -> Iterator[Row]:
    """One row for each kernel that any of the networks can use, all its configurations for this card.

    They run in another process, so that one that faults costs that one configuration. In a dry run one of each kind,
    with and without a sum, one configuration.
    """
    seen, kinds, batch = set(), set(), 1 if suite.dry else KERNEL_BATCH
    for network in suite.checked:
        chain = suite.chain(network)
        with suite.apart(kernels.Check(chain, batch, precision, str(suite.device))) as ask:
            for piece in kernels.pieces(chain, batch):
                kind = type(piece.kernel), kernels.added(piece) is None
                if piece.kernel not in seen and not (suite.dry and kind in kinds):
                    seen.add(piece.kernel)
                    kinds.add(kind)
                    key = f"a/{precision}/kernel/{piece.kernel}"
                    yield Row(key, lambda given=(ask, piece, precision): _kernel(suite, *given))


def _kernel(suite: Suite, ask, piece, precision: str) -> dict:
    configs = tuple(piece.kernel.configs(suite.card))[: 1 if suite.dry else None]
    if not configs:  # none was run, so none was right
        raise Unsupported("no configuration of it fits this card")
    pdl = not suite.dry and suite.card.capability >= FIRST_PDL
    if not suite.dry:
        ways = [(config, way) for config in configs for way in {False, pdl}]
        fill_cache(Job(piece.kernel, config, precision, suite.card.capability, way) for config, way in ways)
    found = kernels.check(ask, piece, configs, pdl)
    return found | _verdict([f"{', '.join(entry['faults'])}: {entry['config']}" for entry in found["wrong"]])


def _engine(suite: Suite, engine: str, network: str, precision: str, settings: dict | None = None) -> dict:
    """Logits against torch in fp32 on the same device, and against a second replay."""
    batch = 1 if suite.dry else BATCH
    with _environment(settings or {}):
        session, seconds = suite.load(engine, network, precision, batch)
    kept, faults = reference.check(session, suite.images(batch), suite.reference(network, batch), engine == OURS)
    rejected = list(getattr(session, "rejected", ()))
    warnings = [f"{len(rejected)} configurations rejected, the first: {rejected[0]}"] if rejected else []
    return {**kept, "load_seconds": seconds, "warnings": warnings} | _verdict(faults)


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
