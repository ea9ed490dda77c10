"""What networks compute: logits by torch in fp32, and how far an engine's are from them."""

import numpy as np
import onnx

from rd_deploy import parity
from rd_deploy.engines.base import Session, image_input
from rd_deploy.engines.torch import run_calls, translate

CHUNK = 32  # images at once: every tensor of a network stays until its last one


def logits(model: onnx.ModelProto, images: np.ndarray, device) -> np.ndarray:
    """By torch in fp32, without TF32."""
    import torch

    calls = translate(model, torch.float32, device)
    source, output = image_input(model).name, model.graph.output[0].name
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        chunks = torch.from_numpy(images).split(CHUNK)
        found = [run_calls(calls, {source: chunk.to(device)}, output).cpu().numpy() for chunk in chunks]
    return np.concatenate(found)


def check(session: Session, images: np.ndarray, expected: np.ndarray, exact: bool) -> tuple[dict, list[str]]:
    """How far the logits are from the expected ones, and what is wrong.

    ``exact``: a second run must give the same bits; libraries may sum in any order.
    """
    found, again = (session.run(images) for _ in range(2))
    compared = parity.compare(expected, found, parity.TOLERANCES[session.precision])
    repeated = bool(np.array_equal(found, again))
    faults = []
    if not compared.passes:
        faults.append(f"off by {compared.max_error:.2g} deviations (tolerance {compared.tolerance:g})")
    if exact and not repeated:
        faults.append("two replays differ")
    error = compared.max_error if np.isfinite(compared.max_error) else None
    kept = {"max_error": error, "tolerance": compared.tolerance, "top1_agreement": compared.top1_agreement}
    return kept | {"replays_equal": repeated}, faults
