"""bf16 on CPUs that do not multiply it.

There torch falls back to loops that take about eleven times as long as fp32 (plain-20, AVX2). The same sums in fp32
are as fast as fp32, and what a machine without the instructions trains can stand beside what others train.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rd_deploy.common import UserError
from rd_train.recipe import Recipe

PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}


class Fp32Products(TorchDispatchMode):
    """While active, products of bf16 tensors are summed in fp32 and rounded to bf16 once.

    These are convolutions, products of matrices and the gradients of both. It is what instructions for bf16 do, but for
    the order of the sums and subnormal numbers (Intel, Architecture Instruction Set Extensions, VDPBF16PS: products
    of two bf16 are exact in fp32; subnormals count as zero). All else, and other types, are as they were.
    """

    def __torch_dispatch__(self, function: object, types: Sequence, args: tuple = (), kwargs: dict | None = None):
        """Run one operation of torch."""
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        found = function(*(value.float() if isinstance(value, Tensor) else value for value in args), **kwargs)
        if isinstance(found, Tensor):
            return found.bfloat16()
        return tuple(None if each is None else each.bfloat16() for each in found)


def torch_multiplies_bf16() -> bool:
    """Whether torch has bf16 convolutions made for this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulated(recipe: Recipe) -> bool:
    """Whether a settled recipe asks for bf16 where only `Fp32Products` makes it as fast as fp32."""
    return recipe.device == "cpu" and recipe.precision == "bf16" and not torch_multiplies_bf16()


def products(recipe: Recipe) -> contextlib.AbstractContextManager:
    """What a settled recipe's steps and evaluations run under: `Fp32Products` where bf16 is `emulated`, else nothing.

    Raises `UserError` where the recipe then also asks for torch.compile: Dynamo leaves alone what runs under a mode.
    """
    if not emulated(recipe):
        return contextlib.nullcontext()
    if recipe.compile:
        raise UserError(
            "this CPU does not multiply bf16, and what stands in for it cannot be compiled; "
            "use --precision fp32 or --compile false"
        )
    return Fp32Products()
