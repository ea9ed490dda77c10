"""The GPU at hand as a `Card`."""

import re
from dataclasses import replace
from itertools import pairwise

from rd_deploy.triton_kernels.cards import CARDS, Card

FIRST_CAPABILITY = 80  # bf16 and asynchronous copies


def current_card() -> Card:
    """Torch's current CUDA device: its limits as the driver gives them, its rates from the most similar known card.

    A card that is not among `CARDS` takes the rates of one of its capability, or of the nearest below, in proportion
    to its multiprocessors; rates only choose kernels where nothing is measured. `Unsupported` below sm_80.
    """
    import torch

    from rd_deploy.engines.base import Unsupported

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = properties.major * 10 + properties.minor
    if capability < FIRST_CAPABILITY:
        raise Unsupported(f"{properties.name} is sm_{capability}; the kernels need sm_{FIRST_CAPABILITY} or later")
    card = similar(properties.name, capability, properties.multi_processor_count)
    return replace(
        card,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        shared_bytes=properties.shared_memory_per_block_optin,
        shared_sm_bytes=properties.shared_memory_per_multiprocessor,
        max_warps=properties.max_threads_per_multi_processor // 32,
    )


def similar(name: str, capability: int, multiprocessors: int) -> Card:
    """The known card of that name, else one of the nearest capability, scaled and renamed."""
    words = re.split(r"[\s-]+", name.lower())
    for word in (*words, *map("".join, pairwise(words))):  # "A100", "RTX 4090"; "L40S" is no L4
        if word in CARDS:
            return CARDS[word]
    card = max((c for c in CARDS.values() if c.capability <= capability), key=lambda c: (c.capability, c.name))
    scale = multiprocessors / card.multiprocessors
    return replace(card, name=f"{name} (as {card.name})", tflops=card.tflops * scale, l2_gb_s=card.l2_gb_s * scale)
