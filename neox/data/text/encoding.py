"""Blocks of text to tokens: by our own encoder where it stands in for the tokenizer, proven on the text itself, else by `tokenizers`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from neox._native import core
from neox.data.lazy import Lazy
from neox.data.store.indexed import token_dtype
from neox.data.text.byte_level import Unsupported, text_encoder
from neox.data.text.library_process import LibraryProcess
from neox.data.text.reading import BOM, BadLine, ParsedLines, TextChunk, parse, parse_line
from neox.data.text.tokenizer import Tokenizer, TokenizerFile
from neox.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

COMPARED_FIRST = 1 << 14  # characters of the first block that both encoders must agree on
COMPARED_SLICE = 1 << 11  # characters of a document that are compared, there and later on
COMPARE_EVERY = 4  # blocks: from each such one a slice of a document is compared

log = logging.getLogger("neox.data")


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Args:
        tokenizer: `tokenizers` JSON file. eod_token: see `Tokenizer`.
        append_eod: end each document with the end-of-document token.
        json_key: key of the text in a JSON line.
        specials_as_text: special tokens that occur in the text are encoded as text.
        form: how files are read, see `neox.data.text.input_files.read_as_lines`.
    """

    tokenizer: str
    eod_token: str | None = None
    append_eod: bool = True
    json_key: str = "text"
    specials_as_text: bool = False
    form: str = "auto"


@dataclass(frozen=True)
class EncodedBlock:
    """Documents of one block: `tokens` of the dataset's dtype, cut by `sizes` (int32)."""

    tokens: np.ndarray
    sizes: np.ndarray
    bad: list[BadLine]
    blank: int
    empty: int
    text_bytes: int


Block = list[TextChunk | BadLine]


def size_of(block: Block) -> int:
    """Bytes of text in a block."""
    return sum(len(item.content) for item in block if isinstance(item, TextChunk))


def require_eod(encoding: Encoding, eod_id: int | None) -> None:
    """Raise ConfigError when documents are to end in a token that the tokenizer does not have."""
    if not encoding.append_eod or eod_id is not None:
        return
    want, do = "<|endoftext|>, </s>, <|end_of_text|> or <eos>", "name it by --eod-token, or pass --no-append-eod"
    raise ConfigError("tokenizer has no end-of-document token", where=encoding.tokenizer, want=want, do=do)


