"""Blocks to tokens: options that both encoders must follow, types of ids, and what is compared when."""

from __future__ import annotations

import contextlib
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers

from neox.data.text import encoding as module
from neox.data.text.encoding import (
    COMPARE_EVERY,
    COMPARED_FIRST,
    COMPARED_SLICE,
    Encoding,
    HFEncoder,
    NativeEncoder,
    bos_to_prepend,
    comparison_texts,
    concatenated,
    eod_to_append,
    slices,
)
from neox.data.text.reading import BadLine, TextChunk
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, train_tokenizer
from neox.errors import ConfigError

TEXTS = [f"document {i} é日" for i in range(12)]


@pytest.fixture
def tokenizer(tmp_path) -> str:
    return train_tokenizer(TEXTS, 320, tmp_path / "t.json").file


def lines_of(texts: list[str], key: str = "text") -> TextChunk:
    return TextChunk("a.jsonl", 1, b"".join(orjson.dumps({key: text}) + b"\n" for text in texts))


def encoded(native: NativeEncoder, number: int, block: list) -> list[list[int]]:
    with contextlib.closing(native.threads(0)) as threads:
        found = native.start(number, block, threads).result()
    return [part.tolist() for part in np.split(found.tokens, np.cumsum(found.sizes)[:-1])]


def test_what_is_compared_is_pinned():
    assert (COMPARED_FIRST, COMPARED_SLICE, COMPARE_EVERY) == (16_384, 2048, 4)


def test_the_text_is_found_under_its_key_by_both_encoders(tokenizer):
    """Also in lines that the native parser leaves, and in the comparison."""
    made = Tokenizer(tokenizer)
    encoding = Encoding(tokenizer, json_key="body")
    block = [
        lines_of(["ab", "é日"], "body"),
        TextChunk("b.jsonl", 5, b'{"b\\u006fdy": "escaped", "text": "no"}\n{"text": "x"}'),
    ]
    wanted = [[*made.encode(text), made.eod_id] for text in ("ab", "é日", "escaped")]
    native = NativeEncoder(encoding, TokenizerFile(tokenizer))
    assert encoded(native, 0, block) == wanted and not native.differs
    found = HFEncoder(encoding)(block)
    assert found.tokens.tolist() == list(chain(*wanted)) and [(bad.path, bad.line) for bad in found.bad] == [
        ("b.jsonl", 6)
    ]
    with contextlib.closing(native.threads(0)) as threads:
        (bad,) = native.start(1, block, threads).result().bad
    assert (bad.path, bad.line, bad.reason, bad.content) == ("b.jsonl", 6, "no key 'body'", b'{"text": "x"}')


def test_after_a_difference_every_block_is_encoded_by_the_library(tokenizer, caplog):
    """Those that were started before, those that are started later, and without a second warning."""
    file = TokenizerFile(tokenizer)
    del file.content["model"]["merges"][:20]
    native = NativeEncoder(Encoding(tokenizer), file)
    made = Tokenizer(tokenizer)
    block = [lines_of(TEXTS), BadLine("b.jsonl", 3, "why", None)]
    wanted = [[*made.encode(text), made.eod_id] for text in TEXTS]
    assert encoded(native, 1, block) != wanted and not native.differs  # block 1 is not compared
    with contextlib.closing(native.threads(0)) as threads:
        started = [native.start(number, block, threads) for number in (4, 5)]
        later = [each.result() for each in started]
        later += [native.start(6, block, threads).result(), native.start(8, block, threads).result()]
    assert native.differs
    for each in later:
        assert each.tokens.tolist() == list(chain(*wanted)) and each.bad == [block[1]]
    assert sum("give different ids" in record.message for record in caplog.records) == 1


def test_a_difference_in_special_tokens_as_text_is_none(tokenizer):
    """The library that is compared with has the same option."""
    for as_text in (False, True):
        native = NativeEncoder(Encoding(tokenizer, specials_as_text=as_text), TokenizerFile(tokenizer))
        (ids,) = encoded(native, 0, [lines_of(["a<|endoftext|>b"])])
        assert not native.differs and ids.count(0) == (1 if as_text else 2)


