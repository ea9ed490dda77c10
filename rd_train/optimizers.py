"""The optimiser of a recipe: SGD with Nesterov momentum for everything, or Muon for the kernels of convolutions.

``initial_lr`` of a parameter group is its peak learning rate, as in torch's schedulers; the loop sets its ``lr``.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from rd_train import bf16
from rd_train.recipe import Recipe

NEWTON_SCHULZ = 5  # iterations of Muon


class KernelMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) on kernels (C_out, C_in, k, k), each as the (C_out, C_in·k·k) that multiplies patches.

    A step moves a kernel along its momentum with all singular values made equal, however unequal those of the gradient
    are. torch's Muon takes matrices only: here they are views of the kernels' memory, which must stay where it is. It
    multiplies in bf16 whatever the recipe's precision is: on a CPU without it, by products in fp32 (see `bf16`).
    """

    def __init__(self, kernels: list[nn.Parameter], **options):
        self.kernels = kernels
        self.emulated = kernels[0].device.type == "cpu" and not bf16.cpu_multiplies_bf16()
        super().__init__([nn.Parameter(_matrix(kernel.detach(), kernel)) for kernel in kernels], **options)

    @torch.no_grad()
    def step(self) -> None:
        matrices = [matrix for group in self.param_groups for matrix in group["params"]]
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            if matrix.data_ptr() != kernel.data_ptr():
                raise RuntimeError("a kernel was moved after its optimiser was made")
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad, kernel)
        with bf16.products(emulated=self.emulated):
            super().step()
        for matrix in matrices:
            matrix.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the kernels' gradients; they are always set to None."""
        for kernel in self.kernels:
            kernel.grad = None


def muon_kernels(recipe: Recipe, task: nn.Module) -> list[nn.Parameter]:
    """The kernels that Muon moves: the student's. A teacher that learns beside it, and connectors, learn by SGD."""
    if recipe.optimizer != "muon":
        return []
    return [parameter for parameter in task.student.parameters() if parameter.requires_grad and parameter.ndim == 4]


def _matrix(x: Tensor, kernel: Tensor) -> Tensor:
    """``x`` of a kernel's shape as a matrix, in the order of the kernel's memory; a view where it has that order."""
    if kernel.is_contiguous():
        return x.contiguous().view(len(x), -1)
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(len(x), -1)


class Several:
    """Optimisers of different parameters as one, as far as the loop uses it."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict:
        return dict(chain.from_iterable(part.state.items() for part in self.parts))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)


def build_optimizer(recipe: Recipe, task: nn.Module) -> torch.optim.SGD | Several:
    """The optimiser of the task's trainable parameters; BN and biases are not decayed unless asked for.

    With Muon, SGD has what is no kernel of a convolution; Muon's decay is its own (of the weights, lr · decay a step).
    """
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    kernels = muon_kernels(recipe, task)
    by_muon = set(kernels)
    others = [parameter for parameter in trained if parameter not in by_muon]
    decayed = [parameter for parameter in others if parameter.ndim > 1 or recipe.decay_bn_bias]
    free = [parameter for parameter in others if not (parameter.ndim > 1 or recipe.decay_bn_bias)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )
    if kernels:
        options = {"weight_decay": recipe.muon_decay, "momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
        muon = KernelMuon(kernels, lr=recipe.muon_lr, ns_steps=NEWTON_SCHULZ, **options)
        optimizer = Several(optimizer, muon)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
