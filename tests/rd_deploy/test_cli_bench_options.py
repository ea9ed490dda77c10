"""``rd-bench``: options that are empty, or that begin with a tilde."""

import pytest

from rd_deploy.bench.models import load_subject
from rd_deploy.cli_bench import _parse
from rd_deploy.common import UserError

TEXT_OPTIONS = ("--compare", "--engines", "--batch", "--precision", "--card", "--out")


@pytest.mark.parametrize("option", TEXT_OPTIONS)
def test_empty_options_are_not_taken_for_none(option):
    with pytest.raises(UserError, match=f"{option} is empty; give a value"):
        _parse(["plain20", option, ""])


def test_an_empty_model():
    with pytest.raises(UserError, match="MODEL is empty; give a value"):
        _parse([""])


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _parse(["plain20", "--out=~/results"]).out == str(tmp_path / "results")
    assert _parse(["plain20"]).out == "bench"
    with pytest.raises(UserError, match="no such user"):
        _parse(["plain20", "--out=~nobody-of-this-name/results"])


@pytest.mark.parametrize("suffix", ["onnx", "pt"])
def test_so_it_is_in_the_name_of_a_network(monkeypatch, tmp_path, suffix):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/a.{suffix} does not exist"):
        load_subject(f"~/a.{suffix}")