@pytest.mark.parametrize(("largest", "dtype"), [(65_499, "uint16"), (65_500, "int32")])
def test_the_type_of_ids_follows_the_vocabulary(tmp_path, largest, dtype):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": largest, "</s>": 1}, unk_token="a"))
    plain.save(str(tmp_path / "plain.json"))
    encoder = HFEncoder(Encoding(str(tmp_path / "plain.json")))
    found = encoder([TextChunk("a.txt", 0, b"b")])
    assert encoder.dtype == found.tokens.dtype.name == dtype and found.tokens.tolist() == [largest, 1]
    content = train_tokenizer(TEXTS, 300, tmp_path / "t.json").file
    changed = orjson.loads(Path(content).read_bytes())
    changed["model"]["vocab"]["last"] = largest
    Path(content).write_bytes(orjson.dumps(changed))
    native = NativeEncoder(Encoding(content), TokenizerFile(content))
    with contextlib.closing(native.threads(0)) as threads:
        found = native.start(1, [TextChunk("a.txt", 0, b"ab")], threads).result()
    assert native.dtype == found.tokens.dtype.name == dtype and found.tokens[-1] == 0


def test_tokens_at_the_ends_of_a_document():
    def known(name: str) -> int | None:
        return {"<bos>": 0, "<s>": 7, "x": 9}.get(name)

    assert bos_to_prepend(Encoding("t"), known) is None and bos_to_prepend(Encoding("t", bos_token="x"), known) is None
    assert bos_to_prepend(Encoding("t", prepend_bos=True), known) == 7
    assert bos_to_prepend(Encoding("t", prepend_bos=True), {"<bos>": 0}.get) == 0
    assert bos_to_prepend(Encoding("t", prepend_bos=True), {"<s>": 1, "<|begin_of_text|>": 2}.get) == 2
    assert bos_to_prepend(Encoding("t", prepend_bos=True, bos_token="x"), known) == 9
    with pytest.raises(ConfigError, match="where=t; got=y; want=a token of the vocabulary"):
        bos_to_prepend(Encoding("t", prepend_bos=True, bos_token="y"), known)
    assert [eod_to_append(Encoding("t", append_eod=append), 0) for append in (True, False)] == [0, None]
    assert eod_to_append(Encoding("t", append_eod=False), None) is None
    with pytest.raises(ConfigError, match="no end-of-document token; where=t"):
        eod_to_append(Encoding("t"), None)


def test_settings_are_all_that_the_output_depends_on():
    given = Encoding("t", "e", False, "k", True, "jsonl", True, "b")
    assert given.settings() == {
        "tokenizer": "t",
        "eod_token": "e",
        "append_eod": False,
        "json_key": "k",
        "specials_as_text": True,
        "form": "jsonl",
        "prepend_bos": True,
        "bos_token": "b",
    }


def test_arrays_are_joined_in_order():
    first, second = np.array([1, 2], dtype=np.uint16), np.array([3], dtype=np.uint16)
    assert concatenated([[first], [], [second]], "uint16").tolist() == [1, 2, 3]
    assert concatenated([[first]], "uint16") is first
    empty = concatenated([[], []], "int32")
    assert empty.size == 0 and empty.dtype == np.int32


def test_the_slice_that_is_compared_moves_through_the_chunk():
    """A prime times the number of the block, within the chunk: every document has its turn."""
    texts = [chr(97 + i) * 10 for i in range(20)]
    chunk = lines_of(texts)
    found = [list(comparison_texts(number, [chunk], "text")) for number in range(4, 800, 4)]
    assert all(len(each) == 1 for each in found) and {text for (text,) in found} == set(texts)
    start = 8 * 7919 % len(chunk.content)
    at = chunk.content[:start].count(b"\n")
    assert list(comparison_texts(8, [chunk], "text")) == [texts[at]]
    assert list(comparison_texts(8, [TextChunk("a.jsonl", 1, b"")], "text")) == []
    two = [chunk, BadLine("x", 1, "y", None), lines_of(["z"])]
    assert list(comparison_texts(4, two, "text")) == ["z"] != list(comparison_texts(8, two, "text"))


def test_a_slice_of_the_last_line_without_an_end():
    chunk = TextChunk("a.jsonl", 1, b'{"text": "first"}\n{"text": "last"}')
    assert list(slices(chunk, 0, "text", 5)) == ["first", "last"]
    assert list(slices(chunk, len(chunk.content) - 1, "text", 5)) == ["last"]
    assert list(slices(chunk, 0, "text", 0)) == []
    text = TextChunk("a.txt", 0, "aé".encode() * 2000)
    assert list(slices(text, 0, "text", 1)) == [("aé" * 2000).encode()[: module.COMPARED_SLICE].decode(errors="ignore")]
