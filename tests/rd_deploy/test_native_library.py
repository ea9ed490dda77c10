"""The C interface as ctypes sees it: the header's layouts, libraries that do not fit, and what importing costs."""

import ctypes
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rd_deploy.common import UserError
from rd_deploy.native import library, version
from rd_deploy.native.build import NATIVE, BuildError, Compiler

STRUCTURES = {
    "rd_network_info": library.CNetworkInfo,
    "rd_options": library.COptions,
    "rd_plan_info": library.CPlanInfo,
    "rd_step_info": library.CStepInfo,
}


def compiler() -> Compiler:
    try:
        return Compiler.find()
    except BuildError as reason:
        pytest.skip(str(reason))


def shared_library(folder: Path, code: str) -> Path:
    source, target = folder / "other.cpp", folder / library.PATH.name
    source.write_text(code)
    subprocess.run([*compiler().command, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


def test_structures_lie_in_memory_as_in_the_header(tmp_path):
    """A program that the header is compiled into says where each field lies."""
    lines = [f'printf("{name} %zu\\n", sizeof({name}));' for name in STRUCTURES]
    lines += [
        f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));'
        for name, structure in STRUCTURES.items()
        for field, _ in structure._fields_
    ]
    source, program = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text('#include <cstdio>\n#include "rd.h"\nint main() {\n' + "\n".join(lines) + "\n}\n")
    command = [*compiler().command, f"-I{NATIVE / 'include'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [f"{name} {ctypes.sizeof(structure)}" for name, structure in STRUCTURES.items()]
    for name, structure in STRUCTURES.items():
        fields = ((field, getattr(structure, field)) for field, _ in structure._fields_)
        expected += [f"{name}.{field} {place.offset} {place.size}" for field, place in fields]
    assert said == expected


def test_every_function_that_is_declared_is_in_the_header():
    header = (NATIVE / "include" / "rd.h").read_text()
    for name in (*library.CHECKED, *library.PLAIN):
        assert f"{name}(" in header


def test_only_the_interface_leaves_the_library():
    nm = shutil.which("nm")
    if nm is None or sys.platform == "darwin":
        pytest.skip("no nm here that lists dynamic symbols")
    lines = subprocess.run(
        [nm, "-D", "--defined-only", library.PATH], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in lines.splitlines()}
    assert set(library.CHECKED) | set(library.PLAIN) <= names
    assert all(name.startswith("rd_") for name in names)


def test_the_versions_are_one():
    project = tomllib.loads((NATIVE.parents[1] / "pyproject.toml").read_text())["project"]
    assert version() == library.VERSION == project["version"]


def test_a_missing_library_says_how_to_build_it(tmp_path):
    with pytest.raises(UserError, match=r"not built .* python rd_deploy/native/build\.py"):
        library.load(tmp_path / "librd.so")


def test_a_library_of_another_version_is_refused(tmp_path):
    names = "".join(
        f'extern "C" void *{name}() {{ return nullptr; }}\n' for name in library.PLAIN if name != "rd_version"
    )
    path = shared_library(tmp_path, names + 'extern "C" const char *rd_version() { return "0.0.9"; }\n')
    with pytest.raises(UserError, match=r"is version 0\.0\.9, and .* is needed"):
        library.load(path)


def test_a_library_without_the_functions_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be used here") as error:
        library.load(shared_library(tmp_path, "int nothing;\n"))
    assert "\n" not in str(error.value)


def test_what_is_no_library_is_refused(tmp_path):
    path = tmp_path / library.PATH.name
    path.write_bytes(b"no library")
    with pytest.raises(UserError, match="cannot be used here"):
        library.load(path)


def test_importing_it_takes_numpy_only():
    code = "import sys, rd_deploy.native; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ran.stdout.split()) & {"torch", "onnx", "onnxruntime", "matplotlib"}