class HFEncoder:
    """Encodes blocks by the `tokenizers` library."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self.tokenizer = Tokenizer(encoding.tokenizer, encoding.eod_token, specials_as_text=encoding.specials_as_text)
        require_eod(encoding, self.tokenizer.eod_id)
        self.dtype = token_dtype(self.tokenizer.vocab_size - 1)

    def __call__(self, block: Block) -> EncodedBlock:
        """Parse and encode; documents without text or tokens are left out and counted."""
        parsed = [ParsedLines([], [item], 0) if isinstance(item, BadLine) else parse(item, self._encoding.json_key) for item in block]
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
            text_bytes=size_of(block),
        )


class NativeEncoder:
    """Encodes blocks by csrc/data: about fifty times as fast as `tokenizers`, with the same ids.

    That they are the same is compared on the start of the first block and on a slice of a document of every fourth block. Should they ever
    differ, this says so and hands the block and all later ones to the library.

    Args:
        library: what the ids are compared with; None, or where that process is gone: the library in this process.

    Raises:
        Unsupported: the tokenizer is of another kind, or asks for something that csrc/data does not do.
        DataError: not a tokenizer file. ConfigError: no end-of-document token.
    """

    def __init__(self, encoding: Encoding, file: TokenizerFile, library: LibraryProcess | None = None):
        require_eod(encoding, file.eod_id)
        self._encoding = encoding
        self._other = library
        self.dtype = token_dtype(file.vocab_size - 1)
        self._core = text_encoder(file.content, encoding.specials_as_text, self.dtype == "int32")
        self._here = self.threads(0)
        self._key = encoding.json_key.encode()
        self._eod = file.eod_id if encoding.append_eod else -1
        self.differs = False

    def threads(self, count: int) -> core.EncodeThreads:
        """Threads that encode what `start` gives them, until they are closed; 0: the thread that calls it does."""
        return core.EncodeThreads(self._core, count)

    def start(self, number: int, block: Block, threads: core.EncodeThreads) -> StartedBlock:
        """Have block `number` encoded. To be finished in the order of the blocks."""
        return StartedBlock(self, number, block, [] if self.differs else [self._started(item, threads) for item in block])

    def _started(self, item: TextChunk | BadLine, threads: core.EncodeThreads) -> core.Started | None:
        if isinstance(item, BadLine):
            return None
        return threads.lines(item.content, self._key, self._eod) if item.line else threads.text(item.content.removeprefix(BOM), self._eod)

    def finish(self, number: int, block: Block, started: list[core.Started | None]) -> EncodedBlock:
        """Wait for a block, and compare; documents without text or tokens are left out and counted."""
        if not self.differs and not self._ids_agree(number, block):
            self.differs = True
        if self.differs:
            return self._library(block)
        parts = [
            EncodedChunk(bad=[item]) if isinstance(item, BadLine) else self._part(item, found.result()) for item, found in zip(block, started, strict=True)
        ]
        return EncodedBlock(
            tokens=joined([part.tokens for part in parts], self.dtype),
            sizes=joined([part.sizes for part in parts], "int32"),
            bad=[bad for part in parts for bad in part.bad],
            blank=sum(part.blank for part in parts),
            empty=sum(part.empty for part in parts),
            text_bytes=size_of(block),
        )

    @cached_property
    def _library(self) -> HFEncoder:
        return HFEncoder(self._encoding)

    def _ids_agree(self, number: int, block: Block) -> bool:
        for text in comparison_texts(number, block, self._encoding.json_key):
            ours = self._here.text(text.encode(), -1).result()[0]
            theirs = None if self._other is None else self._other.encode(text)
            if theirs is None:
                theirs = self._library.tokenizer.encode(text)
            if ours.tolist() != theirs:
                log.warning("csrc/data gives other ids than tokenizers for %r: tokenizers encodes from here on. Please report it", text[:200])
                return False
        return True

    def _part(self, piece: TextChunk, found: tuple[np.ndarray, np.ndarray, int, int, list[tuple[int, int, int, int]]] | None) -> EncodedChunk:
        if found is None:
            return EncodedChunk(bad=parse(piece, self._encoding.json_key).bad)
        tokens, sizes, blank, empty, unsure = found
        part = EncodedChunk([], [], [], blank, empty)
        first_token = first_document = 0
        for first, last, line, document in unsure:
            content = piece.content[first:last]
            text, reason = parse_line(content, self._encoding.json_key)
            if reason is not None:
                part.bad.append(BadLine(piece.path, piece.line + line, reason, content))
                continue
            more_tokens, more_sizes, *_ = self._here.text(text.encode(), self._eod).result()
            part.empty += int(more_sizes.size == 0)
            end = first_token + int(sizes[first_document:document].sum(dtype=np.int64))
            part.tokens += [tokens[first_token:end], more_tokens]
            part.sizes += [sizes[first_document:document], more_sizes]
            first_token, first_document = end, document
        part.tokens.append(tokens[first_token:])
        part.sizes.append(sizes[first_document:])
        return part


@dataclass(frozen=True)
class StartedBlock:
    """A block that is being encoded."""

    encoder: NativeEncoder
    number: int
    block: Block
    started: list[core.Started | None]

    def result(self) -> EncodedBlock:
        """Wait for it."""
        return self.encoder.finish(self.number, self.block, self.started)


class EncodedChunk:
    """What one piece gave: arrays that follow one another."""

    def __init__(self, tokens: Iterable[np.ndarray] = (), sizes: Iterable[np.ndarray] = (), bad: Iterable[BadLine] = (), blank: int = 0, empty: int = 0):
        self.tokens, self.sizes, self.bad = list(tokens), list(sizes), list(bad)
        self.blank, self.empty = blank, empty


def joined(arrays: list[list[np.ndarray]], dtype: str) -> np.ndarray:
    """The arrays one after the other; no copy of a single one."""
    flat = [array for part in arrays for array in part]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, dtype=dtype) if flat else np.empty(0, dtype=dtype)


def comparison_texts(number: int, block: Block, key: str) -> Iterable[str]:
    """Texts of a block on which the two encoders are compared: a pure function of the block, so that it does not depend on the workers."""
    pieces = [item for item in block if isinstance(item, TextChunk)]
    if number % COMPARE_EVERY or not pieces:
        return
    if number:
        piece = pieces[number // COMPARE_EVERY % len(pieces)]
        yield from slices(piece, number * 7919 % max(len(piece.content), 1), key, 1)
        return
    left = COMPARED_FIRST
    for piece in pieces:
        for text in slices(piece, 0, key, COMPARED_FIRST // COMPARED_SLICE):
            yield text
            left -= len(text)
            if left <= 0:
                return


def slices(piece: TextChunk, start: int, key: str, most: int) -> Iterable[str]:
    """Up to `most` slices: of the text files from byte `start` on, or of the documents in the lines behind it."""
    if piece.line == 0:
        yield piece.content[start : start + COMPARED_SLICE].decode(errors="ignore")
        return
    at = piece.content.rfind(b"\n", 0, start) + 1
    for _ in range(most):
        end = piece.content.find(b"\n", at)
        line = piece.content[at : end if end >= 0 else None]
        text, reason = parse_line(line, key) if line.strip() else ("", None)
        if reason is None and text:
            yield text[-COMPARED_SLICE:] if start else text[:COMPARED_SLICE]
        if end < 0:
            return
        at = end + 1


def encoder_for(encoding: Encoding, file: TokenizerFile, library: LibraryProcess | None = None) -> NativeEncoder | Unsupported:
    """Our encoder, or why the library is needed."""
    try:
        return NativeEncoder(encoding, file, library)
    except Unsupported as reason:
        return reason
