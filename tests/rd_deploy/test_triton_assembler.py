"""Which assembler is taken for Hopper; programs that say a version stand for real ones."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rd_deploy.common import UserError
from rd_deploy.triton_kernels import assembler
from rd_deploy.triton_kernels.assembler import VARIABLE, use_assembler, version_of


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that what a test leaves there is taken back
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(assembler, "_right_ones", set())


def program(path: Path, release: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.20'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def places(monkeypatch, tmp_path) -> Path:
    """Only what a test puts there can be found."""
    monkeypatch.setattr(assembler, "BUNDLED", tmp_path / "triton")
    monkeypatch.setattr(assembler, "TOOLKIT", None)
    monkeypatch.setattr(assembler.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assembler.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path


def test_the_first_that_is_new_enough(places):
    program(places / "triton/ptxas", "12.9")
    program(places / "cuda/bin/ptxas", "13.10")
    use_assembler(90)
    assert os.environ[VARIABLE] == str(places / "cuda/bin/ptxas")
    newer = program(places / "triton/ptxas-blackwell", "13.3")
    del os.environ[VARIABLE]
    use_assembler(90)
    assert os.environ[VARIABLE] == str(newer)


def test_other_cards_have_tritons_own(places):
    program(places / "triton/ptxas", "13.3")
    for capability in (80, 89, 100, 120):
        use_assembler(capability)
        assert VARIABLE not in os.environ


def test_a_users_choice_stands_if_it_is_right(places, monkeypatch):
    bundled = program(places / "triton/ptxas-blackwell", "13.3")
    mine = program(places / "mine", "13.4")
    monkeypatch.setenv(VARIABLE, str(mine))
    use_assembler(90)
    use_assembler(90)
    assert os.environ[VARIABLE] == str(mine)
    for wrong in (program(places / "old", "12.8"), places / "missing"):  # torch names its own there, too
        monkeypatch.setenv(VARIABLE, str(wrong))
        with pytest.warns(UserWarning, match="is not ptxas 13.3 or later"):
            use_assembler(90)
        assert os.environ[VARIABLE] == str(bundled)


def test_one_that_may_not_be_run_is_none(places, monkeypatch):
    mine = program(places / "mine", "13.4")
    mine.chmod(0o644)
    monkeypatch.setenv(VARIABLE, str(mine))
    with pytest.raises(UserError, match="found: none"):
        use_assembler(90)


def test_none_is_refused_with_what_was_found(places, monkeypatch):
    monkeypatch.setattr(assembler, "MENDED", (99, 0))
    program(places / "triton/ptxas", "12.8")
    with pytest.raises(UserError, match=r"found: 12\.8 in .*triton/ptxas.*nvidia-cuda-nvcc>=13\.3"):
        use_assembler(90)
    assert VARIABLE not in os.environ


def test_what_is_no_assembler_has_no_version(tmp_path):
    silent = program(tmp_path / "silent", "13.3")
    silent.write_text("#!/bin/sh\necho something else\n")
    assert version_of(silent) is None
    assert version_of(tmp_path / "missing") is None
    failing = program(tmp_path / "failing", "13.3")
    failing.write_text("#!/bin/sh\necho release 13.3\nexit 1\n")
    assert version_of(failing) is None
    assert version_of(program(tmp_path / "one", "13.10")) == (13, 10)


def test_the_real_one_is_found_here():
    """Triton 3.8 brings one that is new enough."""
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("this triton's assemblers are older")
    use_assembler(90)
    assert version_of(Path(os.environ[VARIABLE])) >= assembler.MENDED
