"""What a reader needs to know about the machine behind a number: recorded, not interpreted.

Everything is read from Linux's own files where they exist; what cannot be read is None, never a guess.
"""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

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
# Variables that change the engines' threads or kernels.
VARIABLES = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "ORT_", "OV_", "RD_")
BUSY, STOLEN = 0.5, 0.01  # load per CPU at the start, share of stolen time: above these, times are in doubt
ROOT = Path("/")


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
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(root),
    }


def affinity() -> list[int]:
    """The CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup(root: Path = ROOT) -> dict:
    """The container's limits: ``version`` (1, 2 or None), ``cpus`` (a fraction or None), ``memory_bytes`` (or None).

    A limit may be set on any ancestor of the process's group, so the smallest along the path counts.
    """
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        folders = _ancestors(root / "sys/fs/cgroup", _group(root, ""))
        return {
            "version": 2,
            "cpus": _least(_quota_v2(folder / "cpu.max") for folder in folders),
            "memory_bytes": _least(_bytes(folder / "memory.max") for folder in folders),
        }
    if (root / "sys/fs/cgroup/cpu").exists() or (root / "sys/fs/cgroup/memory").exists():
        cpu_folders = _ancestors(root / "sys/fs/cgroup/cpu", _group(root, "cpu"))
        memory_folders = _ancestors(root / "sys/fs/cgroup/memory", _group(root, "memory"))
        return {
            "version": 1,
            "cpus": _least(_quota_v1(folder) for folder in cpu_folders),
            "memory_bytes": _least(_bytes(folder / "memory.limit_in_bytes") for folder in memory_folders),
        }
    return {"version": None, "cpus": None, "memory_bytes": None}


def available_threads(root: Path = ROOT) -> int:
    """CPUs this process can use at once: the affinity mask, cut to the cgroup's quota (rounded up), at least 1."""
    quota = cgroup(root)["cpus"]
    allowed = len(affinity())
    return max(1, allowed if quota is None else min(allowed, int(-(-quota // 1))))


def cpu_ticks(root: Path = ROOT) -> dict[str, int] | None:
    """``total`` and ``steal`` ticks of all CPUs since boot; None where /proc/stat does not exist."""
    text = _read(root / "proc/stat")
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


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's fields (on Arm, board-wide fields such as ``Model`` come last)."""
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _arm_name(info: dict[str, str]) -> str | None:
    if "CPU part" not in info:
        return None
    return f"Arm implementer {info.get('CPU implementer', '?')} part {info['CPU part']}"


def _turbo(root: Path) -> bool | None:
    intel = _read(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if intel is not None:
        return intel == "0"
    boost = _read(root / "sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == "1"


def _memory_bytes(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _os_name(root: Path) -> str:
    for line in (_read(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()


def _group(root: Path, controller: str) -> str:
    """This process's cgroup path: the line ``0::/path`` (v2) or ``4:cpu,cpuacct:/path`` (v1)."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            return path
    return "/"


def _ancestors(top: Path, group: str) -> list[Path]:
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _least(values) -> float | int | None:
    return min((value for value in values if value is not None), default=None)


def _quota_v2(path: Path) -> float | None:
    fields = (_read(path) or "max").split()
    if fields[0] == "max" or len(fields) != 2:
        return None
    return int(fields[0]) / int(fields[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _bytes(path: Path) -> int | None:
    """A limit in bytes; v1 writes "no limit" as a huge number."""
    text = _read(path)
    return int(text) if text is not None and text.isdigit() and int(text) < 1 << 60 else None
