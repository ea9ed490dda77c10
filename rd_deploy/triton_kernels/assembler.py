"""Which of NVIDIA's assemblers (ptxas) makes machine code of what Triton compiles.

For Hopper Triton brings 12.8 or 12.9 along (triton 3.6 to 3.8). Of kernels with several wgmma products these make wrong
code. 12.8 takes the stack pointer for zero in what tells a product where in shared memory its operand lies: so in one
of the stem's eight configurations for batch 32, and the stem did break an H200's context. With one and the same PTX of
others, 12.8 and 13.0 failed and 13.1 did not (fla-org/flash-linear-attention, pull request 1262); that registers are
overwritten which a product still reads is mended in 13.3 (triton's pull request 11781). So for sm_90 an assembler from
13.3 on is looked for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.nvidia import compiler as nvidia

from rd_deploy.common import UserError

VARIABLE = "TRITON_PTXAS_PATH"  # triton's own, for all cards before sm_100
TOOLKIT = "/usr/local/cuda"
HOPPER, MENDED = 90, (13, 3)
LEAST = ".".join(map(str, MENDED))
BUNDLED = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def use_assembler(capability: int) -> None:
    """From now on, let this process and those that it starts assemble for a capability with what is known to be right.

    What ``TRITON_PTXAS_PATH`` names is kept if it is (torch sets that variable, too). `UserError` where there is none.
    """
    if capability != HOPPER:
        return
    given = os.environ.get(VARIABLE)
    if given in _right_ones or (given and (version_of(Path(given)) or (0, 0)) >= MENDED):
        _right_ones.add(given)
        return
    os.environ[VARIABLE] = _found(capability)
    if given:
        warnings.warn(f"{VARIABLE}={given} is not ptxas {LEAST} or later: {os.environ[VARIABLE]} is used", stacklevel=2)
    nvidia.get_ptxas_version.cache_clear()  # triton's cache of kernels tells assemblers apart by it


_right_ones: set[str] = set()  # which need not be asked again


def _found(capability: int) -> str:
    found = {path: version for path in _candidates() if (version := version_of(path)) is not None}
    for path, version in found.items():
        if version >= MENDED:
            _right_ones.add(str(path))
            return str(path)
    seen = ", ".join(f"{'.'.join(map(str, version))} in {path}" for path, version in found.items())
    raise UserError(
        f"sm_{capability} needs NVIDIA's assembler ptxas {LEAST} or later (found: {seen or 'none'}), because earlier "
        f"ones make wrong code of several wgmma products: pip install 'nvidia-cuda-nvcc>={LEAST}' or set {VARIABLE}"
    )


def _candidates() -> Iterator[Path]:
    """What was asked for, triton's two (the second is for Blackwell), NVIDIA's package, a CUDA toolkit."""
    if given := os.environ.get(VARIABLE):
        yield Path(given)
    yield from (BUNDLED / "ptxas", BUNDLED / "ptxas-blackwell")
    package = importlib.util.find_spec("nvidia")
    for place in package.submodule_search_locations or () if package else ():
        yield from sorted(Path(place).glob("cu*/bin/ptxas"), reverse=True)
    yield from (Path(home) / "bin" / "ptxas" for home in (os.environ.get("CUDA_HOME"), TOOLKIT) if home)
    if found := shutil.which("ptxas"):
        yield Path(found)


def version_of(path: Path) -> tuple[int, int] | None:
    """An assembler's release; None where there is no such program or it says none."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None
