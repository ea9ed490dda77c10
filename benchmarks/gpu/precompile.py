"""Kernels compiled in parallel before anything is measured: loading a network finds them in Triton's cache."""

import os
import time
from collections.abc import Iterator

from gpu import kernels
from gpu.suite import COMPARE, MODEL, Suite, say
from rd_deploy.triton_kernels.compile import Job, fill_cache


def compile_all(suite: Suite, precision: str) -> dict:
    """Every configuration of every kernel that a plan of the networks of most parts may use; what failed.

    What else is needed is compiled where a session is loaded: launches that overlap, of the chosen plan alone, and
    plain-18. ``needs``: how many of the ``jobs`` a network needs at a batch; most are needed more than once.
    """
    start, jobs, needs = time.perf_counter(), [], {}
    for network in (MODEL,) if suite.dry else (MODEL, COMPARE):
        for batch in suite.batches:
            those = list(_jobs(suite, network, precision, batch))
            needs[f"{network}/{batch}"] = {job.code() for job in those}
            jobs += those
    count = len(set().union(*needs.values()))
    say(f"compiling {count} kernels in {precision}")
    failed = [f"{job.kernel} {job.config}: {reason}" for job, reason in _filled(suite, jobs)]
    return {
        "precision": precision,
        "jobs": count,
        "seconds": time.perf_counter() - start,
        "needs": {name: len(codes) for name, codes in needs.items()},
        "failed": failed,
    }


def _jobs(suite: Suite, network: str, precision: str, batch: int) -> Iterator[Job]:
    for piece in kernels.pieces(suite.chain(network), batch):
        for config in piece.kernel.configs(suite.card):
            yield Job(piece.kernel, config, precision, suite.card.capability, False)


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
