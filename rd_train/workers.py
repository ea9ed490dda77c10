"""Worker processes that stay for a whole run, and work that is a pure function of what they are sent.

They are new processes (multiprocessing's ``spawn``), which import no torch: a fork of the training process, with its
threads, can hang. They end with the process that started them, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import TypeVar

from rd_deploy.common import UserError
from rd_deploy.cpus import available_threads

Item, Result = TypeVar("Item"), TypeVar("Result")
MOST = 16  # by default: more decode faster than a GPU learns


def default_workers() -> int:
    """As many as this process may use CPUs, shared among the processes of torchrun, and at most 16."""
    return max(1, min(MOST, available_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Workers:
    """``count`` processes, started when there is work; with 0 the caller does it.

    Everything is sent to them by one thread. Ctrl-C is blocked in it, and so in the workers that it starts: it is for
    the process that trains, and raised in the main thread, where it cannot leave the pool half changed.
    """

    def __init__(self, count: int = 0):
        self.count = count
        self._sender = ThreadPoolExecutor(1, "workers")
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
        """``[function(item) for item in items]``, with the first error raised; callable from several threads."""
        if not self.count:
            return [function(item) for item in items]
        futures: list[Future] = []
        try:
            futures = self._sender.submit(self._send, function, items).result()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError("a worker process died (no memory left, or killed); try fewer --workers, or 0") from error
        finally:
            for future in futures:
                future.cancel()

    def _send(self, function: Callable[[Item], Result], items: list[Item]) -> list[Future]:
        if self._pool is None:
            resource_tracker.ensure_running()  # before: starting it would unblock Ctrl-C
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_start)
        return [self._pool.submit(function, item) for item in items]

    def close(self) -> None:
        """End the processes; what they were at is finished, what waits is dropped, and there is no more."""
        self._sender.shutdown(cancel_futures=True)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start() -> None:
    """In a new worker."""
    os.setpgid(0, 0)  # a signal to the group is for the process that trains, which may still need this one to finish
    warnings.simplefilter("ignore")  # of decoders about files that they could read nevertheless
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # also when it was killed
    os._exit(1)
