"""Fill in the middle (Bavarian et al. 2022, arXiv 2207.14255): documents are cut in three and the middle comes last.

    prefix, suffix, middle (PSM):  <prefix> p <suffix> s <middle> m
    suffix, prefix, middle (SPM):  <prefix> <suffix> s <middle> p m

The cuts are between characters, and the three parts are encoded separately, as when a model fills in a text. The
transform is applied after samples are cut from documents (the context level of the paper), so that parts and sentinels
stay together; what no longer fits is removed from the suffix. The result is a pure function of (seed, data, sample), so
there is no state to resume.
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
    """Counter-based random numbers: number i is a hash of (key, i)."""

    def __init__(self, key: int):
        self._key = key
        self._count = 0

    def below(self, bound: int) -> int:
        """An integer from 0 to bound - 1."""
        self._count += 1
        return core.mix(self._key, self._count) * bound >> 64

    def happens(self, rate: float) -> bool:
        """True with probability `rate`."""
        return self.below(1 << 53) < rate * (1 << 53)


class Codec(Protocol):
    """Converts between ids and text."""

    def text(self, ids: list[int]) -> tuple[int, str] | None:
        """The text of ids; None if they are not text.

        Returns:
            The number of leading ids that begin inside a character, and the text of the others, without an incomplete
            character at the end.
        """
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64."""
        ...


class NativeCodec:
    """Byte-level BPE by csrc/data.

    Raises:
        Unsupported: the tokenizer is of another kind.
    """

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
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        first, last = 0, len(known)
        while first < last and known[first] and 0x80 <= known[first][0] < 0xC0:
            first += 1
        while last > first:
            try:
                return first, b"".join(known[first:last]).decode()
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

    Args:
        fim: the config section data.fim.
        tokenizer: the config section tokenizer, which names a file.

    Raises:
        ConfigError: a token that the config names is not in the vocabulary.
    """

    def __init__(self, fim: FimConfig, tokenizer: TokenizerConfig):
        file = str(tokenizer.file)
        library = Tokenizer(file, tokenizer.eod_token)
        self.fim = fim
        self.eod_id = library.eod_id
        names = {
            "prefix_token": fim.prefix_token,
            "middle_token": fim.middle_token,
            "suffix_token": fim.suffix_token,
            "split_sample": fim.split_sample,
        }
        ids = {name: library.token_id(token) for name, token in names.items() if token is not None}
        for name, number in ids.items():
            if number is None:
                raise ConfigError(
                    "token is not in the vocabulary",
                    where=f"data.fim.{name}, {tokenizer.file}",
                    got=names[name],
                    do="name a token of the tokenizer, or train one with neox tokenizer train --special-token",
                )
        self._prefix, self._middle, self._suffix = (
            np.array([ids[name]]) for name in ("prefix_token", "middle_token", "suffix_token")
        )
        self._divider = ids.get("split_sample")
        try:
            self._codec: Codec = NativeCodec(TokenizerFile(file, tokenizer.eod_token))
        except Unsupported:
            self._codec = HFCodec(library)

    def document(self, ids: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """The tokens of a document in a sample, transformed or not, at most `room`.

        An end-of-document token stays last.
        """
        ended = ids.size > 0 and ids[-1] == self.eod_id
        body = ids[:-1] if ended else ids
        out = body
        if draws.happens(self.fim.rate):
            divided = self._divider is not None and self._divider in body
            out = self._fragments(body, room - ended, draws) if divided else self._permuted(body, room - ended, draws)
        return np.concatenate([out, ids[-1:]])[:room] if ended else out[:room]

    def _fragments(self, body: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """Transform each fragment between dividers separately."""
        out: list[np.ndarray] = []
        for number, fragment in enumerate(np.split(body, np.flatnonzero(body == self._divider))):
            head, rest = (fragment[:1], fragment[1:]) if number else (fragment[:0], fragment)
            left = room - sum(part.size for part in out) - head.size
            out += [head, self._permuted(rest, left, draws) if draws.happens(self.fim.fragment_rate) else rest]
        return np.concatenate(out)

    def _permuted(self, ids: np.ndarray, room: int, draws: Draws) -> np.ndarray:
        """Tokens in the order of fill in the middle; unchanged if they are not text or do not fit."""
        found = self._codec.text(ids.tolist())
        if found is None or (self.fim.no_prefix and found[1].startswith(self.fim.no_prefix)):
            return ids
        partial, text = found  # `partial` ids begin inside a character
        low, high = sorted((draws.below(len(text) + 1), draws.below(len(text) + 1)))
        prefix, middle, suffix = (self._codec.encode(part) for part in (text[:low], text[low:high], text[high:]))
        excess = partial + prefix.size + middle.size + suffix.size + 3 - room
        if excess > suffix.size:
            return ids
        suffix = suffix[: suffix.size - max(excess, 0)]
        if draws.happens(self.fim.spm_rate):
            parts = [self._prefix, self._suffix, suffix, self._middle, prefix, middle]
        else:
            parts = [self._prefix, prefix, self._suffix, suffix, self._middle, middle]
        return np.concatenate([ids[:partial], *parts])


class SegmentedDataset(Dataset, Protocol):
    """A dataset that gives the tokens of a sample and the segment of each."""

    def tokens_and_segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [s + 1] and their segments int32 [s + 1], PADDED for padding."""
        ...


class FimDataset(Collatable):
    """The samples of a dataset, with each document of them transformed.

    Args:
        samples: the dataset.
        transform: the transform of a document.
        checksum: checksum of the data, which the random numbers depend on.
        seed: seed of the random numbers.
        document_mask: give segment ids.
    """

    def __init__(self, samples: SegmentedDataset, transform: Transform, checksum: int, seed: int, document_mask: bool):
        self.samples = samples
        self._transform = transform
        self._key = order_key(seed, checksum, 0x46494D)  # different numbers than those of the order
        self._document_mask = document_mask

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        tokens, segments = self.samples.tokens_and_segments(index)
        draws = Draws(core.mix(self._key, index & MASK64))
        filled = segments != PADDED
        documents = np.split(tokens[filled], np.flatnonzero(np.diff(segments[filled])) + 1)
        out, numbers = np.full(tokens.size, PADDING, dtype=np.int64), np.full(tokens.size, PADDED, dtype=np.int32)
        at = 0
        for number, document in enumerate(documents):
            transformed = self._transform.document(document, tokens.size - at, draws)
            out[at : at + transformed.size], numbers[at : at + transformed.size] = transformed, number
            at += transformed.size
        return sample_of(out, numbers, out, self._document_mask, isinstance(self.samples, PackedDataset))

    def describe(self, index: int, token: int) -> str:
        """The documents of sample `index`; the transform moves tokens within them."""
        documents = ", ".join(f"{part.source}.bin document {part.document}" for part in self.slices(index))
        return f"sample {index} of {documents}, after fill in the middle"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        return self.samples.slices(index)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        return self.samples.find(prefix, document, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source, before the transform."""
        return self.samples.coverage(count)
