"""Encodes blocks of text: natively if csrc/data supports the tokenizer, else by `tokenizers`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from neox._native import core
from neox.data.store.indexed import token_dtype
from neox.data.text.byte_level import Unsupported, text_encoder
from neox.data.text.reading import BOM, BadLine, ParsedLines, TextChunk, parse, parse_line
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, load_library, read_bytes
from neox.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")  # in order of preference
COMPARED_FIRST = 1 << 14  # characters of the first block that both encoders must agree on
COMPARED_SLICE = 1 << 11  # characters per compared slice of a document
COMPARE_EVERY = 4  # blocks: one slice of each such block is compared

log = logging.getLogger("neox.data")

NativeResult: TypeAlias = "tuple[np.ndarray, np.ndarray, int, int, list[tuple[int, int, int, int]]]"


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Attributes:
        tokenizer: `tokenizers` JSON file.
        eod_token: end-of-document token; see `Tokenizer`.
        append_eod: end each document with the end-of-document token.
        json_key: key of the text in a JSON line.
        specials_as_text: encode special tokens that occur in the text as text.
        form: how files are read; see `neox.data.text.input_files.read_as_lines`.
        prepend_bos: begin each document with the beginning-of-sequence token, as the tokenizers of Llama do.
        bos_token: that token; None for the first of BOS_NAMES in the vocabulary.
    """

    tokenizer: str
    eod_token: str | None = None
    append_eod: bool = True
    json_key: str = "text"
    specials_as_text: bool = False
    form: str = "auto"
    prepend_bos: bool = False
    bos_token: str | None = None

    def settings(self) -> dict[str, object]:
        """The settings that the output depends on.

        Without prepend_bos they are those of datasets made before it existed.
        """
        found = asdict(self)
        if not self.prepend_bos:
            del found["prepend_bos"], found["bos_token"]
        return found


@dataclass(frozen=True)
class EncodedBlock:
    """The documents of one block: `tokens` in the dtype of the dataset, split by `sizes` (int32)."""

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


def eod_to_append(encoding: Encoding, eod_id: int | None) -> int | None:
    """The id that ends each document; None if none is to be appended.

    Raises:
        ConfigError: the tokenizer has no end-of-document token.
    """
    if not encoding.append_eod:
        return None
    if eod_id is None:
        want = "<|endoftext|>, </s>, <|end_of_text|> or <eos>"
        do = "name it by --eod-token, or by tokenizer.eod_token in a config; or pass --no-append-eod to neox preprocess"
        raise ConfigError("tokenizer has no end-of-document token", where=encoding.tokenizer, want=want, do=do)
    return eod_id


def bos_to_prepend(encoding: Encoding, id_of: Callable[[str], int | None]) -> int | None:
    """The id that begins each document; None if none is to be prepended.

    Raises:
        ConfigError: the tokenizer has no beginning-of-sequence token.
    """
    if not encoding.prepend_bos:
        return None
    for name in BOS_NAMES if encoding.bos_token is None else (encoding.bos_token,):
        found = id_of(name)
        if found is not None:
            return found
    raise ConfigError(
        "tokenizer has no beginning-of-sequence token",
        where=encoding.tokenizer,
        got=encoding.bos_token,
        want=" or ".join(BOS_NAMES) if encoding.bos_token is None else "a token of the vocabulary",
        do="name it by --bos-token",
    )


