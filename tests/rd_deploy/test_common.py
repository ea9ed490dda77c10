"""What every command does with an error."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from rd_deploy.common import Parser, Stopped, UserError, check_file, expanded, require, run_command, write_json


@pytest.mark.parametrize("path", ["a\0b", "a\ud800"])
def test_a_path_that_no_file_can_have_is_one_line(path):
    with pytest.raises(UserError) as error:
        expanded("--out", path, "folder")
    assert str(error.value) == f"--out {path!r} is no path that a file can have; name a folder"
    assert str(error.value).isprintable()


def test_a_runs_folder_in_place_of_its_network_says_which_file_to_give(tmp_path):
    with pytest.raises(UserError, match=f"checkpoint {tmp_path} is not a file$"):
        check_file(tmp_path, "checkpoint")
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=f"is not a file; give {tmp_path}/model.pt$"):
        check_file(tmp_path, "checkpoint")


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path, said in (
        (pipe, "it is no regular file"),
        (folder, "it is a folder"),
        (Path("/dev/null"), "no regular file"),
    ):
        with pytest.raises(UserError, match=f"cannot write {path}: .*{said}; choose another output path"):
            write_json(path, {})
    assert sorted(tmp_path.iterdir()) == [folder, pipe]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "data" / "x.json", tmp_path / "x.json"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(target.read_text()) == [1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "x.json", "x.json"]


@pytest.mark.parametrize(("make", "said"), [(lambda: np.empty(1 << 62, np.uint8), "Unable to allocate"), (None, "")])
def test_full_memory_is_one_line_and_exit_2(capsys, make, said):
    def command() -> None:
        if make:
            make()
        raise MemoryError

    assert run_command("rd-test", command) == 2
    error = capsys.readouterr().err
    assert error.startswith("rd-test: error: not enough memory")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 12",
        "std::bad_alloc",
    ],
)
def test_full_memory_of_a_library_is_one_line_and_exit_2(capsys, said):
    def command() -> None:
        raise RuntimeError(f"{said}\nframe 1")

    assert run_command("rd-test", command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rd-test: error: not enough memory ({said}")
    assert error.count("\n") == 1


def test_other_errors_of_a_library_are_not_taken_for_full_memory():
    def command() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command("rd-test", command)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_like_it", "not usable here (No module named 'nothing_like_it'): in the checkout: pip install"),
        (
            "raise OSError('libx.so.1:\\nno file')",
            "installed but cannot be imported (libx.so.1: no file): install it again",
        ),
        ("raise RuntimeError", "installed but cannot be imported (RuntimeError): install it again"),
    ],
)
def test_a_dependency_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, code, said):
    (tmp_path / "dependency.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as error:
        require("dependency", "train")
    assert str(error.value).startswith(f"dependency is {said}")


@pytest.mark.parametrize(
    "error",
    [UserError("input \x1b[2J\x9b"), Stopped("input \x1b[2J\x9b", 2), OSError(28, "No space left", "\x1b[2J\x9b")],
    ids=["mistake", "stop", "disk"],
)
def test_what_a_file_says_does_not_reach_the_terminal_as_commands(capsys, error):
    def command() -> None:
        raise error

    assert run_command("rd-test", command) == 2
    said = capsys.readouterr().err
    assert r"\x1b[2J\x9b" in said
    assert said[:-1].isprintable()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--out", ""], "--out is empty"), (["--out="], "--out is empty"), (["", "--out", "x"], "model.pt is empty")],
)
def test_empty_text_is_not_an_option_that_was_left_away(arguments, said):
    parser = Parser()
    parser.add_argument("model", nargs="?", metavar="model.pt")
    parser.add_argument("--out")
    parser.add_argument("--size", type=int)
    with pytest.raises(UserError, match=said):
        parser.parse_args(arguments)
    assert parser.parse_args(["--size", "0"]).size == 0
