"""Text to an indexed dataset: parse, encode and write as a stream, on several threads or processes.

The output is the same for any number of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from neox.data.store.indexed import IndexedWriter, token_dtype
from neox.data.text.byte_level import Unsupported
from neox.data.text.encoding import Block, EncodedBlock, Encoding, HFEncoder, NativeEncoder, encoder_for
from neox.data.text.progress import SOURCE_FIELDS, InputIdentity, ProgressFile, ResumePoint, finished_sidecar
from neox.data.text.quarantine import Quarantine
from neox.data.text.reading import BLOCK_BYTES, BadLine, bad_line_error, read_blocks
from neox.data.text.tokenizer import TokenizerFile
from neox.data.text.worker_processes import worker_processes
from neox.errors import ConfigError, DataError
from neox.printing import counted

BAD_LINES = ("fail", "skip", "quarantine")
WAITING = 4  # blocks in flight per thread or process
SAVE_SECONDS = 20.0  # a killed run loses at most this much work
EXAMPLES = 20  # bad lines that the summary names

log = logging.getLogger("neox.data")

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)
Settings = TypeVar("Settings")


class Pending(Protocol[Result]):
    """A result that can be waited for: a `Future` or a `StartedBlock`."""

    def result(self) -> Result:
        """Wait for the result."""
        ...


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
        """Count a bad line; the first ones are listed as examples."""
        self.bad_lines += 1
        reason = bad.reason.split(":")[0]
        self.bad_reasons[reason] = self.bad_reasons.get(reason, 0) + 1
        if len(self.bad_examples) < EXAMPLES:
            self.bad_examples.append({"where": bad.where, "reason": bad.reason})


@dataclass(frozen=True)
class Options:
    """How a run works; the tokens do not depend on it.

    Attributes:
        workers: threads that encode, or processes if the tokenizer needs the `tokenizers` library; 0 for the calling
            thread.
        bad_lines: what to do with a line that gives no document: "fail" stops, "skip" counts it, "quarantine" also
            stores it in OUT.quarantine.jsonl.
        overwrite: replace an existing dataset.
        resume: continue a run of the same input, tokenizer and options that was ended, by kill -9 too. The output is
            the same bytes. If that run had finished, its summary is returned. If there is none, the run starts from the
            beginning. An exception leaves the unfinished files for the next attempt.
        block_bytes: bytes of text per block.
        save_seconds: time between two saves of the progress.

    Raises:
        ConfigError: unknown value of bad_lines.
    """

    workers: int = 0
    bad_lines: str = "fail"
    overwrite: bool = False
    resume: bool = False
    block_bytes: int = BLOCK_BYTES
    save_seconds: float = SAVE_SECONDS

    def __post_init__(self) -> None:
        if self.bad_lines not in BAD_LINES:
            raise ConfigError(
                "unknown policy for bad lines", where="--bad-lines", got=self.bad_lines, want=", ".join(BAD_LINES)
            )


DEFAULTS = Options()


def preprocess(
    files: Sequence[str],
    out: str | os.PathLike[str],
    encoding: Encoding,
    options: Options = DEFAULTS,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Tokenize files into OUT.bin, OUT.idx and OUT.json. Without `resume`, an exception leaves no file.

    Args:
        files: input files; see `neox.data.text.input_files.find_files`.
        out: prefix of the dataset.
        encoding: how documents become tokens.
        options: how the run works.
        progress: called after each block.

    Raises:
        DataError: a bad line under "fail" (file:line and reason), no documents, input unreadable or changed, or OUT
            exists.
        DiskError: OUT cannot be written.
        MemoryExhausted: a worker was killed.
    """
    started, out = time.monotonic(), os.fspath(out)
    tokenizer = TokenizerFile(encoding.tokenizer, encoding.eod_token)
    dtype = token_dtype(tokenizer.vocab_size - 1)
    settings = {**encoding.settings(), "tokenizer": tokenizer.hash, "bad_lines": options.bad_lines}
    inputs = InputIdentity(files, settings, options.block_bytes)
    progress_file = ProgressFile(out, inputs, options.save_seconds)
    before = progress_file.read() if options.resume else None
    if options.resume and before is None and (found := finished_summary(out, inputs.source, files)) is not None:
        return found
    summary = Summary(out, dtype, len(files)) if before is None else Summary(**{**before.summary, "out": out})
    started -= summary.seconds
    first = 0 if before is None else before.blocks
    read = islice(read_blocks(files, options.block_bytes, form=encoding.form), first, None)
    blocks = encoded(read, first, encoding, tokenizer, options.workers, summary)
    if before is not None:
        restore_partial_names(out)
    made_by = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    writer = IndexedWriter(
        out, dtype, overwrite=options.overwrite, **made_by, resume=None if before is None else before.writer
    )
    quarantine = Quarantine(
        f"{out}.quarantine.jsonl", options.bad_lines == "quarantine", before.quarantine_bytes if before else 0
    )
    output = Output(writer, quarantine, progress_file, summary, options, first)
    # closing: after an error, worker processes end before it is reported, and not at the interpreter's exit
    with writer, quarantine, output.partial_files(before), contextlib.closing(blocks):
        for block in blocks:
            output.write(block)
            summary.seconds = time.monotonic() - started
            output.save_if_due()
            if progress is not None:
                progress(summary)
        require_documents(summary, files)
        output.publish(inputs.source, tokenizer.hash)
    summary.quarantine = str(quarantine.path) if options.bad_lines == "quarantine" and summary.bad_lines else None
    summary.seconds = time.monotonic() - started
    return summary


