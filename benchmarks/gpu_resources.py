"""Compile the cuda engine's kernels for NVIDIA GPUs, without one, and check what they need: no spills, shared memory
that a block may have, and tensor cores in every product.

    python benchmarks/gpu_resources.py --networks plain50,resnet50 --cards a100,rtx4090,h100,b200,rtx5090 --batch 1,32

For each card: the kernels of the plan that the model chooses, or with --all every configuration that the tuner would
time. Prints a table and exits with 1 if a kernel breaks a rule. --json FILE keeps the figures.
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: this compiles

import triton

from rd_deploy.bench.environment import git_commit
from rd_deploy.bench.report import table
from rd_deploy.common import run_command, write_text
from rd_deploy.cuda.plan import build_plan, places
from rd_deploy.export.source import chain_from_name
from rd_deploy.triton_kernels.cards import Card, get_card
from rd_deploy.triton_kernels.compile import Job, Resources, resources
from rd_deploy.triton_kernels.launch import is_taken

FIVE = "a100,rtx4090,h100,b200,rtx5090"  # one card for each of sm_80, sm_89, sm_90, sm_100 and sm_120


def jobs_of(networks: list[str], card: Card, batches: list[int], elements: list[str], every: bool) -> list[Job]:
    """What to compile for a card, each kernel once."""
    wanted = {}
    for network, batch in itertools.product(networks, batches):
        chain = chain_from_name(network)
        if every:
            for piece in (piece for ways in places(chain, batch) for way in ways for piece in way):
                if is_taken(piece.kernel):
                    wanted |= {(piece.kernel, config): None for config in piece.kernel.configs(card)}
        else:
            wanted |= {(step.piece.kernel, step.config): None for step in build_plan(chain, batch, card).steps}
    jobs = {}
    for (kernel, config), element in itertools.product(wanted, elements):
        job = Job(kernel, config, element, card.capability)
        jobs.setdefault(job.code(), job)
    return list(jobs.values())


def problems(job: Job, found: Resources | str, card: Card) -> list[str]:
    """The rules that a compiled kernel breaks."""
    if isinstance(found, str):
        return [f"does not compile: {found}"]
    broken = []
    if found.spilled:
        broken.append(f"spills {found.spilled} bytes")
    if found.shared > card.shared_bytes:
        broken.append(f"{found.shared} bytes of shared memory, {card.shared_bytes} are there")
    if found.shared > job.kernel.work(job.config).shared_bytes:
        broken.append(f"the model thinks of {job.kernel.work(job.config).shared_bytes} bytes, {found.shared} are used")
    if job.kernel.work(job.config).flops and not found.tensor_ops:
        broken.append("no tensor cores")
    if found.serialized:
        broken.append("products are serialized")
    if found.stack_misused:
        broken.append("the assembler took the stack pointer for a number")
    return broken


def _row(job: Job, found: Resources | str, broken: list[str], card: Card) -> dict:
    if isinstance(found, str):
        found = Resources(0, 0, 0, False, "", "", False)
    settings = " ".join(f"{key}={value}" for key, value in asdict(job.config).items())
    name = type(job.kernel).__name__.removesuffix("Kernel")
    shape = ",".join(str(int(value)) for value in asdict(job.kernel).values())
    where = {"card": card.name, "capability": card.capability, "limit": card.shared_bytes, "element": job.element}
    return {**where, "kernel": f"{name}({shape})", "config": settings, **asdict(found), "problems": broken}


def _write(path: Path, head: dict, rows: list[dict]) -> None:
    """A line per kernel: there are thousands."""
    lines = ",\n".join(json.dumps(list(row.values())) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="plain50,resnet50")
    parser.add_argument("--cards", default=FIVE)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--elements", default="fp16")
    parser.add_argument("--all", action="store_true", help="every configuration, not just those the model chooses")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for card in map(get_card, options.cards.split(",")):
        batches, elements = [int(part) for part in options.batch.split(",")], options.elements.split(",")
        jobs = jobs_of(options.networks.split(","), card, batches, elements, options.all)
        for job, found in zip(jobs, resources(jobs), strict=True):
            rows.append(_row(job, found, problems(job, found, card), card))
    columns = ("card", "element", "kernel", "config", "registers", "shared", "spilled", "tensor_ops")
    cells = [(*(str(row[column]) for column in columns), "; ".join(row["problems"]) or "ok") for row in rows]
    print(table((*columns, ""), cells))
    if options.json:
        what = f"{options.elements.replace(',', ' and ')}, batch {options.batch.replace(',', ' and ')}"
        made = {"command": ["gpu_resources.py", *arguments], "what": what, "triton": triton.__version__}
        _write(options.json, {**made, "commit": git_commit(), "columns": list(rows[0])}, rows)
    broken = sum(bool(row["problems"]) for row in rows)
    print(f"\n{len(rows)} kernels, {broken} with problems")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(run_command("gpu_resources", lambda: command(sys.argv[1:])))
