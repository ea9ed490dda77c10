"""Calls in a process of their own, which may die or hang and takes nobody along.

A GPU kernel that faults takes the CUDA context of its process with it: whatever was on the GPU is lost, and nothing can
run there any more. So what is not known to be safe runs here first.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from rd_deploy.common import UserError

Item, Answer = TypeVar("Item"), TypeVar("Answer")
START_SECONDS = 120.0  # for imports


class Fatal(Exception):
    """Raised in a helper: why its process can take no further call."""


class Lost(Exception):
    """A call that has no answer: its process died, hung or had to be given up; the next call gets a new one."""


class NotStarted(RuntimeError):
    """There is no process to call, and would be none for another call."""


class Helper(Generic[Item, Answer]):
    """``function`` in a spawned process, which begins with the first call and ends with the ``with`` block.

    ``function``, its items and its answers are pickled. ``patience``: seconds that a call may take, the process's start
    aside. A `UserError` of ``function`` is one here; whatever else it raises is a `RuntimeError` with its text. One
    that cannot be started is `NotStarted`.
    """

    def __init__(self, function: Callable[[Item], Answer], patience: float):
        self._function, self._patience = function, patience
        self._process, self._connection = None, None

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, item: Item) -> Answer:
        """The answer of ``function(item)``; raises `Lost`."""
        try:
            self._send(item)
            kind, answer = self._receive(self._patience)
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self._end()
            raise Lost(f"its process ended with {code}") from error
        except BaseException:  # Lost, and Ctrl-C: an answer that came now would pass for the next call's
            self._end()
            raise
        if kind == "fatal":
            self._end()
            raise Lost(answer)
        if kind == "refused":
            raise UserError(answer)
        if kind == "error":
            raise RuntimeError(answer)
        return answer

    def _send(self, item: Item) -> None:
        if self._process is not None and not self._process.is_alive():  # it died between two calls
            self._end()
        if self._process is None:
            self._begin()
        self._connection.send(item)

    def _begin(self) -> None:
        context = get_context("spawn")
        try:
            self._connection, theirs = context.Pipe()
        except OSError as error:
            raise NotStarted(f"no pipe to a helping process: {error}") from error
        # What it needs to start is small: `start` would wait for ever for a process that ends before it has read all.
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            process.start()
            self._process = process
            theirs.close()  # only the process holds it now: its end is seen here
            self._receive(START_SECONDS)
            self._connection.send(self._function)
            self._receive(START_SECONDS)
        except (Lost, EOFError, OSError) as error:
            self._end()
            raise NotStarted(
                "a helping process did not start (a script that does this needs `if __name__ == '__main__'`)"
            ) from error
        finally:
            theirs.close()

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise Lost(f"no answer within {seconds:g} s")
        return self._connection.recv()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()  # an idle process ends by itself
        if self._process is not None:
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process = self._connection = None


def _serve(connection: Any) -> None:
    """Take the function, and answer until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the caller ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send("started")
    function = connection.recv()
    connection.send("ready")
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "answer", function(item)
        except Fatal as reason:
            connection.send(("fatal", str(reason)))
            connection.close()
            os._exit(1)  # without the libraries' own endings, which can hang after a fault
        except UserError as reason:
            answer = "refused", str(reason)
        except Exception as error:
            traceback.print_exc()
            answer = "error", f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except OSError:  # nobody waits for it any more
            return


def _end_with_parent() -> None:
    """A caller that was killed ended nothing; a call that hangs would keep the GPU busy for ever."""
    wait([parent_process().sentinel])
    os._exit(1)
