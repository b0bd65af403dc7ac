"""Blocks by our encoder and by the library: the same documents, the same bad lines; and what happens when the two
disagree.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from pathlib import Path

import numpy as np
import orjson
import pytest
import tokenizers

from neox.data.text.byte_level import Unsupported
from neox.data.text.encoding import (
    COMPARED_FIRST,
    EncodedBlock,
    Encoding,
    HFEncoder,
    NativeEncoder,
    comparison_texts,
    encoder_for,
    slices,
)
from neox.data.text.reading import BadLine, TextChunk
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, train_tokenizer
from neox.errors import ConfigError

TEXTS = [f"document {i} has {'word ' * (i * 31 % 97)}and é日😀 <|endoftext|> \t\n  x" for i in range(60)]


@pytest.fixture
def tokenizer(tmp_path) -> str:
    return train_tokenizer(TEXTS, 400, tmp_path / "t.json").file


def block() -> list[TextChunk | BadLine]:
    lines = [orjson.dumps({"text": text, "n": i}) for i, text in enumerate(TEXTS)]
    odd = [
        b'{"text": 3}',
        b"",
        b"{bad",
        b'{"text": ""}',
        b'{"te\\u0078t": "escaped key"}',
        b'{"a": 1e5, "text": "an exponent"}',
        b"[]",
        b'{"text": "\xff"}',
        b"\r",
    ]
    mixed = [*lines[:20], *odd[:5], *lines[20:40], *odd[5:], *lines[40:]]
    return [
        TextChunk("a.jsonl", 7, b"\n".join(mixed)),
        BadLine("a.jsonl", 99, "line is longer than it may be", None),
        TextChunk("b.txt", 0, b"\xef\xbb\xbf" + TEXTS[3].encode()),
        TextChunk("c.txt", 0, b"not \xff UTF-8"),
        TextChunk("d.txt", 0, b""),
        TextChunk("e.jsonl", 1, b"".join(line + b"\n" for line in lines)),
    ]


def encoded(native: NativeEncoder, number: int, block: list[TextChunk | BadLine], threads: int = 0) -> EncodedBlock:
    with contextlib.closing(native.threads(threads)) as started:
        return native.start(number, block, started).result()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("options", [{}, {"append_eod": False}, {"specials_as_text": True}])
def test_both_encoders_give_the_same_block(tokenizer, options, threads):
    encoding = Encoding(tokenizer, **options)
    native = encoder_for(encoding, TokenizerFile(tokenizer))
    assert isinstance(native, NativeEncoder)
    ours, theirs = encoded(native, 0, block(), threads), HFEncoder(encoding)(block())
    assert ours.tokens.dtype == theirs.tokens.dtype == np.uint16 and ours.sizes.dtype == theirs.sizes.dtype == np.int32
    assert (
        np.array_equal(ours.tokens, theirs.tokens)
        and np.array_equal(ours.sizes, theirs.sizes)
        and ours.sizes.size == 123
    )
    assert ours.bad == theirs.bad and [bad.line for bad in ours.bad] == [27, 29, 53, 54, 99, 0]
    assert (ours.blank, ours.empty, ours.text_bytes) == (theirs.blank, theirs.empty, theirs.text_bytes) and (
        ours.blank,
        ours.empty,
    ) == (2, 2)
    assert encoded(native, 1, []).tokens.size == 0


@pytest.mark.parametrize("options", [{}, {"append_eod": False}, {"bos_token": "<|endoftext|>"}])
def test_a_bos_begins_each_document(tmp_path, options):
    file = train_tokenizer(TEXTS, 400, tmp_path / "bos.json", special_tokens=["<s>"]).file
    bos = Tokenizer(file).token_id(options.get("bos_token", "<s>"))
    encoding = Encoding(file, prepend_bos=True, **options)
    native = encoder_for(encoding, TokenizerFile(file))
    without = encoded(encoder_for(Encoding(file, append_eod=encoding.append_eod), TokenizerFile(file)), 0, block())
    for found in (encoded(native, 0, block()), HFEncoder(encoding)(block())):
        starts = np.cumsum(found.sizes) - found.sizes
        assert found.tokens[starts].tolist() == [bos] * 123 and (found.sizes == without.sizes + 1).all()
        assert np.array_equal(np.delete(found.tokens, starts), without.tokens) and found.empty == without.empty == 2


def test_a_missing_bos_is_an_error(tokenizer):
    for encode in (lambda encoding: encoder_for(encoding, TokenizerFile(tokenizer)), HFEncoder):
        with pytest.raises(
            ConfigError,
            match=r"no beginning-of-sequence token; where=.*want=<\|begin_of_text\|> or <s> or <bos>; do=name it by "
            r"--bos-token",
        ):
            encode(Encoding(tokenizer, prepend_bos=True))
        with pytest.raises(ConfigError, match="no beginning-of-sequence token; .*got=<nowhere>"):
            encode(Encoding(tokenizer, prepend_bos=True, bos_token="<nowhere>"))


def test_settings_without_a_bos_are_those_of_earlier_versions(tokenizer):
    """`--resume` compares them with those of datasets that exist."""
    assert list(Encoding(tokenizer).settings()) == [
        "tokenizer",
        "eod_token",
        "append_eod",
        "json_key",
        "specials_as_text",
        "form",
    ]
    assert (
        Encoding(tokenizer, prepend_bos=True).settings()
        != Encoding(tokenizer, prepend_bos=True, bos_token="<s>").settings()
    )


def test_ids_that_differ_are_noticed_and_the_library_takes_over(tokenizer, caplog):
    """A tokenizer file whose merges were taken out after it was read stands for an encoder that is wrong."""
    file = TokenizerFile(tokenizer)
    del file.content["model"]["merges"][:40]
    encoding = Encoding(tokenizer)
    native = NativeEncoder(encoding, file)
    with caplog.at_level(logging.WARNING):
        found = encoded(native, 0, block())
    wanted = HFEncoder(encoding)(block())
    assert native.differs and np.array_equal(found.tokens, wanted.tokens) and found.bad == wanted.bad
    assert "give different ids" in caplog.text


def test_threads_work_on_while_python_is_held(tokenizer):
    """What is started is encoded though no other thread gets Python's lock, and a block that is given up ends
    nothing.
    """
    native = NativeEncoder(Encoding(tokenizer), TokenizerFile(tokenizer))
    lines = TextChunk("a.jsonl", 1, b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS) * 20)
    with contextlib.closing(native.threads(1)) as threads:
        started = [threads.lines(lines.content, b"text", 0) for _ in range(8)]
        del started[3]
        ctypes.PyDLL(None).usleep(1_000_000)  # with the lock: a thread that needed it would get nowhere
        assert all(chunk.done for chunk in started)
    assert len({chunk.result()[0].tobytes() for chunk in started}) == 1


def test_a_closed_pool_raises(tokenizer):
    native = NativeEncoder(Encoding(tokenizer), TokenizerFile(tokenizer))
    content = b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS) * 50
    threads = native.threads(1)
    started = [threads.lines(content, b"text", 0) for _ in range(50)]
    threads.close()
    with pytest.raises(RuntimeError, match="closed before this chunk was encoded"):
        started[-1].result()


def test_every_fourth_block_is_compared():
    lines = TextChunk("a.jsonl", 1, b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    assert list(comparison_texts(0, [lines], "text")) == [text[:2048] for text in TEXTS[:8]]
    assert [len(list(comparison_texts(number, [lines], "text"))) for number in range(1, 9)] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert set(comparison_texts(4, [lines], "text")) <= set(TEXTS)
    assert next(iter(comparison_texts(8, [TextChunk("a.txt", 0, "é".encode() * 4)], "text"))).strip("é") == ""
    assert (
        list(comparison_texts(0, [BadLine("a", 1, "b", None)], "text")) == [] == list(comparison_texts(0, [], "text"))
    )


def test_what_is_compared_of_a_chunk():
    """The beginning of the first documents; later the end of the one around a byte, which other code encodes."""
    texts = ["a" * 3000 + "b" * 3000, "", "c" * 3000 + "d" * 3000]
    lines = TextChunk("a.jsonl", 1, b"\n".join([*(orjson.dumps({"text": text}) for text in texts), b" ", b"{bad"]))
    assert list(slices(lines, 0, "text", 9)) == ["a" * 2048, "c" * 2048]
    assert list(slices(lines, 0, "text", 2)) == ["a" * 2048]
    second = lines.content.index(b"\n") + 1
    third = lines.content.index(b"\n", second) + 1
    for start in (1, second - 1):
        assert list(slices(lines, start, "text", 1)) == ["b" * 2048]
    assert list(slices(lines, second, "text", 1)) == []
    for start in (third, third + 5):
        assert list(slices(lines, start, "text", 1)) == ["d" * 2048]
    text = TextChunk("a.txt", 0, b"x" * 10 + b"y" * 3000)
    assert list(slices(text, 10, "text", 9)) == ["y" * 2048]


def test_the_first_block_is_compared_up_to_a_limit():
    chunks = [TextChunk("a.txt", 0, bytes([97 + i]) * 3000) for i in range(20)]
    found = list(comparison_texts(0, chunks, "text"))
    assert found == [bytes([97 + i]).decode() * 2048 for i in range(COMPARED_FIRST // 2048)]
    later = [next(iter(comparison_texts(number, chunks[:3], "text")))[0] for number in (4, 8, 12)]
    assert later == ["b", "c", "a"]


def test_other_tokenizers_are_left_to_the_library(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    plain.save(str(tmp_path / "plain.json"))
    reason = encoder_for(Encoding(str(tmp_path / "plain.json")), TokenizerFile(tmp_path / "plain.json"))
    assert isinstance(reason, Unsupported) and str(reason) == "no pre-tokenizer"


def test_a_missing_end_of_document_token_is_an_error(tokenizer):
    content = orjson.loads(Path(tokenizer).read_bytes())
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    Path(tokenizer).write_bytes(orjson.dumps(content))
    with pytest.raises(ConfigError, match="no end-of-document token"):
        encoder_for(Encoding(tokenizer), TokenizerFile(tokenizer))
