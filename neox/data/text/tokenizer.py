"""Tokenizers in the `tokenizers` JSON format: load, encode, train."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from neox import files
from neox.data.text.hf_tokenizers import load_hf_tokenizer
from neox.errors import ConfigError, DataError
from neox.files import write_durably

if TYPE_CHECKING:
    import tokenizers

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # looked for in this order
SMALLEST_VOCABULARY = 257  # the bytes and the end-of-document token


class TokenizerFile:
    """A tokenizer's JSON file as it is: its `content`, its hash and what it says about ids. Reads it without the `tokenizers` library.

    Args:
        file: `tokenizers` JSON file.
        eod_token: see `Tokenizer`.

    Raises:
        DataError: the file cannot be read or is not a tokenizer. ConfigError: eod_token is not in the vocabulary.
    """

    def __init__(self, file: str | Path, eod_token: str | None = None):
        self.content = parse_content(read_bytes(file), file)
        try:
            vocabulary = self.content["model"]["vocab"]
            ids = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, *_) in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in self.content.get("added_tokens") or []}
            self.vocab_size = max(max(ids.values(), default=-1), max(added.values(), default=-1)) + 1
            renumbered = may_be_renumbered(ids, added)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError("not a tokenizer file", where=file, got=error, want="a `tokenizers` JSON file") from error
        if renumbered:
            Tokenizer(file)  # which raises where the library does give it another id
        self.eod_token, self.eod_id = find_eod(lambda name: added.get(name, ids.get(name)), eod_token, file)

    @cached_property
    def hash(self) -> str:
        """See `file_hash`. Takes as long as a megabyte of text."""
        return content_hash(self.content)


def may_be_renumbered(ids: dict[str, int], added: dict[str, int]) -> bool:
    """Whether the `tokenizers` library may give an added token another id than the file: it counts those that the vocabulary lacks on from its size."""
    new = [number for token, number in added.items() if token not in ids]
    return new != list(range(len(ids), len(ids) + len(new))) or any(ids.get(token, number) != number for token, number in added.items())


def require_same_ids(content: bytes, tokenizer: tokenizers.Tokenizer, file: str | Path) -> None:
    """Refuse a file whose added tokens get other ids from the library, and so from transformers, than the file names.

    Raises:
        DataError: a token has two ids.
    """
    for token in parse_content(content, file).get("added_tokens") or []:
        name, number, kept = token["content"], token["id"], tokenizer.token_to_id(token["content"])
        if kept != number:
            raise DataError(
                "tokenizer file gives a token an id that the tokenizers library does not keep",
                where=f"{file}: added token {name!r}",
                got=f"id {number} in the file, {kept} in the library and in transformers",
                want="one id: the library numbers added tokens on from the size of model.vocab, unless they are in it",
                do=f"add {name!r}: {number} to model.vocab of the file, or number the added tokens without a gap",
            )


def find_eod(id_of: Callable[[str], int | None], name: str | None, file: str | Path) -> tuple[str | None, int | None]:
    """The end-of-document token and its id: the one that is named, else the first of EOD_NAMES that exists, else (None, None).

    Raises:
        ConfigError: the one that is named does not exist.
    """
    if name is not None and id_of(name) is None:
        raise ConfigError("end-of-document token is not in the vocabulary", where=f"tokenizer.eod_token, {file}", got=name)
    for candidate in EOD_NAMES if name is None else (name,):
        found = id_of(candidate)
        if found is not None:
            return candidate, found
    return None, None


class Tokenizer:
    """A tokenizer and what neox needs to know of it.

    Text is encoded without the special tokens that a template would add around it (`<s>`, ...). Special tokens that occur *in* the text
    become their ids, as upstream does it; with `specials_as_text` they are encoded like any other text.

    Args:
        file: `tokenizers` JSON file.
        eod_token: end-of-document token; None: the first of `<|endoftext|>`, `</s>`, `<|end_of_text|>`, `<eos>` that exists.

        end_ids: further ids that end a generated text; `end_ids` holds them and the end-of-document id.

    Raises:
        DataError: the file is missing or not a tokenizer.
        ConfigError: eod_token is not in the vocabulary.
    """

    def __init__(self, file: str | Path, eod_token: str | None = None, *, specials_as_text: bool = False, end_ids: Iterable[int] = ()):
        self.file = str(file)
        self._bytes = read_bytes(file)
        try:
            self._tokenizer = load_hf_tokenizer(self._bytes, specials_as_text)
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise DataError("not a tokenizer file", where=self.file, got=error, want="a `tokenizers` JSON file") from error
        require_same_ids(self._bytes, self._tokenizer, self.file)
        self.eod_token, self.eod_id = find_eod(self._tokenizer.token_to_id, eod_token, self.file)
        self.end_ids = frozenset(end_ids) | frozenset(() if self.eod_id is None else (self.eod_id,))

    @cached_property
    def hash(self) -> str:
        """See `file_hash`."""
        return content_hash(parse_content(self._bytes, self.file))

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, template: bool = False) -> list[int]:
        """Token ids of a text; with `template`, inside the special tokens that transformers puts around a text (`template_tokens`)."""
        return self._tokenizer.encode(text, add_special_tokens=template).ids

    @cached_property
    def template_tokens(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text, as the file's post-processor puts them."""
        plain, full = self.encode("a"), self.encode("a", template=True)
        at = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
        return full[:at], full[at + len(plain) :]

    def token_text(self, number: int) -> str | None:
        """The token of an id; None: there is no such id."""
        return self._tokenizer.id_to_token(number) if 0 <= number < self.vocab_size else None

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text and, for each, the characters [start, end) that it stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text; None: there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; uses the threads that TOKENIZERS_PARALLELISM allows."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Ids beyond the vocabulary (padding rows of a model) give no text."""
        known = [number for number in map(int, ids) if 0 <= number < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)


def file_hash(file: str | Path) -> str:
    """SHA-256 of a tokenizer's content: the same for the same JSON values, however the file is laid out.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    return content_hash(parse_content(read_bytes(file), file))


def read_bytes(file: str | Path) -> bytes:
    """The content of a file. Raises DataError."""
    try:
        return files.read_bytes(file)
    except OSError as error:
        raise DataError("cannot read tokenizer", where=file, got=error.strerror, do="name a file that neox tokenizer train wrote") from error


def parse_content(content: bytes, file: str | Path) -> object:
    """The JSON values of a tokenizer's file. Raises DataError."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise DataError("not a tokenizer file", where=file, got=error, want="a `tokenizers` JSON file") from error


def content_hash(content: object) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out: str | Path,
    *,
    eod_token: str = EOD_NAMES[0],
    special_tokens: Sequence[str] = (),
    show_progress: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer (every byte string can be encoded) and write it.

    Args:
        texts: the corpus, read once.
        vocab_size: ids wanted, bytes and end-of-document token included; a small corpus may give fewer.
        out: JSON file to write.
        special_tokens: further tokens that are matched as a whole; they get the ids behind the end-of-document token's.

    Raises:
        ConfigError: vocab_size below 257.
        DataError: no text.
        DiskError: the file cannot be written.
    """
    least = SMALLEST_VOCABULARY + len(set(special_tokens) - {eod_token})
    if vocab_size < least:
        raise ConfigError("vocabulary is too small for byte-level BPE", where="--vocab-size", got=vocab_size, want=f"at least {least}")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys([eod_token, *special_tokens])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if seen == 0:
        raise DataError("no text to train a tokenizer on", got="0 characters")
    write_durably(Path(out), tokenizer.to_str(pretty=True).encode())
    return Tokenizer(out, eod_token)
