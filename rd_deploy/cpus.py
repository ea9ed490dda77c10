"""How many CPUs this process may use: its affinity mask and its container's limits, from Linux's own files.

What cannot be read is None, never a guess.
"""

import os
from pathlib import Path

ROOT = Path("/")


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


def read(path: Path) -> str | None:
    """What a file of the system says; None where there is none, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _group(root: Path, controller: str) -> str:
    """This process's cgroup path: the line ``0::/path`` (v2) or ``4:cpu,cpuacct:/path`` (v1)."""
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
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
    fields = (read(path) or "max").split()
    if fields[0] == "max" or len(fields) != 2:
        return None
    return int(fields[0]) / int(fields[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _bytes(path: Path) -> int | None:
    """A limit in bytes; v1 writes "no limit" as a huge number."""
    text = read(path)
    return int(text) if text is not None and text.isdigit() and int(text) < 1 << 60 else None
