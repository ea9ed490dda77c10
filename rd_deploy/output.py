"""What a command prints must not end it: a training or an export is worth more than the terminal that hears of it."""

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import TextIO


class _Lasting:
    """A stream whose reader may go away: from then on what is written to it is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._gone = {errno.EPIPE}  # a pipe's reader
        with contextlib.suppress(OSError, AttributeError):  # one without a descriptor, as tests have
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # of a file it means a failing disk
                self._gone.add(errno.EIO)  # a terminal that has hung up

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    def finish(self) -> None:
        """The last flush. What it cannot write is dropped: Python would try again at exit, and end with code 120."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in self._gone:
                raise
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # for what is still in the stream's buffer, too
        os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within it, a reader of stdout or stderr that goes away (``| head``, a ``tee`` that Ctrl-C ended) ends nothing.

    Nor does text that the terminal's encoding has no signs for: it is escaped.
    """
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            if stream is not None:  # as it is where it was closed before Python started: print says nothing to it
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="backslashreplace")
                lasting = _Lasting(stream)
                stack.enter_context(redirect(lasting))
                stack.callback(lasting.finish)
        yield
