"""What every command does with an error."""

import numpy as np
import pytest

from rd_deploy.common import Parser, Stopped, UserError, require, run_command


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
