"""Text to an indexed dataset: parse, encode and write, streaming, on several threads or processes. The output is the same for any number of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from neox.data.store.indexed import IndexedWriter, token_dtype
from neox.data.text.byte_level import Unsupported
from neox.data.text.encoding import Block, EncodedBlock, Encoding, HFEncoder, NativeEncoder, StartedBlock, encoder_for
from neox.data.text.library_process import LibraryProcess
from neox.data.text.progress import SOURCE_FIELDS, InputIdentity, ProgressFile, ResumePoint, finished_sidecar
from neox.data.text.quarantine import Quarantine
from neox.data.text.reading import BLOCK_BYTES, BadLine, read_blocks
from neox.data.text.tokenizer import TokenizerFile
from neox.errors import ConfigError, DataError, MemoryExhausted

BAD_LINES = ("fail", "skip", "quarantine")
WAITING = 4  # blocks that are encoded or waited for, for each thread or process
NOTE_SECONDS = 20.0  # at most that much work is lost when a run is killed
EXAMPLES = 20  # bad lines that the summary names

log = logging.getLogger("neox.data")

Result = TypeVar("Result", Future, StartedBlock)


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
    encoder: str = "native"
    seconds: float = 0.0

    def add(self, block: EncodedBlock) -> None:
        """Count a block that was written."""
        self.documents += block.sizes.size
        self.tokens += block.tokens.size
        self.text_bytes += block.text_bytes
        self.blank_lines += block.blank
        self.empty_documents += block.empty

    def add_bad(self, bad: BadLine) -> None:
        """Count a bad line; the first ones are kept by name."""
        self.bad_lines += 1
        reason = bad.reason.split(":")[0]
        self.bad_reasons[reason] = self.bad_reasons.get(reason, 0) + 1
        if len(self.bad_examples) < EXAMPLES:
            self.bad_examples.append({"where": bad.where, "reason": bad.reason})


def preprocess(
    files: Sequence[str],
    out: str | os.PathLike[str],
    encoding: Encoding,
    *,
    workers: int = 0,
    bad_lines: str = "fail",
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Summary], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
    note_seconds: float = NOTE_SECONDS,
) -> Summary:
    """Tokenize files (`neox.data.text.input_files.find_files`) into OUT.bin, OUT.idx and OUT.json.

    Args:
        workers: threads that encode, or processes where the tokenizer needs the `tokenizers` library; 0: this one.
        bad_lines: what a line that gives no document does: "fail" stops, "skip" counts it, "quarantine" also keeps it in OUT.quarantine.jsonl.
        resume: go on where a run of the same input, tokenizer and options was ended, by kill -9 too; the output is the same bytes. Where such a
            run was done already, its summary is returned; without one this starts anew. An exception leaves the unfinished files for another try.
        progress: called after each block. block_bytes: text that a worker gets at a time.
        note_seconds: how often it is noted how far the run has come.

    Raises:
        DataError: bad line under "fail" (file:line and reason), no documents, input unreadable or changed, or OUT is there already.
        DiskError: OUT cannot be written. MemoryExhausted: a worker was killed. Without `resume` nothing is left behind in either case.
    """
    if bad_lines not in BAD_LINES:
        raise ConfigError("unknown policy for bad lines", where="--bad-lines", got=bad_lines, want=", ".join(BAD_LINES))
    started, out = time.monotonic(), os.fspath(out)
    with LibraryProcess(encoding.tokenizer, encoding.specials_as_text) as library:  # first, since it takes a while to load
        tokenizer = TokenizerFile(encoding.tokenizer, encoding.eod_token)
        dtype = token_dtype(tokenizer.vocab_size - 1)
        origin = InputIdentity(files, lambda: {**asdict(encoding), "tokenizer": tokenizer.hash, "bad_lines": bad_lines}, block_bytes)
        notes = ProgressFile(out, origin, note_seconds)
        before = notes.read() if resume else None
        if resume and before is None and (whole := finished_sidecar(out, origin.source, files)) is not None:
            return Summary(out, dtype, documents=whole.num_documents, tokens=whole.num_tokens, **{key: whole.source[key] for key in SOURCE_FIELDS})
        summary = Summary(out, dtype, len(files)) if before is None else Summary(**{**before.summary, "out": out})
        started -= summary.seconds
        first = done = 0 if before is None else before.blocks
        blocks = encoded(islice(read_blocks(files, block_bytes, form=encoding.form), first, None), first, encoding, tokenizer, library, workers, summary)
        if before:
            restore_partial_names(out)
        made_by = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "resume": before and before.writer}
        kept = Quarantine(f"{out}.quarantine.jsonl", bad_lines == "quarantine", before.quarantine_bytes if before else 0)
        with IndexedWriter(out, dtype, overwrite=overwrite, **made_by) as writer, kept, partial_files(notes, writer, kept, resume, before):
            for done, block in enumerate(blocks, first + 1):
                write_block(block, writer, kept, summary, bad_lines)
                summary.seconds = time.monotonic() - started
                origin.prepare()  # here, where other threads have work
                if notes.due and summary.documents:
                    notes.note(ResumePoint(done, writer.sync(), kept.sync(), asdict(summary)))
                if progress is not None:
                    progress(summary)
            require_documents(summary, files)
            publish(writer, kept, notes, ResumePoint(done, writer.sync(), kept.sync(), asdict(summary)), origin.source, tokenizer.hash)
        summary.quarantine = str(kept.path) if bad_lines == "quarantine" and summary.bad_lines else None
        summary.seconds = time.monotonic() - started
        return summary


def write_block(block: EncodedBlock, writer: IndexedWriter, kept: Quarantine, summary: Summary, bad_lines: str) -> None:
    """Write a block and count it. Raises DataError for a bad line under "fail"."""
    for bad in block.bad:
        if bad_lines == "fail":
            do = "mend the input, or pass --bad-lines skip or quarantine"
            raise DataError("bad line" if bad.line else "bad file", where=bad.where, got=bad.reason, do=do)
        summary.add_bad(bad)
        kept.keep(bad)
    writer.add_documents(block.tokens, block.sizes)
    summary.add(block)


def require_documents(summary: Summary, files: Sequence[str]) -> None:
    """Raise DataError when nothing was written."""
    if summary.documents == 0:
        got = f"{summary.bad_lines} bad, {summary.blank_lines} blank, {summary.empty_documents} empty in {len(files)} files"
        raise DataError("input has no documents", where=", ".join(files[:3]), got=got)


def publish(writer: IndexedWriter, kept: Quarantine, notes: ProgressFile, progress: ResumePoint, source: str, tokenizer_hash: str) -> None:
    """Give the files their names. There is a note before, for a kill between the renames."""
    notes.note(progress)
    writer.tokenizer_hash = tokenizer_hash
    writer.source = {"hash": source, **{key: progress.summary[key] for key in SOURCE_FIELDS}}
    kept.publish()
    writer.finish()
    notes.remove()


@contextlib.contextmanager
def partial_files(notes: ProgressFile, writer: IndexedWriter, kept: Quarantine, resume: bool, before: ResumePoint | None) -> Iterator[None]:
    """After an exception, what is unfinished stays for another try or is removed."""
    if before is None:
        notes.remove()  # of an earlier run, which is known to have ended since the writer has its files
    try:
        yield
    except BaseException:
        if resume and notes.path.exists():
            writer.keep()
            kept.stays = True
        else:
            notes.remove()
        raise


def restore_partial_names(out: str) -> None:
    """Give files that were published by a run that ended before it was done their temporary names again."""
    for suffix in (".idx", ".bin", ".quarantine.jsonl"):
        final, partial = Path(out + suffix), Path(f"{out}{suffix}.partial")
        if final.exists() and not partial.exists():
            final.rename(partial)


def encoded(
    blocks: Iterable[Block], first: int, encoding: Encoding, tokenizer: TokenizerFile, library: LibraryProcess, workers: int, summary: Summary
) -> Iterator[EncodedBlock]:
    """The blocks encoded, in order, by our encoder where it can; `summary` says by which. `first` is the number of the first block."""
    native = encoder_for(encoding, tokenizer, library)
    if isinstance(native, Unsupported):
        summary.encoder = f"tokenizers ({native})"
        log.warning("%s is encoded by the tokenizers library, which is slower: %s", encoding.tokenizer, native)
        yield from encoded_by_processes(blocks, encoding, workers)
        return
    for block in encoded_by_threads(enumerate(blocks, first), native, workers):
        if native.differs:
            summary.encoder = "tokenizers (csrc/data gave other ids)"
        yield block


def encoded_by_threads(numbered: Iterable[tuple[int, Block]], encoder: NativeEncoder, workers: int) -> Iterator[EncodedBlock]:
    """Encode numbered blocks on threads, or on this one for 0 workers; results come in the order of the blocks, and a bounded number of them waits."""
    with contextlib.closing(encoder.threads(workers)) as threads:
        yield from in_order((encoder.start(number, block, threads) for number, block in numbered), WAITING * workers)


def encoded_by_processes(blocks: Iterable[Block], encoding: Any, workers: int, encode: Callable[[Any, Block], Any] | None = None) -> Iterator[Any]:
    """Encode blocks on worker processes, otherwise as `encoded_by_threads`: by encode(encoding, block), else by the `tokenizers` library.

    Raises:
        MemoryExhausted: a worker died, most likely for want of memory.
    """
    if workers == 0:
        yield from map(HFEncoder(encoding) if encode is None else functools.partial(encode, encoding), blocks)
        return
    import multiprocessing  # these take as long to import as a block of text to encode, and are seldom needed
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")  # fork would copy the threads of this process half-way
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        yield from in_order((executor.submit(encode or encode_block, encoding, block) for block in blocks), WAITING * workers)
    except BrokenProcessPool as error:
        raise MemoryExhausted(
            "a worker process died", where="preprocess", got=error, do="use fewer --workers, or look for the kernel's out-of-memory log"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def in_order(submitted: Iterable[Result], ahead: int) -> Iterator[EncodedBlock]:
    """Results in the order of their submission; `ahead` of them are under way while one is waited for."""
    pending: deque[Result] = deque()
    for future in submitted:
        pending.append(future)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def encode_block(encoding: Encoding, block: Block) -> EncodedBlock:
    """Encode one block, in a worker."""
    return encoder_of(encoding)(block)


@functools.cache
def encoder_of(encoding: Encoding) -> HFEncoder:
    """The encoder of this process: a tokenizer takes long to load."""
    return HFEncoder(encoding)


def start_worker() -> None:
    """Set up a worker: one thread, deaf to Ctrl-C (the parent decides), gone when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent's end, by kill -9 too, and end this process."""
    from multiprocessing import connection, parent_process

    connection.wait([parent_process().sentinel])
    os._exit(1)
