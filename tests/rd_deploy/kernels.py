"""What the tests of GPU kernels share: operands with guards around them, a run that checks them, an error."""

import torch

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
GUARD = 64  # elements on both sides of every operand


def guarded(values, fill):
    """A view of the same values with ``fill`` on both sides of it, and the whole buffer."""
    buffer = torch.full((values.numel() + 2 * GUARD,), fill, dtype=values.dtype)
    view = buffer[GUARD:-GUARD].view(values.shape)
    view.copy_(values)
    return view, buffer


def with_guards(operands, element):
    """Maps and weights in their types, biases in fp32; beside each lies what is not a number, so that a read shows."""
    types = {name: TYPES["fp32" if name.startswith("b") else element] for name in operands}
    return {name: guarded(values.to(types[name]), float("nan"))[0] for name, values in operands.items()}


def run_guarded(kernel, config, operands, shape, dtype=None):
    """The output of that shape; what surrounds it must stay as it was."""
    kernel.check()
    out, buffer = guarded(torch.full(shape, -5.0, dtype=dtype or operands["x"].dtype), 7.0)
    kernel.launch(config).run({**operands, "out": out})
    assert (buffer[:GUARD] == 7).all()
    assert (buffer[-GUARD:] == 7).all()
    return out


def error(got, wanted):
    """Largest, relative to the largest output."""
    return float((got.double() - wanted).abs().max() / wanted.abs().max())
