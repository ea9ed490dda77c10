"""The CPUs that a process may use, read from files of containers that are made up here."""

import subprocess
import sys

import pytest
from fake_files import write

from rd_deploy import cpus


def test_cgroup_v2_takes_the_smallest_limit_along_the_path(tmp_path):
    group = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {
            f"{group}/cgroup.controllers": "cpu memory",
            "proc/self/cgroup": "0::/pods/mine\n",
            f"{group}/pods/cpu.max": "150000 100000\n",
            f"{group}/pods/mine/cpu.max": "max 100000\n",
            f"{group}/pods/memory.max": "max\n",
            f"{group}/pods/mine/memory.max": "1073741824\n",
        },
    )
    assert cpus.cgroup(root) == {"version": 2, "cpus": 1.5, "memory_bytes": 1 << 30}


def test_cgroup_v1(tmp_path):
    group = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n2:memory:/docker/x\n",
            f"{group}/cpu/cpu.cfs_quota_us": "-1\n",
            f"{group}/cpu/cpu.cfs_period_us": "100000\n",
            f"{group}/cpu/docker/x/cpu.cfs_quota_us": "50000\n",
            f"{group}/cpu/docker/x/cpu.cfs_period_us": "100000\n",
            f"{group}/memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"{group}/memory/docker/x/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert cpus.cgroup(root) == {"version": 1, "cpus": 0.5, "memory_bytes": None}
    assert cpus.available_threads(root) == 1


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 4), ("250000 100000", 3), ("900000 100000", 4)])
def test_threads_are_what_the_affinity_and_the_quota_leave(tmp_path, monkeypatch, quota, threads):
    monkeypatch.setattr(cpus, "affinity", lambda: [0, 1, 2, 3])
    root = write(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpu", "sys/fs/cgroup/cpu.max": quota})
    assert cpus.available_threads(root) == threads


def test_the_native_engine_loads_no_benchmark():
    code = "import sys, rd_deploy.native; print([name for name in sys.modules if name.startswith('rd_deploy.bench')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
