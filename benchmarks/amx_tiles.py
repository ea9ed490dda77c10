"""Cycles of a tile product of AMX by the number of tiles in use.

python benchmarks/amx_tiles.py --results FILE.json [--seconds 10]

amx_tiles.cpp says what is measured, and how it tells the two states of the machine apart.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from rd_deploy.bench.environment import capture
from rd_deploy.common import UserError, run_command, write_json
from rd_deploy.cpus import available_threads
from rd_deploy.native import available_isas
from rd_deploy.native.build import AMX_BF16, RELEASE, WARNINGS, BuildError, Compiler

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """The program, compiled with warnings as errors. Raises `UserError`."""
    program = folder / "amx_tiles"
    try:
        compiler = Compiler.find()
    except BuildError as reason:
        raise UserError(str(reason)) from reason
    command = [*compiler.command, "-std=c++17", *RELEASE, *WARNINGS, "-Werror", *AMX_BF16, SOURCE, "-o", program]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"{compiler} cannot compile {SOURCE.name}: its reasons stand above")
    return program


def measure(program: Path, seconds: float) -> dict:
    """``hertz``, and of each pattern samples and cycles in both states; cycles are None where there is no sample."""
    ran = subprocess.run([program, str(seconds)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise UserError(f"{SOURCE.name} ended with {ran.returncode}: the system gives no tiles to this process")
    hertz, *lines = ran.stdout.splitlines()
    rows = []
    for line in lines:
        name, *found = line.split("\t")
        row = {"pattern": name}
        for state, samples, cycles in (("fast", *found[:2]), ("slow", *found[2:])):
            row |= {f"{state}_samples": int(samples), f"{state}_cycles": float(cycles) if int(samples) else None}
        rows.append(row)
    return {"hertz": float(hertz), "results": rows}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", required=True, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=10, help="(default: %(default)s)")
    options = parser.parse_args()
    if "amx_bf16" not in available_isas():
        raise UserError("this CPU has no AMX for bfloat16: nothing to measure")
    with tempfile.TemporaryDirectory() as folder:
        document = measure(build(Path(folder)), options.seconds)
    for row in document["results"]:
        print(row)
    write_json(Path(options.results), {**document, "environment": capture(available_threads())})
    return 0


if __name__ == "__main__":
    sys.exit(run_command("amx_tiles.py", main))
