"""What the kernels share: how one is launched, what one costs, and three device functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rd_deploy.chain import Step
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import Card

# Kernels run in Triton's interpreter, on the CPU; decided by TRITON_INTERPRET when triton is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
# Triton 3.8 always gives it, "to work around ptxas 13.x bug"; 3.6 does not know that assembler.
PTXAS_OPTIONS = "--regAllocOptLevel=2"
FIRST_PDL = 90  # the capability from which programmatic dependent launch exists
MAX_ELEMENTS = 2**31  # of one tensor: kernels count in 32 bits

ELEMENT = "element"  # fp16 or bf16, whatever the network is compiled for


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32; the interpreter's product of bf16 is wrong, so it multiplies in fp32 there."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, acc)


@triton.jit
def relu(x):
    """max(x, 0); what is not a number stays so, as in torch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def begin(PDL: tl.constexpr):
    """Every kernel's first call. ``PDL``: programmatic dependent launch (CUDA's term, from sm_90 on).

    With it the next kernel's blocks may be scheduled while this one still runs, which hides the launch; their own
    ``gdc_wait`` then waits until this kernel has finished and its stores can be seen. So the order of all reads and
    writes is that of a plain stream, as long as nothing but constants is touched before this call.
    """
    if PDL and not _INTERPRETED:
        gdc_wait()
        gdc_launch_dependents()


@dataclass(frozen=True)
class Launch:
    """One kernel launch before any memory exists: all that compiling it and running it need.

    ``tensors``: the pointer parameters, each ``ELEMENT``, "fp32" or "i32", aligned to 16 bytes. ``numbers``: parameters
    of 32 bits known at launch. ``constants``: compile-time parameters, PDL among them. ``warps``: of 32 threads.
    """

    kernel: Any
    grid: tuple[int, ...]
    tensors: Mapping[str, str]
    numbers: Mapping[str, int]
    constants: Mapping[str, int | bool]
    warps: int

    def run(self, operands: Mapping[str, Any]) -> None:
        """Launch on the current stream; ``operands``: a torch tensor for each of ``tensors``."""
        tensors = {name: operands[name] for name in self.tensors}
        self.kernel[self.grid](**tensors, **self.numbers, **self.constants, **self.options())

    def options(self) -> dict:
        """What Triton calls compile options."""
        options = {"num_warps": self.warps} | ({"launch_pdl": True} if self.constants["PDL"] else {})
        return options if INTERPRETED else options | {"ptx_options": PTXAS_OPTIONS}


@dataclass(frozen=True)
class Work:
    """What one launch asks of a GPU, counted from shapes and configuration.

    ``flops``: useful operations, 2 per multiply-accumulate. ``issued_flops``: with what tiles compute twice or for
    padding. ``map_bytes``: feature maps read and written, each once; ``weight_bytes``: likewise; together the least
    that DRAM must move when nothing stays in the L2 cache. ``l2_bytes``: all that blocks ask of the L2 cache.
    ``blocks``: in the grid. ``shared_bytes``: estimated shared memory of one block, ``registers``: of one thread.
    """

    flops: int
    issued_flops: int
    map_bytes: int
    weight_bytes: int
    l2_bytes: int
    blocks: int
    warps: int
    shared_bytes: int
    registers: int


class Kernel(Protocol):
    """What the frozen dataclass of a kernel's shapes offers; every method is pure and needs no GPU.

    Configurations are frozen dataclasses of integers, so that `dataclasses.asdict` makes JSON of them. ``source`` and
    other map operands are (N, H, W, C); operand names are the kernel's parameter names; "out" is what it writes.
    """

    def check(self) -> None:
        """Raise `UserError` with one line if this kernel has no words for these shapes."""

    def configs(self, card: Card) -> tuple[Any, ...]:
        """Configurations worth timing on a card, all within its shared memory and registers."""

    def launch(self, config: Any, pdl: bool = False) -> Launch: ...

    def work(self, config: Any) -> Work: ...

    def predict(self, config: Any, card: Card) -> Any:
        """Modelled time of one launch: a `rd_deploy.triton_kernels.cost.Prediction`."""

    def scratch(self, config: Any) -> dict[str, tuple[str, int]]:
        """Operands besides maps and weights, (type, elements); those of type "i32" are zero before the first run."""

    def weights(self, *steps: Step) -> dict[str, np.ndarray]:
        """The weights of the steps that this kernel computes, as its operands: float32, in the order it reads."""


def check_size(elements: int) -> None:
    """Raise `UserError` for a map that 32 bits cannot count."""
    if elements >= MAX_ELEMENTS:
        raise UserError("a map has 2^31 elements or more: use a smaller batch")


def is_taken(kernel: Kernel) -> bool:
    """Whether a kernel has words for its shapes."""
    try:
        kernel.check()
    except UserError:
        return False
    return True
