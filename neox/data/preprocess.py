"""Text to an indexed dataset: parse, encode and write, streaming, on several processes. The output is the same for any number of them."""

from __future__ import annotations

import base64
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import orjson

from neox.data.files import sync_folder
from neox.data.indexed import IndexedWriter, token_dtype
from neox.data.text import BLOCK_BYTES, Bad, Parsed, Piece, parse, read_blocks
from neox.data.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError, DiskError, MemoryExhausted

BAD_LINES = ("fail", "skip", "quarantine")
EXAMPLES = 20  # bad lines that the summary names


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Args:
        tokenizer: `tokenizers` JSON file. eod_token: see `Tokenizer`.
        append_eod: end each document with the end-of-document token.
        json_key: key of the text in a JSON line.
        specials_as_text: special tokens that occur in the text are encoded as text.
    """

    tokenizer: str
    eod_token: str | None = None
    append_eod: bool = True
    json_key: str = "text"
    specials_as_text: bool = False


@dataclass(frozen=True)
class EncodedBlock:
    """Documents of one block: `tokens` of the dataset's dtype, cut by `sizes` (int32)."""

    tokens: np.ndarray
    sizes: np.ndarray
    bad: list[Bad]
    blank: int
    empty: int
    text_bytes: int


@dataclass
class Summary:
    """What a run read, wrote and left out."""

    out: str
    dtype: str
    files: int
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    blank_lines: int = 0
    empty_documents: int = 0
    bad_lines: int = 0
    bad_reasons: dict[str, int] = field(default_factory=dict)
    bad_examples: list[dict[str, str]] = field(default_factory=list)
    quarantine: str | None = None
    seconds: float = 0.0

    def add(self, block: EncodedBlock) -> None:
        """Count a block that was written."""
        self.documents += block.sizes.size
        self.tokens += block.tokens.size
        self.text_bytes += block.text_bytes
        self.blank_lines += block.blank
        self.empty_documents += block.empty

    def add_bad(self, bad: Bad) -> None:
        """Count a bad line; the first ones are kept by name."""
        self.bad_lines += 1
        reason = bad.reason.split(":")[0]
        self.bad_reasons[reason] = self.bad_reasons.get(reason, 0) + 1
        if len(self.bad_examples) < EXAMPLES:
            self.bad_examples.append({"where": bad.where, "reason": bad.reason})


