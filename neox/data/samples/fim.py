"""Fill in the middle (Bavarian et al. 2022, arXiv 2207.14255): training samples whose documents are cut in three at two characters, the middle put last.

    prefix, suffix, middle (PSM):  <prefix> p <suffix> s <middle> m
    suffix, prefix, middle (SPM):  <prefix> <suffix> s <middle> p m

The cuts lie at characters and the three parts are encoded anew, as they are when a model is asked to fill in. It happens after samples are cut
from documents (the paper's context level), so that no part is torn away from its sentinels; what no longer fits is taken off the suffix.
What becomes of a sample is a pure function of (seed, data, sample): there is no state to resume.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from neox._native import core
from neox.config.schema import FimConfig, TokenizerConfig
from neox.data.samples.documents import PADDED, PADDING
from neox.data.samples.order import MASK64, order_key
from neox.data.samples.packing import PackedDataset, sample_of
from neox.data.samples.provenance import Coverage, DocumentSlice
from neox.data.samples.sample import Collatable, Dataset, Sample
from neox.data.text.byte_level import Unsupported, byte_of_letter, text_encoder
from neox.data.text.tokenizer import Tokenizer, TokenizerFile
from neox.errors import ConfigError


class Draws:
    """Random numbers by counter: the i-th is a hash of (key, i)."""

    def __init__(self, key: int):
        self._key = key
        self._count = 0

    def below(self, bound: int) -> int:
        """One of 0 to bound - 1."""
        self._count += 1
        return core.mix(self._key, self._count) * bound >> 64

    def happens(self, rate: float) -> bool:
        """True in this share of the calls."""
        return self.below(1 << 53) < rate * (1 << 53)


class Codec(Protocol):
    """Between ids and text."""

    def text(self, ids: list[int]) -> tuple[int, str] | None:
        """(ids at the start that begin inside a character, text of those behind them, a cut character at the end left out); None: they are no text."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64."""


class NativeCodec:
    """Byte-level BPE by csrc/data. Raises Unsupported for another kind of tokenizer."""

    def __init__(self, file: TokenizerFile):
        self._here = core.EncodeThreads(text_encoder(file.content, specials_as_text=False, wide=True), 0)
        letters = byte_of_letter()
        self._bytes: dict[int, bytes] = {
            number: bytes(letters[letter] for letter in token)
            for token, number in file.content["model"]["vocab"].items()
            if all(letter in letters for letter in token)
        }
        self._bytes |= {token["id"]: token["content"].encode() for token in file.content.get("added_tokens") or []}

    def text(self, ids: list[int]) -> tuple[int, str] | None:
        """See Codec."""
        parts = [self._bytes.get(number) for number in ids]
        if None in parts:
            return None
        first, last = 0, len(parts)
        while first < last and parts[first] and 0x80 <= parts[first][0] < 0xC0:
            first += 1
        while last > first:
            try:
                return first, b"".join(parts[first:last]).decode()
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    return None
                last -= 1
        return None

    def encode(self, text: str) -> np.ndarray:
        """See Codec."""
        return self._here.text(text.encode(), -1).result()[0].astype(np.int64)


