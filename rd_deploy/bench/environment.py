"""What a reader needs to know about the machine behind a number: recorded, not interpreted.

Everything is read from Linux's own files where they exist; what cannot be read is None, never a guess.
"""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from rd_deploy.cpus import ROOT, affinity, cgroup, read

PACKAGES = (
    *("residual-distillation", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
    *("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    *("torch", "torchvision", "timm", "triton"),
)
# CPU features that decide which kernels an engine picks; x86 names, then Arm's.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
# Variables that change the engines' threads or kernels. Of NVIDIA's two alone: NVIDIA_API_KEY is a secret.
VARIABLES = (
    *("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "ORT_", "OV_", "RD_"),
    *("CUDA_", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "TORCHINDUCTOR_", "TRITON_"),
)
BUSY, STOLEN = 0.5, 0.01  # load per CPU at the start, share of stolen time: above these, times are in doubt


def capture(threads: int, root: Path = ROOT) -> dict:
    """The environment as plain JSON values; ``threads`` is what the engines were told to use."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(root),
        "cgroup": cgroup(root),
        "threads": threads,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "memory_bytes": _memory_bytes(root),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "os": _os_name(root),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": packages(),
        "git_commit": git_commit(),
    }


def cpu(root: Path = ROOT) -> dict:
    """Model, architecture, cores, affinity, relevant flags, governor and turbo."""
    info = _cpuinfo(root)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    model = info.get("model name") or info.get("Model") or _arm_name(info) or platform.processor() or None
    return {
        "model": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "affinity": affinity(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "governor": read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(root),
    }


def gpu(root: Path = ROOT) -> dict | None:
    """Torch's current GPU, its driver and torch's CUDA; None where there is none."""
    from rd_deploy.engines.device import current_gpu, no_gpu

    if no_gpu():
        return None
    import torch

    return {**current_gpu(), "driver": read(root / "sys/module/nvidia/version"), "cuda": torch.version.cuda}


def ptxas(capability: int) -> str | None:
    """Release of the assembler that Triton takes for a GPU: the one in use once an engine has compiled kernels."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return get_ptxas(capability).version
    except Exception:  # no triton, no assembler, or a triton that asks otherwise
        return None


def cpu_ticks(root: Path = ROOT) -> dict[str, int] | None:
    """``total`` and ``steal`` ticks of all CPUs since boot; None where /proc/stat does not exist."""
    text = read(root / "proc/stat")
    if text is None or not text.startswith("cpu "):
        return None
    fields = [int(field) for field in text.splitlines()[0].split()[1:]]
    return {"total": sum(fields[:8]), "steal": fields[7] if len(fields) > 7 else 0}


def steal_share(before: dict[str, int] | None, after: dict[str, int] | None) -> float | None:
    """Share of CPU time the hypervisor gave to others between two `cpu_ticks`, from 0 to 1."""
    if before is None or after is None or after["total"] <= before["total"]:
        return None
    return (after["steal"] - before["steal"]) / (after["total"] - before["total"])


def doubts(machine: dict) -> list[str]:
    """Warnings in words from what `capture` and `steal_share` found: others used the CPUs while they were measured."""
    load, cores, steal = machine["load_average"], machine["cpu"]["cores"], machine["steal_share"]
    warnings = []
    if load is not None and cores and load[0] > BUSY * cores:
        warnings.append(f"load {load[0]:.2f} on {cores} CPUs at the start (over {BUSY:g} per CPU): quiet the machine")
    if cores and (threads := machine.get("threads") or 1) > cores:
        warnings.append(f"{threads} threads on {cores} CPUs wait for each other: choose --threads {cores}")
    if steal is not None and steal > STOLEN:
        warnings.append(f"{steal:.1%} of the CPU time was stolen by other virtual machines (over {STOLEN:.0%})")
    return warnings


def packages() -> dict[str, str]:
    """Versions of the installed packages that matter."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` when tracked files differ; None elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's fields (on Arm, board-wide fields such as ``Model`` come last)."""
    fields: dict[str, str] = {}
    for line in (read(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _arm_name(info: dict[str, str]) -> str | None:
    if "CPU part" not in info:
        return None
    return f"Arm implementer {info.get('CPU implementer', '?')} part {info['CPU part']}"


def _turbo(root: Path) -> bool | None:
    intel = read(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if intel is not None:
        return intel == "0"
    boost = read(root / "sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


def _memory_bytes(root: Path) -> int | None:
    for line in (read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _os_name(root: Path) -> str:
    for line in (read(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()
