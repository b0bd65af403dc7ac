"""Tokenizers in the `tokenizers` JSON format: load, encode, train."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from neox import files
from neox.errors import ConfigError, DataError
from neox.files import write_durably

if TYPE_CHECKING:
    import tokenizers

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # in order of preference
LARGEST_VOCABULARY = 1 << 24  # the `tokenizers` library allocates for all of it, and aborts where it cannot
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # of a model of the Hugging Face Hub
SMALLEST_VOCABULARY = 257  # the bytes and the end-of-document token


class TokenizerFile:
    """The JSON file of a tokenizer, read without the `tokenizers` library.

    Args:
        file: `tokenizers` JSON file.
        eod_token: see `Tokenizer`.

    Attributes:
        content: the parsed JSON.
        vocab_size: largest id + 1.
        eod_token: end-of-document token; None if there is none. eod_id likewise.

    Raises:
        DataError: the file cannot be read or is not a tokenizer.
        ConfigError: eod_token is not in the vocabulary.
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
        self._ids: dict[str, int] = {**ids, **added}
        if renumbered:
            Tokenizer(file)  # raises if the library does give a token a different id
        self.eod_token, self.eod_id = find_eod(self.token_id, eod_token, file)

    def token_id(self, token: str) -> int | None:
        """Id of a token; None if there is no such token."""
        return self._ids.get(token)

    @cached_property
    def hash(self) -> str:
        """See `file_hash`."""
        return content_hash(self.content)


def may_be_renumbered(ids: dict[str, int], added: dict[str, int]) -> bool:
    """Whether the `tokenizers` library may give an added token a different id than the file.

    The library numbers the added tokens that the vocabulary lacks consecutively from its size.
    """
    new = [number for token, number in added.items() if token not in ids]
    return new != list(range(len(ids), len(ids) + len(new))) or any(
        ids.get(token, number) != number for token, number in added.items()
    )


def require_same_ids(content: bytes, tokenizer: tokenizers.Tokenizer, file: str | Path) -> None:
    """Check that the library, and therefore transformers, gives each added token the id in the file.

    Raises:
        DataError: a token has two ids.
    """
    for token in parse_content(content, file).get("added_tokens") or []:
        name, number, loaded = token["content"], token["id"], tokenizer.token_to_id(token["content"])
        if loaded != number:
            raise DataError(
                "the tokenizers library changes the id of a token of the file",
                where=f"{file}: added token {name!r}",
                got=f"id {number} in the file, {loaded} in the library and in transformers",
                want="equal ids; the library numbers added tokens consecutively from the size of model.vocab, unless "
                "they are in it",
                do=f"add {name!r}: {number} to model.vocab of the file, or number the added tokens without a gap",
            )


def find_eod(id_of: Callable[[str], int | None], name: str | None, file: str | Path) -> tuple[str | None, int | None]:
    """The end-of-document token and its id: `name`, else the first of EOD_NAMES in the vocabulary, else (None, None).

    Raises:
        ConfigError: `name` is not in the vocabulary.
    """
    if name is not None and id_of(name) is None:
        raise ConfigError(
            "end-of-document token is not in the vocabulary", where=f"tokenizer.eod_token, {file}", got=name
        )
    for candidate in EOD_NAMES if name is None else (name,):
        found = id_of(candidate)
        if found is not None:
            return candidate, found
    return None, None