class HFCodec:
    """Any other tokenizer, by the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def text(self, ids: list[int]) -> tuple[int, str] | None:
        """See Codec."""
        return 0, self._tokenizer.decode(ids)

    def encode(self, text: str) -> np.ndarray:
        """See Codec."""
        return np.array(self._tokenizer.encode(text), dtype=np.int64)


class Transform:
    """Fill in the middle of one document.

    Raises:
        ConfigError: a token that the config names is not in the vocabulary.
    """

    def __init__(self, fim: FimConfig, tokenizer: TokenizerConfig):
        library = Tokenizer(tokenizer.file, tokenizer.eod_token)
        self.fim = fim
        self.eod_id = library.eod_id
        names = {"prefix_token": fim.prefix_token, "middle_token": fim.middle_token, "suffix_token": fim.suffix_token, "split_sample": fim.split_sample}
        ids = {name: library.token_id(token) for name, token in names.items() if token is not None}
        for name, number in ids.items():
            if number is None:
                raise ConfigError(
                    "token is not in the vocabulary",
                    where=f"data.fim.{name}, {tokenizer.file}",
                    got=names[name],
                    do="name the tokenizer's own, or train one with neox tokenizer train --special-token",
                )
        self._prefix, self._middle, self._suffix = (np.array([ids[name]]) for name in ("prefix_token", "middle_token", "suffix_token"))
        self._divider = ids.get("split_sample")
        try:
            self._codec: Codec = NativeCodec(TokenizerFile(tokenizer.file, tokenizer.eod_token))
        except Unsupported:
            self._codec = HFCodec(library)

    def document(self, ids: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """A document's part of a sample, transformed or not, in at most `room` tokens; an end-of-document token stays last."""
        ended = ids.size > 0 and ids[-1] == self.eod_id
        body = ids[:-1] if ended else ids
        out = body
        if draws.happens(self.fim.rate):
            divided = self._divider is not None and self._divider in body
            out = self._fragments(body, room - ended, draws) if divided else self._permuted(body, room - ended, draws)
        return np.concatenate([out, ids[-1:]])[:room] if ended else out[:room]

    def _fragments(self, body: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """Each fragment between dividers for itself."""
        out: list[np.ndarray] = []
        for number, fragment in enumerate(np.split(body, np.flatnonzero(body == self._divider))):
            head, rest = (fragment[:1], fragment[1:]) if number else (fragment[:0], fragment)
            left = room - sum(part.size for part in out) - head.size
            out += [head, self._permuted(rest, left, draws) if draws.happens(self.fim.fragment_rate) else rest]
        return np.concatenate(out)

    def _permuted(self, ids: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """Tokens in the order of fill in the middle; as they are where they are no text, or the suffix is too short to make room."""
        found = self._codec.text(ids.tolist())
        if found is None or (self.fim.no_prefix and found[1].startswith(self.fim.no_prefix)):
            return ids
        torn, text = found
        low, high = sorted((draws.below(len(text) + 1), draws.below(len(text) + 1)))
        prefix, middle, suffix = (self._codec.encode(part) for part in (text[:low], text[low:high], text[high:]))
        excess = torn + prefix.size + middle.size + suffix.size + 3 - room
        if excess > suffix.size:
            return ids
        suffix = suffix[: suffix.size - max(excess, 0)]
        if draws.happens(self.fim.spm_rate):
            parts = [self._prefix, self._suffix, suffix, self._middle, prefix, middle]
        else:
            parts = [self._prefix, prefix, self._suffix, suffix, self._middle, middle]
        return np.concatenate([ids[:torn], *parts])


class FimDataset(Collatable):
    """The samples of a dataset, each document's part of them transformed.

    Args:
        samples: EpochDataset, GptNeoxOrderDataset, PackedDataset or DocumentDataset.
        checksum: of the data; it goes into the random numbers.
    """

    def __init__(self, samples: Dataset, transform: Transform, checksum: int, seed: int, document_mask: bool):
        self.samples = samples
        self._transform = transform
        self._key = order_key(seed, checksum, 0x46494D)  # other numbers than those of the order
        self._document_mask = document_mask

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        tokens, marks = self.samples.tokens_and_segments(index)
        draws = Draws(core.mix(self._key, index & MASK64))
        filled = marks != PADDED
        documents = np.split(tokens[filled], np.flatnonzero(np.diff(marks[filled])) + 1)
        out, numbers = np.full(tokens.size, PADDING, dtype=np.int64), np.full(tokens.size, PADDED, dtype=np.int32)
        at = 0
        for number, document in enumerate(documents):
            made = self._transform.document(document, tokens.size - at, draws)
            out[at : at + made.size], numbers[at : at + made.size] = made, number
            at += made.size
        return sample_of(out, numbers, out, self._document_mask, isinstance(self.samples, PackedDataset))

    def describe(self, index: int, token: int) -> str:
        """Where token `token` of sample `index` comes from; its place is another one before the transform."""
        return f"sample {index} of {', '.join(f'{piece.source}.bin document {piece.document}' for piece in self.slices(index))}, after fill in the middle"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The parts of documents that sample `index` is made of."""
        return self.samples.slices(index)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` that hold a part of a document, int64."""
        return self.samples.find(prefix, document, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read, before the transform."""
        return self.samples.coverage(count)
