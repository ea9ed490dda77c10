"""What tests of several folders share. Triton's kernels run in its interpreter here, on the CPU: that has to be set
before triton is imported.
"""

import os
from functools import cached_property

import pytest

from rd_deploy.native.build import Build, BuildError, Compiler

os.environ["TRITON_INTERPRET"] = "1"


class EmulatingCompiler(Compiler):
    """Compiles the AMX kernels as plain code, and of the others the portable ones only."""

    @cached_property
    def isas(self) -> dict[str, tuple[str, ...]]:
        return {"portable": (), "amx_bf16": (), "amx_bf16x2": ()}


@pytest.fixture(scope="session")
def emulated_build():
    """Builds of the compiled engine with emulated tiles: ``emulated_build(sanitize)``."""
    try:
        compiler = EmulatingCompiler.find()
    except BuildError as reason:
        pytest.skip(str(reason))
    return lambda sanitize="": Build(compiler, sanitize, flags=("-DRD_EMULATE_TILES",))
