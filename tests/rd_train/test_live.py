"""What is seen while a run trains: the figures, on a terminal of its own, and that nothing is seen elsewhere."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import flags

from rd_train.checkpoint import load_checkpoint
from rd_train.live import BLOCKS, View, in_words, shown, sparkline
from rd_train.recipe import Recipe
from rd_train.run import run

ROOT = Path(__file__).resolve().parents[2]
SMALL = Recipe(arch="plain20", width=0.25, epochs=2, teacher_epochs=1, batch_size=50, warmup_epochs=0.2,
               train_limit=100, device="cpu", threads=1, precision="fp32")  # fmt: skip


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_run() -> tuple[View, Clock]:
    """A teacher of 2 epochs of 10 steps, a student of 4 whose steps cost twice as much."""
    clock = Clock()
    view = View(clock)
    view.plan({"teacher": 20.0, "student": 80.0})
    view.start("teacher", 2, 10, 0, [])
    return view, clock


def test_the_time_left_is_that_of_all_phases():
    view, clock = a_run()
    assert view.seconds_left() is None
    clock.now = 10.0
    view.step(5, 100.0, None)  # a twentieth of the work in 10 s
    assert view.seconds_left() == pytest.approx(190)
    view.step(20, 100.0, None)
    view.start("student", 4, 10, 0, [])
    clock.now = 30.0
    view.step(20, 100.0, None)  # 20 + 40 of 100
    assert view.seconds_left() == pytest.approx(20)


def test_a_resumed_run_counts_its_own_pace_only():
    view = View(clock := Clock())
    view.plan({"teacher": 20.0, "student": 80.0})
    view.start("teacher", 2, 10, 20, [{"val_accuracy": 0.5}, {"val_accuracy": 0.7}])
    view.start("student", 4, 10, 20, [{"val_accuracy": 0.1}, {"val_accuracy": 0.2}])
    clock.now = 5.0
    view.step(30, 100.0, {"loss": 1.0, "train_accuracy": 0.3})  # from 60 to 80 of 100
    assert view.seconds_left() == pytest.approx(5)
    assert view.lines() == [
        "loss 1.000",
        "training 30.0%  validation 20.00%, best 20.00% in epoch 2  ▁█",
        "teacher best 70.00%",
    ]


def test_the_best_epoch_is_the_first_of_equals():
    view, _ = a_run()
    for accuracy in (0.2, 0.9, 0.9, 0.1):
        view.epoch({"val_accuracy": accuracy})
    assert view.phases[-1].best == (0.9, 2)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0.5], "▁"),
        ([0.1, 0.1], "▁▁"),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([0.9, 0.8], "█▁"),
        ([i / 7 for i in range(8)], BLOCKS),
    ],
)
def test_sparklines(values, line):
    assert sparkline(values) == line
    assert len(sparkline(values * 100)) == 32


def test_what_is_drawn_and_that_it_changes_no_result(tmp_path, capsys):
    console = pytest.importorskip("rich.console", reason="needs rich, of the extra [train]")
    run(SMALL, tmp_path / "plain")
    lines = capsys.readouterr().out.splitlines()  # no terminal: one line an epoch, as they were
    assert [line.split(":")[0] for line in lines[-3:]] == ["teacher epoch 1", "student epoch 1", "student epoch 2"]
    assert not any("\x1b" in line or "\r" in line for line in lines)
    stream = io.StringIO()
    terminal = console.Console(file=stream, force_terminal=True, width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rd_train.run.shown", lambda view: shown(view, terminal))
        run(SMALL, tmp_path / "drawn")
    one, other = (load_checkpoint(tmp_path / name / "model.pt").state_dict for name in ("plain", "drawn"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "student epoch 2 of 2" in drawn
    assert "images/s, run done in" in drawn
    assert re.search(r"validation \d+\.\d\d%, best \d+\.\d\d% in epoch \d", drawn)
    assert "student epoch 2: loss" in drawn  # what is printed comes through


@pytest.mark.parametrize("width", [20, 60, 200])
def test_any_width_of_terminal(width):
    console = pytest.importorskip("rich.console", reason="needs rich, of the extra [train]")
    view, clock = a_run()
    clock.now = 1.0
    view.step(5, 12345.6, {"loss": 1.0, **{f"splice{k}_ce": 1.0 for k in range(1, 9)}, "train_accuracy": 0.5})
    view.epoch({"val_accuracy": 0.5})
    terminal = console.Console(file=io.StringIO(), force_terminal=True, width=width)
    lines = terminal.render_lines(view.renderable(), pad=False)
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path):
    """In a real pseudo-terminal: the cursor is shown again, the lines are wiped, the settings are the same."""
    pytest.importorskip("rich", reason="needs rich, of the extra [train]")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(slave)
    options = flags(replace(SMALL, epochs=500))
    command = [sys.executable, "-m", "rd_train.cli", "digits", *options, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    seen, deadline = b"", time.monotonic() + 200
    sent = False
    while time.monotonic() < deadline and (process.poll() is None or select.select([master], [], [], 0)[0]):
        if select.select([master], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):
                seen += os.read(master, 65536)
        if not sent and b"student epoch 2 of 500" in seen:
            os.write(master, b"\x03")  # as the key does
            sent = True
    assert process.wait(timeout=60) == 130
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)
    assert seen.count(b"\x1b[?25l") >= 1
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    last = seen[seen.rindex(b"\x1b[?25h") :]
    assert b"go on with: rd-train --resume" in last
    assert b"\x1b[2K" in last  # the lines that were drawn are wiped


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5000, "83 min"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
