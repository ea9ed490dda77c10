"""The build of the compiled engine, on a tree of its own with sources of a few lines."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rd_deploy.native import build as ours

API = """#include "rd.h"
#include <string>
const char *rd_isas() {
    static std::string names = "portable";
#ifdef RD_HAVE_AVX2
    names += " avx2";
#endif
    return names.c_str();
}
"""
HEADER = 'extern "C" {\n__attribute__((visibility("default"))) const char *rd_isas();\n}\n'


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout with the real build script."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here")
    native = tmp_path / "checkout" / "rd_deploy" / "native"
    (native / "src" / "kernels").mkdir(parents=True)
    (native / "include").mkdir()
    shutil.copy(ours.__file__, native)
    (native / "include" / "rd.h").write_text(HEADER)
    (native / "src" / "api.cpp").write_text(API)
    for isa in ours.INSTRUCTION_SETS:
        (native / "src" / "kernels" / f"{isa}.cpp").write_text(f"int {isa}_kernel() {{ return 1; }}\n")
    return native


def run(tree: Path, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(tree / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), check=False)


def built(tree: Path, *arguments: str, env: dict | None = None) -> str:
    """What a build that works says."""
    ran = run(tree, *arguments, env=env)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_library_for_every_instruction_set_that_the_compiler_has(tree):
    assert "compiles 7 of 7 files" in built(tree) or ours.Compiler.find().isas.keys() != ours.INSTRUCTION_SETS.keys()
    library = ctypes.CDLL(str(tree / ours.LIBRARY))
    library.rd_isas.restype = ctypes.c_char_p
    expected = "portable avx2" if "avx2" in ours.Compiler.find().isas else "portable"
    assert library.rd_isas().decode() == expected
    assert not hasattr(library, "portable_kernel")
    assert not list(tree.glob("*.o"))


def test_only_what_changed_is_made_again(tree):
    built(tree)
    assert built(tree) == ""
    (tree / "src" / "api.cpp").write_text(API + "// changed\n")
    assert "compiles 1 of" in built(tree)
    before = (tree / ours.LIBRARY).stat().st_mtime_ns
    assert built(tree) == ""
    assert (tree / ours.LIBRARY).stat().st_mtime_ns == before
    (tree / "include" / "rd.h").write_text(HEADER + "// changed\n")
    assert "compiles 1 of" in built(tree)  # the kernels do not include it
    (tree / ours.LIBRARY).unlink()
    built(tree)
    assert (tree / ours.LIBRARY).exists()


def test_other_flags_are_other_objects(tree):
    built(tree)
    assert "compiles" in built(tree, "--flag=-DOTHER")
    assert built(tree, "--flag=-DOTHER") == ""
    assert "compiles" in built(tree, env={"CXXFLAGS": "-DTHIRD"})


def test_warnings_are_errors_when_asked(tree):
    (tree / "src" / "api.cpp").write_text(API + "static int unused;\n")
    assert run(tree).returncode == 0
    ran = run(tree, "--werror")
    assert ran.returncode == 2
    assert "unused" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("native engine: error: ")
    assert "cannot compile api.cpp" in ran.stderr.splitlines()[-1]
    (tree / "src" / "api.cpp").write_text(API)
    assert "compiles 1 of" in built(tree)
    assert built(tree, "--werror") == ""  # made without a warning: nothing to check again


def test_a_program_of_the_librarys_sources(tree, tmp_path):
    (tmp_path / "main.cpp").write_text(
        '#include "rd.h"\n#include "part.h"\nint main() { return rd_isas()[0] == PART; }\n'
    )
    (tmp_path / "part.h").write_text("#define PART 'x'\n")
    program = tmp_path / "out" / "program"
    arguments = ("--output", program.parent, "--executable", "program", tmp_path / "main.cpp")
    built(tree, *arguments)
    assert subprocess.run([program], check=False).returncode == 0
    (tmp_path / "part.h").write_text("#define PART 'p'\n")
    assert "compiles 1 of" in built(tree, *arguments)
    assert subprocess.run([program], check=False).returncode == 1
    ran = run(tree, "--executable", "program")
    assert ran.returncode == 2


def test_what_cannot_be_built_is_one_line(tree):
    for env, said in (
        ({"CXX": "no-such-compiler"}, "the C++ compiler no-such-compiler was not found"),
        ({"CXX": "false"}, "false does not work as a C++ compiler"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found: "),
    ):
        ran = run(tree, env=env)
        assert ran.returncode == 2
        assert ran.stderr.count("\n") == 1
        assert said in ran.stderr
    (tree / "src" / "kernels" / "mmx.cpp").write_text("")
    assert "mmx.cpp has no entry in INSTRUCTION_SETS" in run(tree).stderr
    shutil.rmtree(tree / "src")
    assert "build from a checkout" in run(tree).stderr


def test_an_old_compiler_is_refused(tree, tmp_path):
    fake = tmp_path / "g++-9"
    fake.write_text("#!/bin/sh\necho '#define __GNUC__ 9'\n")
    fake.chmod(0o755)
    ran = run(tree, "--compiler", fake)
    assert ran.returncode == 2
    assert "is version 9 and g++ 11 or clang++ 14 is needed" in ran.stderr


def test_every_kernel_file_has_its_flags():
    """Here an unknown or a missing one would be left out without a word."""
    assert {path.stem for path in ours.KERNELS.glob("*.cpp")} == set(ours.INSTRUCTION_SETS)