@dataclass
class Output:
    """The files that a run writes, and its counts; `blocks` is the number of blocks that were written."""

    writer: IndexedWriter
    quarantine: Quarantine
    progress_file: ProgressFile
    summary: Summary
    options: Options
    blocks: int

    def write(self, block: EncodedBlock) -> None:
        """Write a block and count it.

        Raises:
            DataError: a bad line under "fail".
        """
        for bad in block.bad:
            if self.options.bad_lines == "fail":
                raise bad_line_error(bad)
            self.summary.add_bad(bad)
            self.quarantine.add(bad)
        self.writer.add_documents(block.tokens, block.sizes)
        self.summary.add(block)
        self.blocks += 1

    def save_if_due(self) -> None:
        """Save the progress if it is time to."""
        if self.progress_file.due and self.summary.documents:
            self.save()

    def save(self) -> None:
        """Make the files durable, and save the progress."""
        point = ResumePoint(self.blocks, self.writer.sync(), self.quarantine.sync(), asdict(self.summary))
        self.progress_file.save(point)

    def publish(self, source: str, tokenizer_hash: str) -> None:
        """Give the files their final names. The progress is saved first, in case of a kill between the renames."""
        self.save()
        counts = asdict(self.summary)
        self.writer.tokenizer_hash = tokenizer_hash
        self.writer.source = {"hash": source, **{key: counts[key] for key in SOURCE_FIELDS}}
        self.quarantine.publish()
        self.writer.finish()
        self.progress_file.remove()

    @contextlib.contextmanager
    def partial_files(self, before: ResumePoint | None) -> Iterator[None]:
        """After an exception, keep the unfinished files for the next attempt with `resume`, else remove them."""
        if before is None:
            # of an earlier run, which has ended, since this writer holds the lock on its files
            self.progress_file.remove()
        try:
            yield
        except BaseException:
            if self.options.resume and self.progress_file.path.exists():
                self.writer.keep()
                self.quarantine.keep_partial = True
            else:
                self.progress_file.remove()
            raise


def require_documents(summary: Summary, files: Sequence[str]) -> None:
    """Raise DataError if no document was written."""
    if summary.documents == 0:
        got = (
            f"{summary.bad_lines} bad, {summary.blank_lines} blank, {summary.empty_documents} empty in "
            f"{counted(len(files), 'file')}"
        )
        raise DataError("input has no documents", where=", ".join(files[:3]), got=got)


def finished_summary(out: str, source: str, files: Sequence[str]) -> Summary | None:
    """The summary of the finished dataset OUT, if it was made from `source`; else None."""
    sidecar = finished_sidecar(out, source, files)
    if sidecar is None or sidecar.source is None:
        return None
    counts = {key: sidecar.source[key] for key in SOURCE_FIELDS}
    return Summary(out, sidecar.dtype, documents=sidecar.num_documents, tokens=sidecar.num_tokens, **counts)


def restore_partial_names(out: str) -> None:
    """Give files that an interrupted run had already published their temporary names back."""
    for suffix in (".idx", ".bin", ".quarantine.jsonl"):
        final, partial = Path(out + suffix), Path(f"{out}{suffix}.partial")
        if final.exists() and not partial.exists():
            final.rename(partial)


def encoded(
    blocks: Iterable[Block], first: int, encoding: Encoding, tokenizer: TokenizerFile, workers: int, summary: Summary
) -> Generator[EncodedBlock, None, None]:
    """Encode blocks, the first of which is number `first`, in order and natively if possible.

    Records the encoder in `summary`.
    """
    native = encoder_for(encoding, tokenizer)
    if isinstance(native, Unsupported):
        summary.encoder = f"tokenizers ({native})"
        log.warning("%s is encoded by the tokenizers library, which is slower: %s", encoding.tokenizer, native)
        if workers == 0:
            yield from map(HFEncoder(encoding), blocks)
        else:
            yield from encoded_by_processes(blocks, encoding, workers, encode_block)
        return
    for block in encoded_by_threads(enumerate(blocks, first), native, workers):
        if native.differs:
            summary.encoder = "tokenizers (csrc/data gave different ids)"
        yield block


def encoded_by_threads(
    numbered: Iterable[tuple[int, Block]], encoder: NativeEncoder, workers: int
) -> Iterator[EncodedBlock]:
    """Encode numbered blocks on threads (0: the calling one), in order and with a bounded number in flight."""
    with contextlib.closing(encoder.threads(workers)) as threads:
        yield from in_order((encoder.start(number, block, threads) for number, block in numbered), WAITING * workers)


def encoded_by_processes(
    blocks: Iterable[Block], settings: Settings, workers: int, encode: Callable[[Settings, Block], T]
) -> Generator[T, None, None]:
    """Encode blocks by encode(settings, block) on worker processes, in order and with a bounded number in flight.

    Raises:
        MemoryExhausted: a worker died, most likely because memory ran out.
    """
    with worker_processes(workers) as executor:
        yield from in_order((executor.submit(encode, settings, block) for block in blocks), WAITING * workers)


def in_order(submitted: Iterable[Pending[T]], ahead: int) -> Iterator[T]:
    """Results in the order of submission, with `ahead` more in flight."""
    pending: deque[Pending[T]] = deque()
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
    """The encoder of this process, loaded once."""
    return HFEncoder(encoding)
