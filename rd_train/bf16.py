"""bf16 on CPUs that do not multiply it.

There torch falls back to loops that take about eleven times as long as fp32 (plain-20, AVX2), or oneDNN to code that
unpacks. The same products in fp32 take as long as fp32, and what such a machine trains can stand beside what others do.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rd_deploy.bench.environment import cpu

EMULATED = "bf16-emulated"  # the precision of a recipe
PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}


class Fp32Products(TorchDispatchMode):
    """While active, products of bf16 tensors are summed in fp32 and rounded to bf16 once.

    These are convolutions, products of matrices and the gradients of both. oneDNN rounds once too where x86 has
    instructions for bf16, which add in fp32 (in another order, and with subnormals as zero: Intel, Architecture
    Instruction Set Extensions, VDPBF16PS). All else, and other types, are as they were. Not under
    ``torch.inference_mode``, which hides convolutions and linear layers behind their composite operations.
    """

    def __torch_dispatch__(self, function: object, types: Sequence, args: tuple = (), kwargs: dict | None = None):
        """Run one operation of torch."""
        kwargs = kwargs or {}
        if function not in PRODUCTS or any(
            value.dtype != torch.bfloat16 for value in args if isinstance(value, Tensor)
        ):
            return function(*args, **kwargs)
        found = function(*(value.float() if isinstance(value, Tensor) else value for value in args), **kwargs)
        if isinstance(found, Tensor):
            return found.bfloat16()
        return tuple(None if each is None else each.bfloat16() for each in found)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16, and this torch uses them."""
    has = bool({"amx_bf16", "avx512_bf16", "bf16"} & set(cpu()["flags"]))  # "bf16" is Arm's name
    return has and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gpu_multiplies_bf16() -> bool:
    """Whether the current GPU multiplies bf16; torch's own answer is yes for those that only convert it, too."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def products(*, emulated: bool) -> contextlib.AbstractContextManager:
    """What products of bf16 run under: `Fp32Products`, or nothing."""
    return Fp32Products() if emulated else contextlib.nullcontext()