class HFEncoder:
    """Encodes blocks by the `tokenizers` library."""

    def __init__(self, encoding: Encoding):
        self._encoding = encoding
        self.tokenizer = Tokenizer(encoding.tokenizer, encoding.eod_token, specials_as_text=encoding.specials_as_text)
        eod, bos = eod_to_append(encoding, self.tokenizer.eod_id), bos_to_prepend(encoding, self.tokenizer.token_id)
        self._before, self._after = [] if bos is None else [bos], [] if eod is None else [eod]
        self.dtype = token_dtype(self.tokenizer.vocab_size - 1)

    def __call__(self, block: Block) -> EncodedBlock:
        """Parse and encode. Documents without text or tokens are left out and counted."""
        import numpy as np

        parsed = [
            ParsedLines([], [item], 0) if isinstance(item, BadLine) else parse(item, self._encoding.json_key)
            for item in block
        ]
        texts = [text for part in parsed for text in part.texts]
        filled = [text for text in texts if text]
        encoded = [[*self._before, *ids, *self._after] for ids in self.tokenizer.encode_batch(filled) if ids]
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

    The ids are compared with those of the library on the start of the first block and on a slice of a document of every
    fourth block. If they ever differ, this logs a warning and encodes that block and all later ones by the library.

    Raises:
        Unsupported: the tokenizer is of another kind, or needs something that csrc/data does not support.
        DataError: not a tokenizer file.
        ConfigError: no end-of-document or beginning-of-sequence token.
    """

    def __init__(self, encoding: Encoding, file: TokenizerFile):
        eod, bos = eod_to_append(encoding, file.eod_id), bos_to_prepend(encoding, file.token_id)
        self._eod, self._bos = -1 if eod is None else eod, -1 if bos is None else bos
        self._encoding = encoding
        self.dtype = token_dtype(file.vocab_size - 1)
        self._core = text_encoder(file.content, encoding.specials_as_text, self.dtype == "int32")
        self._here = self.threads(0)
        self._key = encoding.json_key.encode()
        self.differs = False

    def threads(self, count: int) -> core.EncodeThreads:
        """Threads for `start`, until they are closed. With 0 threads, `start` encodes in the calling thread."""
        return core.EncodeThreads(self._core, count)

    def start(self, number: int, block: Block, threads: core.EncodeThreads) -> StartedBlock:
        """Start to encode block `number`. The results must be taken in the order of the blocks."""
        return StartedBlock(self, number, block, [] if self.differs else [self._start(item, threads) for item in block])

    def _start(self, item: TextChunk | BadLine, threads: core.EncodeThreads) -> core.Started | None:
        if isinstance(item, BadLine):
            return None
        if item.line:
            return threads.lines(item.content, self._key, self._eod, self._bos)
        return threads.text(item.content.removeprefix(BOM), self._eod, self._bos)

    def finish(self, number: int, block: Block, started: list[core.Started | None]) -> EncodedBlock:
        """Wait for a block and compare it. Documents without text or tokens are left out and counted."""
        if not self.differs and not self._ids_agree(number, block):
            self.differs = True
        if self.differs:
            return self._replacement(block)
        parts: list[EncodedChunk] = []
        for item, chunk in zip(block, started, strict=True):
            if isinstance(item, BadLine):
                parts.append(EncodedChunk(bad=[item]))
            elif chunk is not None:
                parts.append(self._part(item, chunk))
        return EncodedBlock(
            tokens=concatenated([part.tokens for part in parts], self.dtype),
            sizes=concatenated([part.sizes for part in parts], "int32"),
            bad=[bad for part in parts for bad in part.bad],
            blank=sum(part.blank for part in parts),
            empty=sum(part.empty for part in parts),
            text_bytes=size_of(block),
        )

    @cached_property
    def _replacement(self) -> HFEncoder:
        return HFEncoder(self._encoding)

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        file = self._encoding.tokenizer
        return load_library(read_bytes(file), file, specials_as_text=self._encoding.specials_as_text)

    def _ids_agree(self, number: int, block: Block) -> bool:
        for text in comparison_texts(number, block, self._encoding.json_key):
            ours = self._here.text(text.encode(), -1).result()[0]
            if ours.tolist() != self._library.encode(text, add_special_tokens=False).ids:
                log.warning(
                    "csrc/data and tokenizers give different ids for %r: the rest is encoded by tokenizers. Please "
                    "report this",
                    text[:200],
                )
                return False
        return True

    def _part(self, chunk: TextChunk, started: core.Started) -> EncodedChunk:
        found: NativeResult | None = started.result()
        if found is None:  # a text that is not UTF-8
            return EncodedChunk(bad=parse(chunk, self._encoding.json_key).bad)
        tokens, sizes, blank, empty, unsure = found
        part = EncodedChunk(blank=blank, empty=empty)
        first_token = first_document = 0
        for first, last, line, document in unsure:
            content = chunk.content[first:last]
            text, reason = parse_line(content, self._encoding.json_key)
            if reason is not None:
                part.bad.append(BadLine(chunk.path, chunk.line + line, reason, content))
                continue
            more_tokens, more_sizes, *_ = self._here.text(text.encode(), self._eod, self._bos).result()
            part.empty += int(more_sizes.size == 0)
            end = first_token + int(sizes[first_document:document].sum(dtype="int64"))
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
        """Wait for the block."""
        return self.encoder.finish(self.number, self.block, self.started)


@dataclass
class EncodedChunk:
    """The result of one chunk: arrays to concatenate."""

    tokens: list[np.ndarray] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    blank: int = 0
    empty: int = 0


def concatenated(arrays: list[list[np.ndarray]], dtype: str) -> np.ndarray:
    """The concatenated arrays; a single one is not copied."""
    import numpy as np

    flat = [array for part in arrays for array in part]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, dtype=dtype) if flat else np.empty(0, dtype=dtype)


def comparison_texts(number: int, block: Block, key: str) -> Iterable[str]:
    """Texts of a block on which the two encoders are compared: a function of the block alone."""
    chunks = [item for item in block if isinstance(item, TextChunk)]
    if number % COMPARE_EVERY or not chunks:
        return
    if number:
        chunk = chunks[number // COMPARE_EVERY % len(chunks)]
        yield from slices(chunk, number * 7919 % max(len(chunk.content), 1), key, 1)
        return
    left = COMPARED_FIRST
    for chunk in chunks:
        for text in slices(chunk, 0, key, COMPARED_FIRST // COMPARED_SLICE):
            yield text
            left -= len(text)
            if left <= 0:
                return


def slices(chunk: TextChunk, start: int, key: str, most: int) -> Iterable[str]:
    """Up to `most` slices: of a text file from byte `start`, or of the documents in the lines from there."""
    if chunk.line == 0:
        yield chunk.content[start : start + COMPARED_SLICE].decode(errors="ignore")
        return
    at = chunk.content.rfind(b"\n", 0, start) + 1
    for _ in range(most):
        end = chunk.content.find(b"\n", at)
        line = chunk.content[at : end if end >= 0 else None]
        text, reason = parse_line(line, key) if line.strip() else ("", None)
        if reason is None and text:
            yield text[-COMPARED_SLICE:] if start else text[:COMPARED_SLICE]
        if end < 0:
            return
        at = end + 1


def encoder_for(encoding: Encoding, file: TokenizerFile) -> NativeEncoder | Unsupported:
    """The native encoder, or the reason why the library is needed."""
    try:
        return NativeEncoder(encoding, file)
    except Unsupported as reason:
        return reason
