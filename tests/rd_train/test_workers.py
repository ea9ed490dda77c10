"""Worker processes leave with the process that started them, whichever way it goes, and leave it alone meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from photographs import write_imagenet
from processes import environment

from rd_train.workers import MOST, Workers, default_workers


def double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize("count", [0, 2])
def test_results_come_in_order_and_errors_are_raised(count):
    workers = Workers(count)
    try:
        assert workers.map(double, list(range(50))) == list(range(0, 100, 2))
        with pytest.raises(ValueError, match="invalid literal"):
            workers.map(int, ["1", "x", "2"])
        assert workers.map(int, ["3"]) == [3]
    finally:
        workers.close()


def test_workers_that_were_closed_do_not_start_again():
    workers = Workers(1)
    workers.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        workers.map(double, [1])


def test_processes_of_torchrun_share_the_cpus(monkeypatch):
    monkeypatch.setattr("rd_train.workers.available_threads", lambda: 12)
    assert default_workers() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 3
    monkeypatch.setattr("rd_train.workers.available_threads", lambda: 2)
    assert default_workers() == 1
    monkeypatch.setattr("rd_train.workers.available_threads", lambda: 1000)
    assert default_workers() == MOST


def members(session: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def started(command: list[str]) -> subprocess.Popen:
    """A process in a session of its own, as a terminal starts it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment(), start_new_session=True, **pipes)


def assert_gone(session: int) -> None:
    deadline = time.monotonic() + 60
    while members(session):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Ctrl-C sets an event, as in a run (`stop_on_signals`): an exception can strike where Python ignores it, and did once.
SCRIPT = """
import signal, threading
from rd_train.workers import Workers

def main():
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    workers = Workers(2)
    workers.map(abs, [-1])
    print("ready", flush=True)
    while not stop.is_set():
        workers.map(abs, list(range(-100, 0)))
    print(sum(workers.map(abs, [-1, -2])))
    workers.close()

if __name__ == "__main__":
    main()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = started([str(tmp_path / "script.py")])
    assert process.stdout.readline() == "ready\n"
    assert len(members(process.pid)) >= 3  # itself, multiprocessing's resource tracker, one worker or two
    process.kill()
    process.communicate(timeout=60)
    assert_gone(process.pid)


def test_ctrl_c_is_for_the_process_that_trains(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = started([str(tmp_path / "script.py")])
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("3\n", "")
    assert process.returncode == 0
    assert_gone(process.pid)


def test_a_signal_to_all_processes_of_a_run_stops_it_between_two_steps(tmp_path):
    """As a service manager sends it: the workers may be gone before the run knows."""
    write_imagenet(tmp_path / "data", train=40)
    run = tmp_path / "run"
    flags = ["--size=32", "--width=0.0625", "--batch-size=8", "--epochs=1000", "--threads=1", "--workers=2"]
    flags += [f"--data-dir={tmp_path / 'data'}", "--method=ce", f"--out={run}"]
    process = started(["-m", "rd_train.cli", "folder-plain18", *flags])
    for line in process.stdout:
        if "epoch 2" in line:
            break
    for member in members(process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has just ended, with one before it
            os.kill(member, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("rd-train: stopped; go on with")
    assert "Traceback" not in errors
    assert_gone(process.pid)
