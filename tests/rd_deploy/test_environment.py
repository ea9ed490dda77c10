"""The environment is read from files of other machines, made up here as on Arm, in containers, and where nothing is."""

import json
import os
import platform
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from fake_files import write

from rd_deploy.bench import environment


def schema() -> dict:
    return json.loads(resources.files("rd_deploy.bench").joinpath("schema.json").read_text())


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


def test_variables_of_threads_and_kernels_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    gpus = ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "TORCHINDUCTOR_MAX_AUTOTUNE", "TRITON_PTXAS_PATH")
    for name in (*gpus, "OVERRIDE_TOKEN", "NVIDIA_API_KEY"):
        monkeypatch.setenv(name, "0")
    values = environment.capture(1, tmp_path)["variables"]
    assert (values["ONEDNN_MAX_CPU_ISA"], values["OMP_NUM_THREADS"]) == ("AVX2", "3")
    assert {*gpus} <= {*values}
    assert not {"OVERRIDE_TOKEN", "NVIDIA_API_KEY"} & {*values}


@pytest.mark.parametrize(
    ("load", "steal", "said"),
    [(0.9, 0.005, []), (1.1, 0.0, ["load 1.10 on 2 CPUs"]), (None, 0.03, ["3.0% of the CPU time"]), (None, None, [])],
)
def test_a_busy_machine_is_a_warning(load, steal, said):
    machine = {"load_average": load and [load, 9, 9], "cpu": {"cores": 2}, "steal_share": steal}
    warnings = environment.doubts(machine)
    assert len(warnings) == len(said)
    assert all(text in warning for text, warning in zip(said, warnings, strict=True))


def test_more_threads_than_cpus_are_a_warning():
    machine = {"load_average": None, "cpu": {"cores": 2}, "steal_share": None}
    assert environment.doubts(machine | {"threads": 2}) == []
    (warning,) = environment.doubts(machine | {"threads": 3})
    assert warning.startswith("3 threads on 2 CPUs")


def test_steal_share(tmp_path):
    before = environment.cpu_ticks(write(tmp_path, {"proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2\n"}))
    after = environment.cpu_ticks(write(tmp_path, {"proc/stat": "cpu  150 0 100 830 0 0 0 20 7 0\ncpu0 1 2\n"}))
    assert environment.steal_share(before, after) == pytest.approx(0.2)


def test_a_gpu_with_its_driver_and_compilers(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    root = write(tmp_path, {"sys/module/nvidia/version": "570.86.15\n"})
    found, assembler = environment.gpu(root), environment.ptxas(90)
    definition = schema()["properties"]["environment"]["properties"]["gpu"] | {"$defs": schema()["$defs"]}
    jsonschema.validate(found | {"ptxas": assembler}, definition)
    assert found == {
        "name": "NVIDIA H200",
        "capability": 90,
        "multiprocessors": 132,
        "memory_bytes": 140 << 30,
        "driver": "570.86.15",
        "cuda": "13.0",
    }
    try:
        from rd_deploy.triton_kernels.assembler import BUNDLED, VARIABLE, version_of
    except ImportError:
        assert assembler is None
    else:
        path = Path(os.environ.get(VARIABLE, BUNDLED / "ptxas"))
        assert assembler == ".".join(map(str, version_of(path)))


def test_without_a_gpu_there_is_none(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.gpu(tmp_path) is None


def test_results_that_are_committed_follow_the_schema():
    """They are older than some entries, which therefore are not required."""
    paths = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/*-bench-*.json"))
    assert paths
    for path in paths:
        jsonschema.validate(json.loads(path.read_text()), schema())
