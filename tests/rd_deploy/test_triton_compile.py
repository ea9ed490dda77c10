"""Ahead-of-time compilation for five generations of GPUs, without one; in processes of their own, since the tests'
kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

from rd_deploy.common import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("card", ["a100", "rtx4090", "h100", "b200", "rtx5090"])
def test_kernels_fit_and_never_spill(card, tmp_path):
    """What the model chooses for plain-50 at batch 32: no spills, shared memory a block may have, tensor cores in every
    product. `gpu_resources.py --all` does the same for every configuration that the tuner would time."""
    if card == "h100":
        from rd_deploy.triton_kernels.assembler import use_assembler

        try:
            use_assembler(90)
        except UserError as reason:
            pytest.skip(str(reason))
    out = tmp_path / "resources.json"
    what = ("--networks", "plain50", "--batch", "32")
    done = run("benchmarks/gpu_resources.py", "--cards", card, *what, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    rows = [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]
    kinds = {row["kernel"].partition("(")[0] for row in rows}
    assert {"Stem", "Conv"} <= kinds
    assert kinds & {"Bottleneck", "ExpandReduce"}
    assert all(row["spilled"] == 0 and not row["serialized"] for row in rows)
    if card == "h100":  # earlier ones make wrong code there
        assert all(tuple(map(int, row["assembler"].split("."))) >= (13, 3) for row in rows)
    wanted = {"h100": "wgmma", "b200": "tcgen05"}.get(card, "mma")
    heavy = [row for row in rows if row["kernel"].startswith(("Bottleneck", "ExpandReduce"))]
    assert {row["tensor_ops"] for row in heavy} <= {wanted}


def test_a_broken_rule_is_found():
    script = """
from dataclasses import replace
from benchmarks import gpu_resources
from rd_deploy.triton_kernels.cards import get_card
card = get_card("h100")
job = gpu_resources.jobs_of(["plain18"], card, [1], ["fp16"], False)[1]
found = gpu_resources.Resources(255, 300_000, 8, True, "", "", True)
broken = "; ".join(gpu_resources.problems(job, found, card))
for word in ("spills 8", "300000 bytes", "no tensor cores", "serialized", "stack pointer"):
    assert word in broken, broken
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_the_stack_pointer_is_for_the_stack():
    """Lines of ptxas 12.8 for the stem with 16 columns: in the second kernel R1 is part of an operand's address."""
    from rd_deploy.triton_kernels.compile import misuses_stack

    right = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0170*/                   VIADD R1, R1, 0xffffffb8 ;
        /*1230*/                   STL [R1+0x20], R180 ;
        /*1240*/              @!P2 LDL.LU R0, [R1] ;
        /*1250*/                   IADD3 R4, P0, R12, R10, RZ ;
"""
    assert not misuses_stack(right)
    with pytest.raises(ValueError, match="no machine code"):
        misuses_stack("nvdisasm fatal: not a cubin")
    assert misuses_stack(right + "        /*06b0*/                   IADD3 R4, P0, R1, 0x20, RZ ;\n")
    assert misuses_stack(right + "        /*0730*/                   IADD3.X R4, R1, -0x3ffffff0, RZ, P0, !PT ;\n")


def test_the_launcher_finds_what_was_compiled_ahead():
    """A second process on a GPU of that kind compiles nothing: it takes the first one's result from the cache."""
    script = """
import sys, triton
from rd_deploy.triton_kernels.cards import get_card
from rd_deploy.triton_kernels.compile import compiled
from rd_deploy.triton_kernels.pools import MaxPoolKernel

kernel = MaxPoolKernel(2, 9, 11, int(sys.argv[1]), 3, 2, 1)
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
for pdl in (False, True):
    compiled(kernel.launch(kernel.configs(get_card("h100"))[0], pdl=pdl), "fp16", 90)
print(hits)
"""
    channels = str(os.getpid() % 4096 + 1)  # so that no earlier test run compiled it
    run("-c", script, channels)
    again = run("-c", script, channels)
    assert again.stdout.strip() == "[True, True]", again.stderr


def test_a_compiler_that_takes_its_process_along_costs_that_job_only():
    from rd_deploy.triton_kernels.compile import in_parallel

    assert in_parallel(abs, [-1, 2, -3]) == [1, 2, 3]
    assert in_parallel(abs, []) == []
    assert all("process died" in line for line in in_parallel(os._exit, [1, 1]))