class Encoder:
    """Turns blocks of text into tokens."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self.tokenizer = Tokenizer(encoding.tokenizer, encoding.eod_token, specials_as_text=encoding.specials_as_text)
        if encoding.append_eod and self.tokenizer.eod_id is None:
            raise ConfigError(
                "tokenizer has no end-of-document token",
                where=encoding.tokenizer,
                want="<|endoftext|>, </s>, <|end_of_text|> or <eos>",
                do="name it by --eod-token, or pass --no-append-eod",
            )
        self.dtype = token_dtype(self.tokenizer.vocab_size - 1)

    def __call__(self, block: list[Piece | Bad]) -> EncodedBlock:
        """Parse and encode; documents without text or tokens are left out and counted."""
        parsed = [Parsed([], [item], 0) if isinstance(item, Bad) else parse(item, self._encoding.json_key) for item in block]
        texts = [text for part in parsed for text in part.texts]
        filled = [text for text in texts if text]
        encoded = [ids for ids in self.tokenizer.encode_batch(filled) if ids]
        if self._encoding.append_eod:
            for ids in encoded:
                ids.append(self.tokenizer.eod_id)
        sizes = np.fromiter((len(ids) for ids in encoded), dtype=np.int32, count=len(encoded))
        tokens = np.empty(int(sizes.sum(dtype=np.int64)), dtype=self.dtype)
        start = 0
        for ids in encoded:
            tokens[start : start + len(ids)] = ids
            start += len(ids)
        return EncodedBlock(
            tokens=tokens,
            sizes=sizes,
            bad=[bad for part in parsed for bad in part.bad],
            blank=sum(part.blank for part in parsed),
            empty=len(texts) - len(encoded),
            text_bytes=sum(len(item.content) for item in block if isinstance(item, Piece)),
        )


def preprocess(
    files: Sequence[str],
    out: str | os.PathLike[str],
    encoding: Encoding,
    *,
    workers: int = 0,
    bad_lines: str = "fail",
    overwrite: bool = False,
    progress: Callable[[Summary], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Summary:
    """Tokenize files (`neox.data.text.find_files`) into OUT.bin, OUT.idx and OUT.json.

    Args:
        workers: processes that encode; 0: this one.
        bad_lines: what a line that gives no document does: "fail" stops, "skip" counts it, "quarantine" also keeps it in OUT.quarantine.jsonl.
        progress: called after each block. block_bytes: text that a worker gets at a time.

    Raises:
        DataError: bad line under "fail" (file:line and reason), no documents, input unreadable, or OUT is there already.
        DiskError: OUT cannot be written. MemoryExhausted: a worker was killed. Nothing is left behind in either case.
    """
    if bad_lines not in BAD_LINES:
        raise ConfigError("unknown policy for bad lines", where="--bad-lines", got=bad_lines, want=", ".join(BAD_LINES))
    started = time.monotonic()
    encoder = Encoder(encoding)
    tokenizer = encoder.tokenizer
    summary = Summary(os.fspath(out), encoder.dtype, len(files))
    made_by = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    read = read_blocks(files, block_bytes)
    blocks = encoded_blocks(read, encoding, workers) if workers > 0 else map(encoder, read)
    kept = f"{summary.out}.quarantine.jsonl"
    with IndexedWriter(out, encoder.dtype, overwrite=overwrite, **made_by) as writer, quarantine(kept, bad_lines == "quarantine") as keep:
        for block in blocks:
            for bad in block.bad:
                if bad_lines == "fail":
                    do = "mend the input, or pass --bad-lines skip or quarantine"
                    raise DataError("bad line" if bad.line else "bad file", where=bad.where, got=bad.reason, do=do)
                summary.add_bad(bad)
                keep(bad)
            writer.add_documents(block.tokens, block.sizes)
            summary.add(block)
            summary.seconds = time.monotonic() - started
            if progress is not None:
                progress(summary)
        if summary.documents == 0:
            got = f"{summary.bad_lines} bad, {summary.blank_lines} blank, {summary.empty_documents} empty in {len(files)} files"
            raise DataError("input has no documents", where=", ".join(files[:3]), got=got)
    summary.quarantine = kept if bad_lines == "quarantine" and summary.bad_lines else None
    summary.seconds = time.monotonic() - started
    return summary


@contextlib.contextmanager
def quarantine(path: str, enabled: bool) -> Iterator[Callable[[Bad], None]]:
    """Gives a function that keeps bad lines in `path` as {file, line, reason, content_base64}; the file appears at the end, if there were any.

    Raises:
        DiskError: it cannot be written.
    """
    if not enabled:
        yield lambda bad: None
        return
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            yield lambda bad: file.write(quarantine_record(bad)) and None
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if size:
            os.replace(partial, path)
            sync_folder(partial.parent)
    except OSError as error:
        raise DiskError("cannot write quarantine", where=path, got=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)


def quarantine_record(bad: Bad) -> bytes:
    """One line of the quarantine file."""
    content = None if bad.content is None else base64.b64encode(bad.content).decode()
    record = {"file": bad.path, "line": bad.line, "reason": bad.reason, "content_base64": content}
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def encoded_blocks(blocks: Iterable[list[Piece | Bad]], encoding: Encoding, workers: int) -> Iterator[EncodedBlock]:
    """Encode blocks on worker processes; results come in the order of the blocks, and at most 2 x workers + 1 are under way.

    Raises:
        MemoryExhausted: a worker died, most likely for want of memory.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of this process half-way
    pending: deque[Future[EncodedBlock]] = deque()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        for block in blocks:
            pending.append(executor.submit(encode_block, encoding, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise MemoryExhausted(
            "a worker process died", where="preprocess", got=error, do="use fewer --workers, or look for the kernel's out-of-memory log"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def encode_block(encoding: Encoding, block: list[Piece | Bad]) -> EncodedBlock:
    """Encode one block, in a worker."""
    return encoder_of(encoding)(block)


@functools.cache
def encoder_of(encoding: Encoding) -> Encoder:
    """The encoder of this process: a tokenizer takes long to load."""
    return Encoder(encoding)


def start_worker() -> None:
    """Set up a worker: one thread, deaf to Ctrl-C (the parent decides), gone when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent's end, by kill -9 too, and end this process."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
