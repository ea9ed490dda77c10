"""What the terminal and the picture say of the machine."""

import pytest

from rd_deploy.bench.report import render

CPU = {"model": "Some CPU", "architecture": "x86_64", "affinity": [0, 1, 2, 3]}
GPU = {
    "name": "NVIDIA H200",
    "capability": 90,
    "multiprocessors": 132,
    "memory_bytes": 140 << 30,
    "driver": "570.86.15",
    "cuda": "13.0",
    "ptxas": "13.3",
}


def document(**machine) -> dict:
    """A report without measurements."""
    environment = {"cpu": CPU, "threads": 2, "load_average": [0.5, 0, 0], "steal_share": 0.0, "packages": {}} | machine
    lists = dict.fromkeys(("results", "ratios", "best", "memory", "claims", "skipped", "warnings"), ())
    return {"model": "plain", "compare": "resnet", "environment": environment} | lists


@pytest.mark.parametrize("machine", [{}, {"gpu": None}], ids=["before there was an entry", "on the CPU"])
def test_without_a_gpu_the_cpu_comes_first(machine):
    line = render(document(**machine)).splitlines()[0]
    assert line == "Some CPU (x86_64), 2 threads of 4 CPUs, load 0.50 at the start, steal 0.0%"


def test_a_gpu_comes_first_with_its_driver_and_compilers():
    line = render(document(gpu=GPU)).splitlines()[0]
    card = "NVIDIA H200 (sm_90, 132 multiprocessors, 140 GiB), driver 570.86.15, CUDA 13.0, ptxas 13.3"
    assert line.startswith(f"{card}; Some CPU (x86_64), 2 threads")
    line = render(document(gpu=GPU | {"driver": None, "ptxas": None})).splitlines()[0]
    assert "140 GiB), CUDA 13.0; Some CPU" in line


def test_the_pictures_title_names_the_gpu():
    pytest.importorskip("matplotlib")
    from rd_deploy.bench.plot import title

    assert title(document()) == "plain against resnet · Some CPU, 2 threads"
    assert title(document(gpu=GPU, threads=1)) == "plain against resnet · NVIDIA H200\nSome CPU, 1 thread"


def test_what_files_name_cannot_steer_a_terminal():
    name = "\x1b]0;owned\x07\nstep"
    claim = {"name": f"speed/{name}", "target": 1.4, "text": name}
    skipped = {"engine": name, "precision": "fp32", "batch": 1, "reason": "\x1b[2J gone"}
    said = render(document() | {"model": name, "claims": [claim], "skipped": [skipped], "warnings": ["\x9b2J"]})
    assert all(sign.isprintable() or sign == "\n" for sign in said)
    assert "\n  speed/\\x1b]0;owned\\x07\\nstep  1.4x faster  \\x1b]0;owned\\x07\\nstep\n" in said
    assert "\\x1b[2J gone" in said
    assert "  \\x9b2J" in said
