"""Kernels compiled in parallel before anything is measured: loading a network finds them in Triton's cache."""

import os
import time
from collections.abc import Iterable

from gpu import kernels
from gpu.suite import COMPARE, MODEL, Suite, say
from rd_deploy.triton_kernels.compile import Job, fill_cache

FIRST_PDL = 90  # the capability from which programmatic dependent launch exists


def compile_all(suite: Suite, precision: str) -> dict:
    """Every configuration of every kernel that a plan of our networks may use, plain-50's first; what failed."""
    start, done, failed = time.perf_counter(), set(), []
    for network in dict.fromkeys((MODEL, COMPARE, *suite.checked)) if not suite.dry else (MODEL,):
        jobs = list(_new(_jobs(suite, network, precision), done))
        say(f"compiling {len(jobs)} kernels of {network} in {precision}")
        failed += _filled(suite, jobs)
    return {"precision": precision, "jobs": len(done), "seconds": time.perf_counter() - start, "failed": failed}


def _jobs(suite: Suite, network: str, precision: str) -> Iterable[Job]:
    chain, capability = suite.chain(network), suite.card.capability
    for batch in suite.batches:
        for piece in kernels.pieces(chain, batch):
            configs = piece.kernel.configs(suite.card)
            for config in configs:
                yield Job(piece.kernel, config, precision, capability)
            if capability >= FIRST_PDL:
                yield Job(piece.kernel, configs[0], precision, capability, pdl=True)


def _new(jobs: Iterable[Job], done: set) -> Iterable[Job]:
    """Those whose code is another than that of the jobs before: it does not depend on the batch."""
    for job in jobs:
        launch = job.launch()
        code = (launch.kernel.__name__, *map(str, (launch.tensors, launch.constants, launch.warps)), job.element)
        if code not in done:
            done.add(code)
            yield job


def _filled(suite: Suite, jobs: list[Job]) -> list[str]:
    """A dry run compiles one kernel, in a process without the interpreter."""
    if not suite.dry:
        return fill_cache(jobs)
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return fill_cache(jobs[-1:])
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
