"""Several processes that train one network: started by torchrun, one per GPU, or on CPUs for trying it out.

Each takes its slice of every batch, and gradients are averaged: ``batch_size`` is that of all processes together.
Without torchrun there is one process: every function here then returns what it was given and sends nothing. All
processes must call them in the same order.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rd_deploy.common import Stopped, UserError, one_line, run_command

BEGUN = "rd-train has begun"
_of_launch: dist.Store | None = None  # what all attempts of a launch share: torchrun itself holds it


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def begin() -> None:
    """Tell later attempts of this launch that this one has begun a run (or to go on with one)."""
    if _of_launch is not None:
        _of_launch.set(BEGUN, "1")


def restarted() -> bool:
    """Whether torchrun started all processes again, because one of an earlier attempt that had begun a run died.

    An attempt that was refused had not: torchrun restarts it all the same, and the run that is there is not this one's.
    """
    again = launched() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    return again and (_of_launch is None or _of_launch.check([BEGUN]))


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; the first one alone prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def share() -> dict[str, int]:
    """What of the batches is for this process, as the functions of `rd_train.data` take it."""
    return {"rank": rank(), "world": world()}


def processes_here() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def device(kind: str) -> torch.device:
    """``cpu``, or ``cuda``: the GPU of this process, which becomes the current one; too few GPUs are a `UserError`."""
    if kind != "cuda" or not launched():
        return torch.device(kind)
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"{processes_here()} processes on a machine with {count} GPUs; start torchrun with --nproc-per-node {count}"
            if count
            else "device=cuda, but torch sees no GPU on one of the machines; use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


# --- a command in all processes


def run_together(name: str, command: Callable[[], int]) -> int:
    """`run_command` in every process that torchrun started; returns the exit code of this one.

    Only the first process has a stdout. Of an error, whichever process it hit first says one line; the others end with
    the same code, without a word. (torchrun then prints its own report, and exits with 1.)
    """
    global _of_launch
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # otherwise each attempt has a store of its own
        _of_launch = store
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # CPU tensors go by gloo, which makes no GPU wait; CUDA tensors by NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=count)
    with _stdout_of_the_first():
        code = run_command(name, lambda: _said_once(command, store))
    if code == 0:
        dist.destroy_process_group()
    return code


def leave(code: int) -> NoReturn:
    """End a process that trained with others, at once.

    DDP keeps the threads of the destroyed group running. As the interpreter is taken down, one of them can abort the
    process ("terminate called without an active exception"), and torchrun then reports a run that succeeded as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _stdout_of_the_first() -> Iterator[None]:
    if first():
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _said_once(command: Callable[[], int], store: dist.Store) -> int:
    """Run the command; of the processes that fail, the first one raises, the others return their exit code."""
    try:
        return command()
    except (Exception, KeyboardInterrupt) as error:
        if _lost_another(error):
            error = Stopped(f"another process ended, see torchrun's report ({one_line(error)[:160]})", code=1)
        if _is_first_to_fail(store):
            raise error
        return _exit_code(error)


def _lost_another(error: BaseException) -> bool:
    """Whether a collective failed, which it does when another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # its host is gone: better said twice than not at all
        return True


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | MemoryError) else 1


# --- what processes agree on


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(highest(int(flag)))


def highest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world() == 1:
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def barrier() -> None:
    """Wait until every process is here."""
    any_process(False)


def same_everywhere(number: int) -> bool:
    """Whether every process has the same number."""
    if world() == 1:
        return True
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])


def of_first(text: str) -> str:
    """The text that the first process has."""
    return _text_of(0, text)


def of_each(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    return [_text_of(number, text) for number in range(world())]


def _text_of(number: int, text: str) -> str:
    if world() == 1:
        return text
    characters = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(characters)])
    dist.broadcast(length, number)
    if rank() != number:
        characters = torch.empty(int(length), dtype=torch.uint8)
    if int(length):
        dist.broadcast(characters, number)
    return bytes(characters.tolist()).decode()


@contextlib.contextmanager
def one_per_machine_first(downloads: bool) -> Iterator[None]:
    """What ``downloads`` something runs in one process of each machine first, then in the others, who find it there."""
    if not downloads:
        yield
        return
    ahead = not launched() or os.environ["LOCAL_RANK"] == "0"
    if not ahead:
        barrier()
    yield
    if ahead:
        barrier()


def total(values: Tensor) -> Tensor:
    """The sum of a tensor on the CPU over the processes."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def totals(values: list[float]) -> list[float]:
    """Sums over the processes, in double precision."""
    return total(torch.tensor(values, dtype=torch.float64)).tolist()


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Make each tensor the mean over the processes, in place; float32 that is the same everywhere stays as it is."""
    tensors = list(tensors)
    if world() == 1 or not tensors:
        return
    where = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
    flat = torch.cat([tensor.to(where, torch.float64).flatten() for tensor in tensors])
    dist.all_reduce(flat)
    means = (flat / world()).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_statistics(module: nn.Module) -> None:
    """`average` the running statistics of every BN, which each process has from its own images."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    average(statistic for bn in norms for statistic in (bn.running_mean, bn.running_var))


# --- training


def data_parallel(task: nn.Module, step: Callable[..., dict]) -> Callable[..., dict]:
    """``step``, the task's forward (compiled or not), after which a backward leaves the mean of all gradients.

    A frozen teacher is no part of what DDP sees, nor are buffers (`average_statistics`). Weights become those of the
    first process.
    """
    if world() == 1:
        return step
    # One graph in all steps, or not: where a splice is drawn or none, say. Then a splice's connector may be left out.
    static = len(task.kinds()) == 1
    unused = not static and len(getattr(task, "connectors", ())) > 1
    if unused:  # steps with all of them come first, of which DDP would say that nothing is unused
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(_Trained(task, step), static_graph=static, find_unused_parameters=unused)


class _Trained(nn.Module):
    """The parameters of a task that train, and a forward that is the task's."""

    def __init__(self, task: nn.Module, step: Callable[..., dict]):
        super().__init__()
        for name, parameter in task.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)
        self._step = [step]  # in a list: the task with its teacher must not become a part

    def forward(self, *arguments, **options) -> dict:
        return self._step[0](*arguments, **options)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BN by the statistics of all processes' images together, in steps that train.

    torch's own does without CPUs, and without the spliced stages, whose BN is on batch statistics in evaluation mode.
    Without gradients (recalibration, an identity start) every process sees the same images and needs nobody else.
    """

    def forward(self, x: Tensor) -> Tensor:
        on_batch = self.training or self.running_mean is None
        if not (on_batch and torch.is_grad_enabled() and world() > 1):
            return super().forward(x)
        var, mean = torch.var_mean(x.to(self.weight.dtype), dim=(0, 2, 3), correction=0)
        parts = x.new_zeros((world(), 2, len(mean)), dtype=mean.dtype)
        parts[rank()] = torch.stack([mean, var])
        means, variances = _Sum.apply(parts).unbind(1)  # each process adds its own row
        mean = means.mean(0)
        var = (variances + (means - mean) ** 2).mean(0)
        if self.training:
            self._follow(mean.detach(), var.detach(), world() * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes, and so of its gradients."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def synchronise_bn(module: nn.Module) -> None:
    """Let every BN of a network or task, in place, be a `SyncBatchNorm2d`; before a task makes views of its teacher."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncBatchNorm2d
