"""Processes that die, hang and fail, and what their caller sees of it."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rd_deploy.common import UserError
from rd_deploy.helper import Fatal, Helper, Lost


def work(item):
    """What an item asks for."""
    if item == "die":
        os.abort()
    if item == "leave":
        os._exit(3)
    if item == "hang":
        time.sleep(600)
    if item == "fatal":
        raise Fatal("the context is gone")
    if item == "fail":
        raise ValueError("no such thing")
    if item == "refuse":
        raise UserError("use bf16")
    return item, os.getpid()


class NotThere:
    """Can be sent, but not made again; more follows."""

    def __init__(self, more: bytes):
        self.more = more

    def __reduce__(self):
        return os._exit, (1,), None, iter([self.more])

    def __call__(self, item):
        return item


def test_one_process_answers_until_it_is_lost():
    with Helper(work, 60) as helper:
        first, process = helper("a")
        assert first == "a"
        assert process != os.getpid()
        assert helper("b") == ("b", process)
        with pytest.raises(RuntimeError, match="ValueError: no such thing"):
            helper("fail")
        with pytest.raises(UserError, match="use bf16"):
            helper("refuse")
        assert helper("c") == ("c", process)


@pytest.mark.parametrize(
    ("item", "reason"),
    [("die", "its process ended with -6"), ("leave", "its process ended with 3"), ("fatal", "the context is gone")],
)
def test_the_next_call_has_a_new_process(item, reason):
    with Helper(work, 60) as helper:
        _, before = helper("a")
        with pytest.raises(Lost, match=reason):
            helper(item)
        _, after = helper("b")
    assert after != before


def test_one_that_hangs_is_ended():
    with Helper(work, 3) as helper:
        _, process = helper("a")
        with pytest.raises(Lost, match="no answer within 3 s"):
            helper("hang")
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_one_that_died_between_two_calls_is_nobodys_fault():
    with Helper(work, 60) as helper:
        _, process = helper("a")
        os.kill(process, signal.SIGKILL)
        helper._process.join()
        answer, after = helper("b")
    assert answer == "b"
    assert after != process


def test_an_interrupted_calls_answer_is_not_the_next_ones(monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt  # not by a signal: pytest's own process must not get one

    with Helper(work, 60) as helper:
        _, before = helper("a")
        with monkeypatch.context() as patch:
            patch.setattr(helper, "_receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                helper("b")
        answer, after = helper("c")
    assert answer == "c"
    assert after != before


def test_one_whose_caller_is_killed_ends():
    """In the midst of a call, when nothing is read and no end of a pipe is seen."""
    script = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_helper import work
from rd_deploy.helper import Helper
if __name__ == "__main__":
    with Helper(work, 600) as helper:
        print(helper("a")[1], flush=True)
        threading.Timer(0.5, os._exit, [1]).start()
        helper("hang")
"""
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True)
    process = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


def test_it_ends_with_its_block():
    with Helper(work, 60) as helper:
        _, process = helper("a")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_one_that_does_not_start_is_told(size):
    """It ends while it reads what it is to be: before, or in the midst of being written to."""
    with Helper(NotThere(bytes(size)), 60) as helper, pytest.raises(RuntimeError, match="did not start"):
        helper("a")


def test_what_cannot_be_sent_is_told_and_leaves_nothing():
    with Helper(lambda item: item, 60) as helper, pytest.raises((AttributeError, pickle.PicklingError)):
        helper("a")
