"""What the tests of GPU kernels share: operands with guards around them, a run that checks them, an error."""

import dataclasses
import json

import numpy as np
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


def checked_configs(kernel, card):
    """Each configuration that a kernel offers for a card, with work and launch, after what holds for all of them."""
    kernel.check()
    configs = kernel.configs(card)
    assert 1 <= len(set(configs)) == len(configs) <= 8
    json.dumps([dataclasses.asdict(config) for config in configs])
    for config in configs:
        work, launch = kernel.work(config), kernel.launch(config, pdl=True)
        assert work.shared_bytes <= card.shared_bytes
        assert work.issued_flops >= work.flops > 0
        assert work.blocks == np.prod(launch.grid)
        assert kernel.predict(config, card).us > card.launch_us
        assert {*launch.tensors, *launch.numbers, *launch.constants} == set(launch.kernel.arg_names)
        yield config, work, launch
