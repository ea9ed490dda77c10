"""The card at hand: what it is, and its clocks, temperature and power while it works."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable

from rd_deploy.common import UserError
from rd_deploy.engines.device import current_gpu

MOST_WORK = 3.0  # seconds of work while nvidia-smi answers
CLOCK_CHANGE = 0.03  # of the multiprocessors' clock: above this, times before and after do not compare
# Reasons of the driver to slow down (nvidia-smi's bits); idling and a clock that the user set are none.
REASONS = {0x4: "power cap", 0x8: "hardware", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}
FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second before driver 535
KEYS = ("sm_mhz", "memory_mhz", "celsius", "watts", "slowed_by")
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "triton", "nvidia-cudnn-cu12")
PACKAGES += ("nvidia-cudnn-cu13", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")
PACKAGES += ("onnxruntime-ep-nv-tensorrt-rtx-cu12", "onnxruntime-ep-nv-tensorrt-rtx-cu13")


def describe(dry: bool) -> dict:
    """Name and limits of the card as the driver tells them."""
    if dry:
        return {"name": "dry run", "capability": 90}
    import torch

    return {
        **current_gpu(),
        "l2_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        "driver": _driver(),
        "power_limit_watts": _number(_ask(("power.limit",))[0]),
        "clock_limit_mhz": _number(_ask(("clocks.max.sm",))[0]),
    }


def versions() -> dict:
    """Of Python, CUDA and the packages that matter."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def assembler(capability: int, dry: bool, *, ours: bool) -> str:
    """The release of the ptxas that makes machine code: one that is right, if there is one.

    A `UserError` where there is none and kernels of ``ours`` are asked for.
    """
    if dry:
        return "none: interpreted"
    from triton.backends.nvidia.compiler import get_ptxas

    from rd_deploy.triton_kernels.assembler import use_assembler

    try:
        use_assembler(capability)
    except UserError:
        if ours:
            raise
    return get_ptxas(capability).version


def slug(name: str) -> str:
    """A folder's name: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def state(dry: bool, work: Callable[[], object] | None = None) -> dict | None:
    """Clocks, temperature, power and reasons to slow down; None where nothing tells them.

    ``work`` enqueues a fraction of a second of work, again and again until there is an answer: clocks under load.
    """
    if dry:
        return None
    if work is not None:
        work()
    asked = (_ask((*FIELDS, name), work) for name in REASON_FIELDS)
    found = next((values for values in asked if values[-1]), None) or _ask(FIELDS, work)
    if not any(found):
        return None
    numbers = [_number(text) for text in found[: len(FIELDS)]]
    return dict(zip(KEYS, [*numbers, _reasons(found[-1] if len(found) > len(FIELDS) else None)], strict=True))


def doubts(before: dict | None, after: dict | None) -> list[str]:
    """What two states say against the times between them."""
    if before is None or after is None:
        return []
    warnings = []
    first, last = before["sm_mhz"], after["sm_mhz"]
    if first and last and abs(last - first) > CLOCK_CHANGE * first:
        warnings.append(f"the clock moved from {first:.0f} to {last:.0f} MHz")
    slowed = sorted({*(before["slowed_by"] or ()), *(after["slowed_by"] or ())})
    return warnings + ([f"slowed down by {', '.join(slowed)}"] if slowed else [])


def _reasons(text: str | None) -> list[str] | None:
    """nvidia-smi's bits in words; None when it gave none."""
    if not text or not text.lower().startswith("0x"):
        return None
    bits = int(text, 16)
    return sorted({word for bit, word in REASONS.items() if bits & bit})


def _ask(fields: tuple[str, ...], work: Callable[[], object] | None = None) -> list[str | None]:
    """nvidia-smi's answers, None for what it does not know; ``work`` goes on while it starts and asks."""
    nothing: list[str | None] = [None] * len(fields)
    command = shutil.which("nvidia-smi")
    if command is None:
        return nothing
    query = [command, f"--id={_identity()}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return nothing
    try:
        _busy(process, work)
        lines = process.communicate(timeout=20)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return nothing
    cells = [cell.strip() for cell in lines[0].split(",")] if process.returncode == 0 and lines else []
    return cells if len(cells) == len(fields) else nothing


def _busy(process: subprocess.Popen, work: Callable[[], object] | None) -> None:
    """Work until the process ends, or for so long at most."""
    import torch

    deadline = time.monotonic() + MOST_WORK
    while work is not None and process.poll() is None and time.monotonic() < deadline:
        work()
        torch.cuda.synchronize()


def _identity() -> str:
    """Of torch's current device, whose number is another one under CUDA_VISIBLE_DEVICES."""
    import torch

    device = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device) if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def _driver() -> str | None:
    return _ask(("driver_version",))[0]


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
