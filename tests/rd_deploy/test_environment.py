"""The environment is read from files of other machines, made up here as on Arm, in containers, and where nothing is."""

import json
import platform

import pytest

from rd_deploy.bench import environment


def write(root, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_an_empty_machine_gives_none_and_no_error(tmp_path):
    values = environment.capture(2, tmp_path)
    json.dumps(values, allow_nan=False)
    assert values["cgroup"] == {"version": None, "cpus": None, "memory_bytes": None}
    assert values["memory_bytes"] is None
    assert values["cpu"]["governor"] is None
    assert values["cpu"]["turbo"] is None
    assert values["cpu"]["flags"] == []
    assert environment.cpu_ticks(tmp_path) is None
    assert environment.steal_share(None, None) is None
    assert values["os"] == platform.system()


def test_x86_flags_governor_and_turbo(tmp_path):
    cpu = "sys/devices/system/cpu"
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_bf16 lm\n",
            f"{cpu}/cpu0/cpufreq/scaling_governor": "performance\n",
            f"{cpu}/intel_pstate/no_turbo": "1\n",
            "proc/meminfo": "MemTotal:       8000000 kB\n",
            "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
        },
    )
    values = environment.capture(1, root)
    assert values["cpu"]["model"] == "Some CPU @ 2 GHz"
    assert values["cpu"]["flags"] == ["avx2", "avx512_bf16"]
    assert values["cpu"]["governor"] == "performance"
    assert values["cpu"]["turbo"] is False
    assert values["memory_bytes"] == 8000000 * 1024
    assert values["os"] == "Debian GNU/Linux 12"


def test_arm_without_a_model_name(tmp_path):
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    cpu = environment.cpu(write(tmp_path, {"proc/cpuinfo": text}))
    assert cpu["model"] == "Arm implementer 0x41 part 0xd0c"
    assert cpu["flags"] == ["asimd", "asimddp", "bf16", "sve"]


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
    assert environment.cgroup(root) == {"version": 2, "cpus": 1.5, "memory_bytes": 1 << 30}


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
    assert environment.cgroup(root) == {"version": 1, "cpus": 0.5, "memory_bytes": None}
    assert environment.available_threads(root) == 1


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 4), ("250000 100000", 3), ("900000 100000", 4)])
def test_threads_are_what_the_affinity_and_the_quota_leave(tmp_path, monkeypatch, quota, threads):
    monkeypatch.setattr(environment, "affinity", lambda: [0, 1, 2, 3])
    root = write(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpu", "sys/fs/cgroup/cpu.max": quota})
    assert environment.available_threads(root) == threads


def test_variables_of_threads_and_kernels_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OVERRIDE_TOKEN", "private")
    values = environment.capture(1, tmp_path)["variables"]
    assert (values["ONEDNN_MAX_CPU_ISA"], values["OMP_NUM_THREADS"]) == ("AVX2", "3")
    assert "OVERRIDE_TOKEN" not in values


@pytest.mark.parametrize(
    ("load", "steal", "said"),
    [(0.9, 0.005, []), (1.1, 0.0, ["load 1.10 on 2 CPUs"]), (None, 0.03, ["3.0% of the CPU time"]), (None, None, [])],
)
def test_a_busy_machine_is_a_warning(load, steal, said):
    machine = {"load_average": load and [load, 9, 9], "cpu": {"cores": 2}, "steal_share": steal}
    warnings = environment.doubts(machine)
    assert len(warnings) == len(said)
    assert all(text in warning for text, warning in zip(said, warnings, strict=True))


def test_steal_share(tmp_path):
    before = environment.cpu_ticks(write(tmp_path, {"proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2\n"}))
    after = environment.cpu_ticks(write(tmp_path, {"proc/stat": "cpu  150 0 100 830 0 0 0 20 7 0\ncpu0 1 2\n"}))
    assert environment.steal_share(before, after) == pytest.approx(0.2)
