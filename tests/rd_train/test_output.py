"""What a run prints goes to a reader that may leave; the run goes on."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from processes import environment

from rd_train.output import lasting_output

SCRIPT = """
import sys
from rd_train.output import lasting_output
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
    done = subprocess.run([sys.executable, "-c", script], env=environment(), stdout=write, stderr=stderr)
    os.close(write)
    return done


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_leaves_ends_nothing(both):
    done = told_to_nobody(SCRIPT, both)
    assert done.returncode == 0
    assert done.stderr is None or done.stderr.decode().splitlines() == ["nor here"] * 3


def test_a_terminal_that_hangs_up_ends_nothing():
    assert told_to_nobody(SCRIPT, ends=os.openpty).returncode == 0


STOPPED = """
import sys
from rd_deploy.common import Stopped
from rd_train import cli

def command(arguments):
    raise Stopped("stopped; go on with: ...", code=130)

cli.command = command
sys.exit(cli.main())
"""


def test_the_exit_code_is_that_of_the_run_though_nobody_reads_why():
    assert told_to_nobody(STOPPED).returncode == 130


def test_what_is_printed_is_printed(capsys):
    with lasting_output():
        print("here")
        assert sys.stdout.isatty() is False  # as the stream itself says
    assert capsys.readouterr().out == "here\n"
