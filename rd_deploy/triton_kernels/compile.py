"""Compile launches ahead of time, without a GPU, and read what they need of one.

    python -m rd_deploy.triton_kernels.compile --help

The compiled code lands in Triton's cache, so a later run on a GPU of that capability need not compile it again.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from rd_deploy.triton_kernels.launch import ELEMENT, INTERPRETED, Launch

ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: ``registers`` per thread; bytes ``shared`` per block and ``spilled`` per thread.

    ``serialized``: ptxas could not keep the tensor cores' products asynchronous (its warning C7510 and kin).
    ``tensor_ops``: which instruction multiplies matrices ("wgmma", "tcgen05", "mma" or "").
    """

    registers: int
    shared: int
    spilled: int
    serialized: bool
    tensor_ops: str


def compile_launch(launch: Launch, element: str, capability: int) -> Resources:
    """Compile for ``element`` ("fp16" or "bf16") and ``capability`` (90 for sm_90). Raises triton's own errors."""
    if INTERPRETED:
        raise RuntimeError("kernels under TRITON_INTERPRET cannot be compiled: use another process")
    kernel = triton.compile(
        _source(launch, element), target=GPUTarget("cuda", capability, 32), options=_options(launch)
    )
    log = _ptxas(kernel.asm["ptx"], capability)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    found = [name for name in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{name}\.(mma|sync)", kernel.asm["ptx"])]
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        shared=kernel.metadata.shared,
        spilled=max(spills, default=0),
        serialized="serialized" in log,
        tensor_ops=found[0] if found else "",
    )


def _options(launch: Launch) -> dict:
    return {"num_warps": launch.warps} | ({"launch_pdl": True} if launch.constants["PDL"] else {})


def _source(launch: Launch, element: str) -> ASTSource:
    """As triton's launcher would make it for these arguments, so that its cache finds the result again."""
    types = {name: "*" + (element if kind == ELEMENT else kind) for name, kind in launch.tensors.items()}
    signature = {}
    for name in launch.kernel.arg_names:
        signature[name] = types.get(name) or ("i32" if name in launch.numbers else "constexpr")
    aligned = {(index,): ALIGNED for index, name in enumerate(launch.kernel.arg_names) if name in launch.tensors}
    return ASTSource(launch.kernel, signature, dict(launch.constants), aligned)


def _ptxas(ptx: str, capability: int) -> str:
    """What NVIDIA's assembler says of a kernel; triton brings it along."""
    arch = sm_arch_from_capability(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
