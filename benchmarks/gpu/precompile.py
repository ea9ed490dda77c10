"""Kernels compiled in parallel before anything is measured: loading a network finds them in Triton's cache."""

import os
import time
from collections.abc import Iterator

from gpu import kernels
from gpu.suite import COMPARE, MODEL, Suite, say
from rd_deploy.triton_kernels.compile import Job, fill_cache
from rd_deploy.triton_kernels.launch import FIRST_PDL


def compile_all(suite: Suite, precision: str) -> dict:
    """Every configuration of every kernel that a plan of our networks may use, plain-50's first; what failed.

    ``needs``: how many of the ``jobs`` a network needs at a batch; most are needed more than once.
    """
    start, needs, failed = time.perf_counter(), {}, []
    for network in dict.fromkeys((MODEL, COMPARE, *suite.checked)) if not suite.dry else (MODEL,):
        before, jobs = set().union(*needs.values()), []
        for batch in suite.batches:
            those = list(_jobs(suite, network, precision, batch))
            needs[f"{network}/{batch}"] = {job.code() for job in those}
            jobs += those
        new = set().union(*needs.values()) - before
        say(f"compiling {len(new)} kernels of {network} in {precision}")
        failed += [f"{job.kernel} {job.config}: {reason}" for job, reason in _filled(suite, jobs)]
    return {
        "precision": precision,
        "jobs": len(set().union(*needs.values())),
        "seconds": time.perf_counter() - start,
        "needs": {name: len(codes) for name, codes in needs.items()},
        "failed": failed,
    }


def _jobs(suite: Suite, network: str, precision: str, batch: int) -> Iterator[Job]:
    capability = suite.card.capability
    ways = (False, True) if capability >= FIRST_PDL and not suite.dry else (False,)
    for piece in kernels.pieces(suite.chain(network), batch):
        for config in piece.kernel.configs(suite.card):
            for pdl in ways:
                yield Job(piece.kernel, config, precision, capability, pdl)


def _filled(suite: Suite, jobs: list[Job]) -> list[tuple[Job, str]]:
    """A dry run compiles one kernel, in a process without the interpreter."""
    if not suite.dry:
        return fill_cache(jobs)
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return fill_cache(jobs[-1:])
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
