"""Compile launches ahead of time, without a GPU, and read what they need of one.

The compiled code lands in Triton's cache, so a later run on a GPU of that capability need not compile it again.
`benchmarks/gpu_resources.py` does this for whole networks and cards.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime.driver import driver

from rd_deploy.common import first_line
from rd_deploy.cpus import available_threads
from rd_deploy.triton_kernels.assembler import use_assembler
from rd_deploy.triton_kernels.launch import ELEMENT, INTERPRETED, PTXAS_OPTIONS, Kernel, Launch


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: ``registers`` per thread; bytes ``shared`` per block and ``spilled`` per thread.

    ``serialized``: ptxas could not keep the tensor cores' products asynchronous (its warning C7510 and kin).
    ``tensor_ops``: which instruction multiplies matrices ("wgmma", "tcgen05", "mma" or ""). ``assembler``: ptxas's
    release. ``stack_misused``: the machine code takes the stack pointer for a number (`misuses_stack`).
    """

    registers: int
    shared: int
    spilled: int
    serialized: bool
    tensor_ops: str
    assembler: str
    stack_misused: bool


def compile_launch(launch: Launch, element: str, capability: int) -> Resources:
    """Compile for ``element`` ("fp16" or "bf16") and ``capability`` (90 for sm_90). Raises triton's own errors."""
    kernel = compiled(launch, element, capability)
    log = _ptxas(kernel.asm["ptx"], capability)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    found = [name for name in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{name}\.(mma|sync)", kernel.asm["ptx"])]
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        shared=kernel.metadata.shared,
        spilled=max(spills, default=0),
        serialized="serialized" in log,
        tensor_ops=found[0] if found else "",
        assembler=get_ptxas(capability).version,
        stack_misused=misuses_stack(_disassembled(kernel.asm["cubin"])),
    )


def compiled(launch: Launch, element: str, capability: int):
    """Triton's compiled kernel, from its cache if it is there.

    Triton's own launcher makes it, as for tensors on such a GPU, so that a launch there finds the same cache entry. For
    that it is told for the rest of the process that there is such a GPU: a process that compiles must not launch.
    """
    import torch

    if INTERPRETED:
        raise RuntimeError("kernels under TRITON_INTERPRET cannot be compiled: use another process")
    types = {ELEMENT: {"fp16": torch.float16, "bf16": torch.bfloat16}[element]}
    types |= {"fp32": torch.float32, "i32": torch.int32}
    use_assembler(capability)
    values = (
        {name: types[kind] for name, kind in launch.tensors.items()} | dict(launch.numbers) | dict(launch.constants)
    )
    driver.set_active(_NoGpu(capability))
    arguments = (values[name] for name in launch.kernel.arg_names)
    return launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options())


class _NoGpu:
    """A driver for the launcher that only says what to compile for; the launcher keeps kernels apart by device."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Job:
    """A kernel to compile, as it can be sent to another process."""

    kernel: Kernel
    config: Any
    element: str
    capability: int
    pdl: bool = False

    def launch(self) -> Launch:
        return self.kernel.launch(self.config, self.pdl)

    def code(self) -> tuple:
        """What the compiled code depends on; batches share it."""
        launch = self.launch()
        name = launch.kernel.__name__
        return name, str(launch.tensors), str(launch.constants), launch.warps, self.element, self.capability


_in_cache: set[tuple] = set()  # the code of jobs that this process has had compiled


def fill_cache(jobs: Iterable[Job]) -> list[tuple[Job, str]]:
    """Compile in parallel into Triton's cache what this process has not had compiled; returns what failed, and why.

    A `UserError` where no assembler is right for a card; the one that is found is this process's, too
    (`rd_deploy.triton_kernels.assembler`).
    """
    jobs = list(jobs)
    for capability in {job.capability for job in jobs}:
        use_assembler(capability)
    codes = {job: job.code() for job in jobs}
    new: dict[tuple, Job] = {}
    for job, code in codes.items():
        if code not in _in_cache:
            new.setdefault(code, job)
    reasons = dict(zip(new, in_parallel(_reason, new.values()), strict=True))
    _in_cache.update(code for code, reason in reasons.items() if reason is None)
    return [(job, reasons[code]) for job, code in codes.items() if reasons.get(code)]


def resources(jobs: Iterable[Job]) -> list[Resources | str]:
    """What each job's kernel needs, compiled in parallel, or a line that says why it does not compile."""
    return in_parallel(_resources, jobs)


def in_parallel(function: Callable[[Job], Any], jobs: Iterable[Job]) -> list:
    """Results in the order of the jobs; processes are spawned, and touch no GPU.

    A compiler that aborts takes its process, and with it the pool, along: then each job left gets a process of its own,
    and those that abort once more a line as their result.
    """
    jobs = list(jobs)
    workers = min(available_threads(), len(jobs))
    if not jobs:
        return []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        return [_result(future, function, job) for future, job in zip(futures, jobs, strict=True)]


def _result(future: Future, function: Callable[[Job], Any], job: Job) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(function, job).result()
        except BrokenProcessPool:
            return "the compiling process died (or a script without `if __name__ == '__main__'` called this)"


def _resources(job: Job) -> Resources | str:
    try:
        return compile_launch(job.launch(), job.element, job.capability)
    except Exception as error:  # a compiler's own classes
        return first_line(error)


def _reason(job: Job) -> str | None:
    """Why a job does not compile; None: it does."""
    try:
        compiled(job.launch(), job.element, job.capability)
    except Exception as error:  # a compiler's own classes; the kernel's other configurations can still be used
        return first_line(error)
    return None


def misuses_stack(sass: str) -> bool:
    """Whether machine code (as nvdisasm prints it) uses the stack pointer R1 for anything but the stack.

    Nothing of ours has an address there. ptxas 12.8 takes R1 for zero in some kernels, and adds it to what tells a
    product where in shared memory its operand lies.
    """
    found = [
        match[1] for line in sass.splitlines() if (match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?(.+?)\s*;", line))
    ]
    if not found:
        raise ValueError("no machine code")
    uses = [line for line in found if re.search(r"\bR1\b", line)]
    return any(not re.match(r"[\w.]+ R1, |(LDL|STL)[\w.]* .*\[R1\b", line) for line in uses)


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ptxas(ptx: str, capability: int) -> str:
    """What NVIDIA's assembler says of a kernel; triton brings it along."""
    arch = sm_arch_from_capability(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            PTXAS_OPTIONS,
            f"--gpu-name={arch}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
