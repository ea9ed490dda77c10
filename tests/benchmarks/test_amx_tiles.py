"""The benchmark of tiles: its program is compiled without warnings, and its lines become rows."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import amx_tiles

from rd_deploy.common import UserError
from rd_deploy.native import available_isas
from rd_deploy.native.build import Compiler

builds = pytest.mark.skipif("amx_bf16" not in Compiler.find().isas, reason="the compiler does not know AMX")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_lines_become_rows(tmp_path):
    program = script(tmp_path / "program", r"printf '2.5e+09\nfour tiles\t7\t16.1\t0\t0.0\n'")
    assert amx_tiles.measure(program, 1) == {
        "hertz": 2.5e9,
        "results": [
            {
                "pattern": "four tiles",
                "fast_samples": 7,
                "fast_cycles": 16.1,
                "slow_samples": 0,
                "slow_cycles": None,  # the machine was never in that state
            }
        ],
    }


def test_a_system_that_gives_no_tiles_is_told(tmp_path):
    with pytest.raises(UserError, match="gives no tiles"):
        amx_tiles.measure(script(tmp_path / "program", "exit 2"), 1)


@builds
def test_the_program_is_compiled_and_measures_where_there_are_tiles(tmp_path):
    program = amx_tiles.build(tmp_path)
    if "amx_bf16" not in available_isas():
        pytest.skip("this CPU has no AMX")
    found = amx_tiles.measure(program, 0.2)
    assert 0.5e9 < found["hertz"] < 10e9
    assert len(found["results"]) == 7