def load_library(content: bytes, file: str | Path, *, specials_as_text: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer of the `tokenizers` library for the content of a file.

    Args:
        content: of the file.
        file: its path, for errors.
        specials_as_text: encode special tokens that occur in the text as text.

    Raises:
        DataError: not a tokenizer.
    """
    import tokenizers  # takes 0.09 s, a third of `neox data verify`, which only needs TokenizerFile

    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself for any bad file
        raise DataError("not a tokenizer file", where=file, got=error, want="a `tokenizers` JSON file") from error
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = specials_as_text
    return library


class Tokenizer:
    """A tokenizer in the `tokenizers` format.

    Text is encoded without the special tokens that the post-processor of the file adds around it (`<s>`, ...). Special
    tokens that occur *in* the text become their ids, as in GPT-NeoX.

    Args:
        file: `tokenizers` JSON file.
        eod_token: end-of-document token; None for the first of EOD_NAMES in the vocabulary.
        specials_as_text: encode special tokens that occur in the text as text.
        end_ids: further ids that end a generated text.

    Attributes:
        eod_token: end-of-document token; None if there is none. eod_id likewise.
        end_ids: `end_ids` and the end-of-document id.

    Raises:
        DataError: the file is missing or not a tokenizer.
        ConfigError: eod_token is not in the vocabulary.
    """

    def __init__(
        self,
        file: str | Path,
        eod_token: str | None = None,
        *,
        specials_as_text: bool = False,
        end_ids: Iterable[int] = (),
    ):
        self.file = str(file)
        self._bytes = read_bytes(file)
        self._tokenizer = load_library(self._bytes, self.file, specials_as_text=specials_as_text)
        require_same_ids(self._bytes, self._tokenizer, self.file)
        self.eod_token, self.eod_id = find_eod(self._tokenizer.token_to_id, eod_token, self.file)
        self.end_ids = frozenset(end_ids) | frozenset(() if self.eod_id is None else (self.eod_id,))

    @cached_property
    def hash(self) -> str:
        """See `file_hash`."""
        return content_hash(parse_content(self._bytes, self.file))

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, template: bool = False) -> list[int]:
        """Token ids of a text; with `template`, between the special tokens of `template_tokens`."""
        return self._tokenizer.encode(text, add_special_tokens=template).ids

    @cached_property
    def template_tokens(self) -> tuple[list[int], list[int]]:
        """Special tokens that the post-processor of the file adds before and after a text."""
        bare, full = self.encode("a"), self.encode("a", template=True)
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        return full[:at], full[at + len(bare) :]

    def token_text(self, number: int) -> str | None:
        """The token with an id; None if there is no such id."""
        return self._tokenizer.id_to_token(number) if 0 <= number < self.vocab_size else None

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text and, for each, the characters [start, end) that it encodes."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token_id(self, token: str) -> int | None:
        """Id of a token; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on as many threads as TOKENIZERS_PARALLELISM allows."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Ids outside the vocabulary (padding rows of a model) give no text."""
        known = [number for number in map(int, ids) if 0 <= number < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)


def file_hash(file: str | Path) -> str:
    """SHA-256 of the JSON values of a tokenizer, independent of the formatting of the file.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    return content_hash(parse_content(read_bytes(file), file))


def read_bytes(file: str | Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return files.read_bytes(file)
    except OSError as error:
        do = advice_for(str(file))
        raise DataError("cannot read tokenizer", where=file, got=error.strerror, do=do) from error


def advice_for(name: str) -> str:
    """What to name instead of a tokenizer's file that cannot be read: a folder's file, or a download of a model's."""
    inside = Path(name) / "tokenizer.json"
    if inside.is_file():
        return f"name {inside}"
    do = "name a `tokenizers` JSON file, such as neox tokenizer train writes"
    if HUB_NAME.fullmatch(name) and not name.endswith(".json") and not os.path.lexists(name):
        do += "; if this is a model of the Hugging Face Hub, download its tokenizer.json and name that file"
    return do


def parse_content(content: bytes, file: str | Path) -> files.JsonValue:
    """The JSON values of a tokenizer's file.

    Raises:
        DataError: it is not JSON.
    """
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
    """Train a byte-level BPE tokenizer, which can encode any text, and write it.

    Args:
        texts: the corpus, read once.
        vocab_size: number of ids, including the 256 bytes and the end-of-document token. A small corpus may give fewer.
        out: JSON file to write.
        eod_token: end-of-document token; its id is 0.
        special_tokens: further tokens that are never split; their ids follow the end-of-document token.
        show_progress: show a progress bar on stderr.

    Raises:
        ConfigError: vocab_size below 257 and one more for each further special token, or above 2^24; an empty token.
        DataError: no text.
        DiskError: the file cannot be written.
    """
    least = SMALLEST_VOCABULARY + len(set(special_tokens) - {eod_token})
    if vocab_size > LARGEST_VOCABULARY:
        want = f"at most {LARGEST_VOCABULARY}"
        raise ConfigError("vocabulary is too large", where="--vocab-size", got=vocab_size, want=want)
    if not all((eod_token, *special_tokens)):
        raise ConfigError("special token is empty", where="--eod-token, --special-token", want="at least one character")
    if vocab_size < least:
        raise ConfigError(
            "vocabulary is too small for byte-level BPE", where="--vocab-size", got=vocab_size, want=f"at least {least}"
        )
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
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise DataError("no text to train a tokenizer on", got="0 characters", do="name files with text")
    write_durably(Path(out), tokenizer.to_str(pretty=True).encode())
    return Tokenizer(out, eod_token)
