"""Every GPU kernel against its chain steps in float64, within a bound that rounding cannot exceed.

The reference is computed from the steps and not from the kernel's own operands, so that packing is checked too. The
bound is carried along element by element (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3): a product
sum of K terms in fp32 is off by at most K * 2^-23 of the sum of magnitudes, what is stored or fed to the next product
rounds by half a unit of the precision, and errors of the input pass through a convolution of the magnitudes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, MaxPool
from rd_deploy.common import first_line
from rd_deploy.cuda.tune import MOST_LOST
from rd_deploy.helper import Fatal, Lost
from rd_deploy.triton_kernels.launch import ELEMENT, INTERPRETED, is_taken

ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # half a unit in the last place, relative
INTERPRETER = {"fp16": 1, "bf16": 2}  # times that: Triton's interpreter chops what it converts to bf16
SMALLEST = {"fp16": 2.0**-25, "bf16": 0.0}  # half of the smallest subnormal number
SUM = 2.0**-23  # per term of a sum in fp32, whatever its order, chopped rather than rounded
GUARD = 4096  # elements behind a kernel's output that it must leave alone


def pieces(chain: Chain, batch: int) -> Iterator[Any]:
    """What kernels can compute in a chain, each kernel once."""
    from rd_deploy.cuda.plan import places

    seen = set()
    for ways in places(chain, batch):
        for piece in (piece for way in ways for piece in way):
            if piece.kernel not in seen and is_taken(piece.kernel):
                yield piece
            seen.add(piece.kernel)


def added(piece: Any) -> str | None:
    """The name of what the piece's last step adds."""
    last = piece.steps[-1]
    return last.add if isinstance(last, Conv) else None


@dataclass
class Check:
    """Runs a kernel's configurations one by one, on random maps. Can be sent to a process of its own.

    Called with (kernel, configuration, whether with ``pdl`` as well) it returns the error in units of its bound and
    what is wrong. A broken context is `Fatal`.
    """

    chain: Chain
    batch: int
    precision: str
    device: str
    _at_work: tuple | None = None  # kernel, its piece, inputs, expected values, their bound

    def __getstate__(self) -> dict:
        """Without what lies on a device."""
        return vars(self) | {"_at_work": None}

    def __call__(self, choice: tuple[Any, Any, bool]) -> tuple[float, list[str]]:
        from rd_deploy.cuda.trial import context_is_lost, use

        use(self.device)
        kernel, config, pdl = choice
        try:
            return self._checked(kernel, config, pdl)
        except RuntimeError as error:
            if context_is_lost():
                raise Fatal(f"it broke the GPU's context: {first_line(error)}") from error
            raise

    def _checked(self, kernel: Any, config: Any, pdl: bool) -> tuple[float, list[str]]:
        from rd_deploy.cuda.trial import wait

        if self._at_work is None or self._at_work[0] != kernel:
            self._at_work = None  # first let the last one's memory go
            piece = next(piece for piece in pieces(self.chain, self.batch) if piece.kernel == kernel)
            inputs = _inputs(piece, self.chain, self.batch, self.precision, self.device)
            try:
                self._at_work = kernel, piece, inputs, *bounded(piece.steps, *inputs, self.precision)
                wait()
            except RuntimeError as error:
                self._at_work = None
                raise RuntimeError(f"its reference: {first_line(error)}") from error
        _, piece, inputs, expected, bound = self._at_work
        first, again, faults = _run(piece, config, inputs, expected.numel(), self.precision, False)
        share = _share(first, expected, bound)
        faults += [f"off by {share:.3g} times its bound"] if not share <= 1 else []
        faults += [] if _equal(first, again) else ["two runs differ"]
        if pdl:
            overlapped, twice, more = _run(piece, config, inputs, expected.numel(), self.precision, True)
            faults += more
            faults += [] if _equal(first, overlapped) and _equal(first, twice) else ["differs with PDL"]
        return share, faults


def check(ask: Callable[[tuple], tuple[float, list[str]]], piece: Any, configs: tuple, pdl: bool) -> dict:
    """Run every configuration twice by ``ask``, a `Check` or one in a `Helper`, with ``pdl`` as well; the largest
    error in units of its bound.
    """
    shares, wrong, lost = [], [], 0
    for config in configs:
        try:
            if lost >= MOST_LOST:
                raise Lost(f"not checked, since {MOST_LOST} configurations were lost")
            share, faults = ask((piece.kernel, config, pdl))
            shares.append(share)
        except (Lost, RuntimeError) as error:
            faults = [str(error)]
            lost += isinstance(error, Lost)
        wrong += [{"config": str(config), "faults": faults}] if faults else []
    finite = [share for share in shares if np.isfinite(share)]
    return {"configs": len(configs), "error_of_bound": max(finite, default=None), "wrong": wrong}


