"""The C++ tests: each test_*.cpp beside this file is a program, built with the engine's sources under sanitizers.

A program gets an empty folder as its argument and passes when it ends with 0. Those named test_threads*.cpp run under
ThreadSanitizer, the others under AddressSanitizer and UndefinedBehaviorSanitizer. Programs that plan or run networks do
so once more with emulated tiles, whose loads and stores the sanitizers see, unlike those of AMX. fuzz_rdp.cpp is run by
libFuzzer: for 30 seconds, or as many as RD_FUZZ_SECONDS of the environment says. Kernels that this CPU cannot run are
left out.
"""

import os
import shutil
import subprocess
from functools import cache, cached_property
from pathlib import Path

import pytest

from rd_deploy.native import library
from rd_deploy.native.build import EMPTY, EMPTY_FUZZER, OBJECTS, Build, BuildError, Compiler

FOLDER = Path(__file__).parent
PROGRAMS = sorted(path.name for path in FOLDER.glob("test_*.cpp"))
EMULATED = ("test_plan.cpp", "test_run.cpp")
FUZZ_SECONDS = int(os.environ.get("RD_FUZZ_SECONDS", "30"))
pytestmark = pytest.mark.timeout(900 + FUZZ_SECONDS)  # compilers take minutes on a busy machine
OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def sanitizers(program: str) -> str:
    return "thread" if program.startswith("test_threads") else "address,undefined"


@cache
def runs_here() -> list[str]:
    """The instruction sets of this CPU, by a library of today's sources."""
    path = Build(Compiler.find()).library(OBJECTS / "current")
    return library.load(path).rd_available_isas().decode().split(",")


class Native(Compiler):
    """Compiles the kernels that this CPU can run, and no others."""

    @cached_property
    def isas(self) -> dict[str, tuple[str, ...]]:
        return {isa: flags for isa, flags in super().isas.items() if isa in runs_here()}


@cache
def usable(sanitize: str, name: str | None = None, source: str = EMPTY) -> Compiler | str:
    """The compiler, or why programs under these sanitizers cannot be built or run here."""
    try:
        compiler = Native.find(name)
    except BuildError as reason:
        return str(reason)
    if compiler.runs([f"-fsanitize={sanitize}"], source):
        return compiler
    return f"{compiler} has no runtime for -fsanitize={sanitize} that works here"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, tmp_path):
    sanitize = sanitizers(program)
    compiler = usable(sanitize)
    if isinstance(compiler, str):
        pytest.skip(compiler)
    run(Build(compiler, sanitize).executable(OBJECTS / "tests" / Path(program).stem, [FOLDER / program]), tmp_path)


@pytest.mark.parametrize("program", EMULATED)
def test_program_with_emulated_tiles(program, tmp_path, emulated_build):
    sanitize = sanitizers(program)
    if isinstance(reason := usable(sanitize), str):
        pytest.skip(reason)
    build = emulated_build(sanitize)
    run(build.executable(OBJECTS / "tests" / f"emulated_{Path(program).stem}", [FOLDER / program]), tmp_path)


def run(built: Path, folder: Path) -> None:
    ran = subprocess.run(
        [built, folder], cwd=folder, env=os.environ | OPTIONS, capture_output=True, text=True, errors="replace"
    )
    assert ran.returncode == 0, f"{built.name} ended with {ran.returncode}\n{ran.stdout[-4000:]}\n{ran.stderr[-8000:]}"


def test_no_file_crashes_the_engine(tmp_path):
    """From the committed corpus on; what was found is kept beside the objects, where a developer can look at it."""
    compiler = usable("fuzzer,address,undefined", "clang++", EMPTY_FUZZER)
    if isinstance(compiler, str):
        pytest.skip(f"libFuzzer needs clang: {compiler}")
    built = Build(compiler, "fuzzer,address,undefined").executable(
        OBJECTS / "tests" / "fuzz", [FOLDER / "fuzz_rdp.cpp"]
    )
    corpus, crashes = tmp_path / "corpus", OBJECTS / "crashes"
    shutil.copytree(FOLDER / "corpus", corpus)
    crashes.mkdir(exist_ok=True)
    command = [built, "-max_len=65536", f"-max_total_time={FUZZ_SECONDS}", f"-artifact_prefix={crashes}/", corpus]
    # By a shell: a program inherits the peak memory of the process that starts it, and libFuzzer, which allows itself
    # 2 GB, would end for what pytest once had. A shell's child starts small.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, f"libFuzzer ended with {ran.returncode}\n{ran.stderr[-8000:]}"
