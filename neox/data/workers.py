"""Blocks encoded on worker processes: where the `tokenizers` library is needed, and for conversations. Importing this takes as long as starting to encode."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from neox.data.encode import Block, EncodedBlock, Encoding, LibraryEncoder
from neox.data.preprocess import in_order
from neox.errors import MemoryExhausted


def encoded_by_processes(blocks: Iterable[Block], encoding: Any, workers: int, encode: Callable[[Any, Block], Any] | None = None) -> Iterator[Any]:
    """Encode blocks on worker processes, otherwise as `encoded_by_threads`: by encode(encoding, block), else by the `tokenizers` library.

    Raises:
        MemoryExhausted: a worker died, most likely for want of memory.
    """
    if workers == 0:
        yield from map(LibraryEncoder(encoding) if encode is None else functools.partial(encode, encoding), blocks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of this process half-way
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        yield from in_order((executor.submit(encode or encode_block, encoding, block) for block in blocks), 2 * workers)
    except BrokenProcessPool as error:
        raise MemoryExhausted(
            "a worker process died", where="preprocess", got=error, do="use fewer --workers, or look for the kernel's out-of-memory log"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def encode_block(encoding: Encoding, block: Block) -> EncodedBlock:
    """Encode one block, in a worker."""
    return encoder_of(encoding)(block)


@functools.cache
def encoder_of(encoding: Encoding) -> LibraryEncoder:
    """The encoder of this process: a tokenizer takes long to load."""
    return LibraryEncoder(encoding)


def start_worker() -> None:
    """Set up a worker: one thread, deaf to Ctrl-C (the parent decides), gone when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent's end, by kill -9 too, and end this process."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