def _inputs(piece: Any, chain: Chain, batch: int, precision: str, device) -> tuple:
    """Random x and, if the last step adds, what it adds; (N, H, W, C) in the precision."""
    import torch

    shapes, shortcut = chain.shapes(), added(piece)
    generator = torch.Generator(device).manual_seed(0)

    def random(name: str):
        channels, height, width = [*shapes[name], 1, 1][:3]
        values = torch.randn(batch, height, width, channels, generator=generator, device=device)
        return (values if name == INPUT else values.relu_()).to(_dtype(precision))

    return random(piece.steps[0].source), None if shortcut is None else random(shortcut)


def bounded(steps: tuple, x, add, precision: str) -> tuple:
    """Chain steps of ``x`` (N, H, W, C) in float64, and what a right kernel may be off by; both flat, in NHWC order."""
    import torch
    from torch.nn import functional as F

    unit, smallest = ROUNDING[precision] * (INTERPRETER[precision] if INTERPRETED else 1), SMALLEST[precision]
    value = x.double().permute(0, 3, 1, 2)
    error = torch.zeros_like(value)
    for step in steps:
        if isinstance(step, MaxPool):
            window = (step.kernel, step.stride, step.padding)
            value, error = F.max_pool2d(value, *window), F.max_pool2d(error, *window)
        elif isinstance(step, GlobalAveragePool):
            terms = value.shape[2] * value.shape[3] + 2
            error = error + terms * SUM * (value.abs() + error)
            value, error = (tensor.mean((2, 3), keepdim=True) for tensor in (value, error))
        else:
            value, error = _product(step, value, error, add if step is steps[-1] else None, precision)
        error = error + unit * (value.abs() + error) + smallest
    return tuple(tensor.permute(0, 2, 3, 1).flatten() for tensor in (value, error))


def _product(step, value, error, add, precision: str) -> tuple:
    """A convolution or a classifier on a value and on its error."""
    import torch
    from torch.nn import functional as F

    convolution = isinstance(step, Conv)
    window = (step.stride, step.padding) if convolution else (1, 0)
    matrix = step.weight if convolution else step.weight[:, :, None, None]
    weight = torch.from_numpy(matrix.astype(np.float32)).to(value.device, _dtype(precision)).double()
    bias = torch.from_numpy(step.bias.astype(np.float32)).to(value.device).double()
    magnitude = F.conv2d(value.abs() + error, weight.abs(), bias.abs(), *window)
    error = F.conv2d(error, weight.abs(), None, *window)
    value = F.conv2d(value, weight, bias, *window)
    if add is not None:
        shortcut = add.double().permute(0, 3, 1, 2)
        value, magnitude = value + shortcut, magnitude + shortcut.abs()
    error = error + (weight[0].numel() + 4) * SUM * magnitude
    return (value.relu() if convolution and step.relu else value), error


def _run(piece: Any, config: Any, inputs: tuple, elements: int, precision: str, pdl: bool) -> tuple:
    """Two runs one right after the other on the same scratch memory, and what is wrong with them.

    That is what was written where it must not be, and for a sum other results when it is written over what it adds.
    """
    import torch

    from rd_deploy.cuda.session import pack

    launch = piece.kernel.launch(config, pdl)
    x, add = inputs
    types = {ELEMENT: _dtype(precision), "fp32": torch.float32, "i32": torch.int32}
    fixed = {"x": x} | ({} if add is None else {"add": add})
    for name, values in pack(piece, precision, launch).items():
        fixed[name] = torch.from_numpy(np.ascontiguousarray(values)).to(x.device, types[launch.tensors[name]])
    for name, (kind, count) in piece.kernel.scratch(config).items():
        fixed[name] = torch.zeros(count, dtype=types[kind], device=x.device)
    kind = types[launch.tensors["out"]]
    outs = [torch.full((elements + GUARD,), float("nan"), dtype=kind, device=x.device) for _ in range(3)]
    for out in outs[:2]:
        launch.run(fixed | {"out": out})
    if add is not None:
        outs[2][:elements] = add.flatten()
        launch.run(fixed | {"add": outs[2], "out": outs[2]})
    touched = not all(bool(out[elements:].isnan().all()) for out in outs)
    first, again, in_place = (out[:elements] for out in outs)
    faults = ["wrote behind its output"] if touched else []
    faults += ["differs in place"] if add is not None and not _equal(first, in_place) else []
    return first, again, faults


def _share(found, expected, bound) -> float:
    """The largest error in units of its bound; infinite for what is not a number."""
    share = (found.double() - expected).abs() / bound.clamp_min(1e-300)
    return float(share.nan_to_num(nan=float("inf")).max())


def _equal(first, second) -> bool:
    """Bit by bit."""
    import torch

    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _dtype(precision: str):
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
