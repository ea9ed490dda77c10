"""What a command prints goes to a reader that may leave; the command goes on."""

import errno
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from rd_deploy.output import lasting_output

ROOT = Path(__file__).resolve().parents[2]  # `python -c` imports from where it runs

SCRIPT = """
import sys
from rd_deploy.output import lasting_output
with lasting_output():
    for number in range(3):
        print("to nobody", flush=True)
        print("nor here", file=sys.stderr, flush=True)
    print("left in the buffer")
"""


def told_to_nobody(script: str, both: bool = True, ends: Callable[[], tuple[int, int]] = os.pipe):
    """Run a script whose stdout, or ``both`` streams, nobody reads: the one of the two ``ends`` is closed."""
    read, write = ends()
    os.close(read)
    stderr = write if both else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=write, stderr=stderr)
    os.close(write)
    return done


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_leaves_ends_nothing(both):
    done = told_to_nobody(SCRIPT, both)
    assert done.returncode == 0
    assert done.stderr is None or done.stderr.decode().splitlines() == ["nor here"] * 3


def test_a_terminal_that_hangs_up_ends_nothing():
    assert told_to_nobody(SCRIPT, ends=os.openpty).returncode == 0


COMMAND = """
import sys
from pathlib import Path
from rd_deploy.common import Stopped, UserError, run_command

def command():
    print("to nobody"{flush})
    {then}

sys.exit(run_command("rd-test", command))
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("Path({file!r}).touch()", 0),
        ("raise UserError('wrong')", 2),
        ("raise Stopped('stopped; go on with: ...', code=130)", 130),
    ],
)
@pytest.mark.parametrize("flush", ["", ", flush=True"])
def test_a_command_does_its_work_though_nobody_reads_of_it(tmp_path, flush, then, code):
    script = COMMAND.format(flush=flush, then=then.format(file=str(tmp_path / "made")))
    for both in (True, False):
        done = told_to_nobody(script, both)
        assert done.returncode == code, done.stderr
    assert (tmp_path / "made").exists() == (code == 0)
    assert b"Exception ignored" not in done.stderr  # as Python says of what it cannot flush


@pytest.mark.parametrize("flush", ["", ", flush=True"])
def test_output_to_a_full_disk_is_one_line_and_exit_2(flush):
    with Path("/dev/full").open("wb") as full:
        script = [sys.executable, "-c", COMMAND.format(flush=flush, then="pass")]
        done = subprocess.run(script, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "rd-test: error: No space left on device: output; free space or choose another path\n"


def test_a_closed_stdout_is_no_reader():
    script = shlex.join([sys.executable, "-c", COMMAND.format(flush=", flush=True", then="pass")])
    done = subprocess.run(f"{script} >&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE])
def test_a_failing_disk_is_no_reader_that_left(tmp_path, monkeypatch, code):
    class Failing(io.StringIO):
        def __init__(self, file):
            super().__init__()
            self.fileno = file.fileno

        def write(self, text):
            raise OSError(code, os.strerror(code))

    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Failing(file))
        with pytest.raises(OSError, match="Input/output") if code == errno.EIO else nullcontext(), lasting_output():
            print("to a file")


def test_what_is_printed_is_printed(capsys):
    with lasting_output():
        print("here")
        assert sys.stdout.isatty() is False  # as the stream itself says
    assert capsys.readouterr().out == "here\n"


def test_what_the_terminals_encoding_lacks_is_escaped():
    script = "from rd_deploy.output import lasting_output\nwith lasting_output():\n    print('a\\u2581 \\udce8')"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"a\\u2581 \\udce8\n")
