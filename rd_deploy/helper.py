"""Calls in a process of their own, which may die or hang and takes nobody along.

A GPU kernel that faults takes the CUDA context of its process with it: whatever was on the GPU is lost, and nothing can
run there any more. So what is not known to be safe runs here first.
"""

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from rd_deploy.common import UserError

Item, Answer = TypeVar("Item"), TypeVar("Answer")


class Fatal(Exception):
    """Raised in a helper: why its process can take no further call."""


class Lost(Exception):
    """A call that has no answer: its process died, hung or had to be given up; the next call gets a new one."""


class Helper(Generic[Item, Answer]):
    """``function`` in a spawned process, which begins with the first call and ends with the ``with`` block.

    ``function``, its items and its answers are pickled. ``patience``: seconds that a call may take, the process's start
    aside, for which ``start`` seconds are allowed. A `UserError` of ``function`` is one here; whatever else it raises
    is a `RuntimeError` with its text.
    """

    def __init__(self, function: Callable[[Item], Answer], patience: float, start: float = 120.0):
        self._function, self._patience, self._start = function, patience, start
        self._process, self._connection = None, None

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, item: Item) -> Answer:
        """The answer of ``function(item)``; raises `Lost`."""
        if self._process is None:
            self._begin()
        try:
            self._connection.send(item)
            kind, answer = self._receive(self._patience)
        except Lost:
            self._end()
            raise
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self._end()
            raise Lost(f"its process ended with {code}") from error
        if kind == "fatal":
            self._end()
            raise Lost(answer)
        if kind == "refused":
            raise UserError(answer)
        if kind == "error":
            raise RuntimeError(answer)
        return answer

    def _begin(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()  # only the process holds it now: its end is seen here
        try:
            self._receive(self._start)
        except (Lost, EOFError, OSError) as error:
            self._end()
            raise RuntimeError(
                "a helping process did not start (a script that does this needs `if __name__ == '__main__'`)"
            ) from error

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise Lost(f"no answer within {seconds:g} s")
        return self._connection.recv()

    def _end(self) -> None:
        if self._process is None:
            return
        self._connection.close()  # an idle process ends by itself
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def _serve(connection: Any, function: Callable[[Any], Any]) -> None:
    """Answer until nobody asks any more."""
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
            answer = "error", f"{type(error).__name__}: {error}"
        connection.send(answer)
