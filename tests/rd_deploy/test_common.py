"""What every command does with an error."""

import numpy as np
import pytest

from rd_deploy.common import run_command


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
