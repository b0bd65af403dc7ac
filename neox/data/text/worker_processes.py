"""Worker processes for tokenizers that csrc/data does not support, and for conversations.

multiprocessing is imported in the functions: few runs need it, and it takes a tenth of the time of a small one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from neox.errors import MemoryExhausted

if TYPE_CHECKING:
    from concurrent.futures.process import ProcessPoolExecutor


@contextlib.contextmanager
def worker_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that run what is submitted to them, until the end of the `with`.

    Raises:
        MemoryExhausted: a worker died, most likely because memory ran out.
    """
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    # fork would copy the threads of this process in an inconsistent state
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        yield executor
    except BrokenProcessPool as error:
        do = "use fewer --workers, or check the kernel's out-of-memory log"
        raise MemoryExhausted("a worker process died", where="preprocess", got=error, do=do) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Set up a worker: one thread, SIGINT ignored because the parent handles it, ended with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the end of the parent, by kill -9 too, and end this process."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)  # sys.exit would end only this thread
