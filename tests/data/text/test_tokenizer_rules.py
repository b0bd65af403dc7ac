"""Tokenizers: the end-of-document token, ids and their texts, special tokens, what the file itself may ask for."""

from __future__ import annotations

import hashlib
import json

import orjson
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from neox.data.text.tokenizer import (
    EOD_NAMES,
    LARGEST_VOCABULARY,
    Tokenizer,
    TokenizerFile,
    file_hash,
    find_eod,
    may_be_renumbered,
    train_tokenizer,
)
from neox.errors import ConfigError, DataError

VOCABULARY = {"a": 0, "b": 1, "</s>": 2, "<s>": 3, "<pad>": 9}


@pytest.fixture
def words(tmp_path) -> str:
    """A tokenizer of words that adds <s> before and </s> after a text, truncates after 4 tokens and pads to 6."""
    library = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 2)])
    library.add_special_tokens(["</s>", "<s>"])
    library.enable_truncation(4)
    library.enable_padding(length=6, pad_id=9, pad_token="<pad>")
    library.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def test_a_text_is_neither_truncated_nor_padded(words):
    tokenizer = Tokenizer(words)
    for text, ids in (("b", [1]), ("a b " * 5, [0, 1] * 5), ("", [])):
        assert (
            tokenizer.encode(text)
            == tokenizer.encode_batch([text, "b"])[0]
            == tokenizer.encode_with_offsets(text)[0]
            == ids
        )
        assert tokenizer.encode(text, template=True) == [3, *ids, 2]
    assert tokenizer.template_tokens == ([3], [2])
    assert tokenizer.encode_with_offsets("b  a") == ([1, 0], [(0, 1), (3, 4)])


def test_without_a_post_processor_nothing_is_added(words, tmp_path):
    library = tokenizers.Tokenizer.from_file(words)
    for text, tokens in (("$A </s>", ([], [2])), ("<s> $A", ([3], [])), ("$A", ([], []))):
        library.post_processor = processors.TemplateProcessing(text, special_tokens=[("<s>", 3), ("</s>", 2)])
        library.save(str(tmp_path / "other.json"))
        assert Tokenizer(tmp_path / "other.json").template_tokens == tokens


def test_ids_and_texts(words):
    tokenizer, file = Tokenizer(words), TokenizerFile(words)
    assert (tokenizer.vocab_size, file.vocab_size) == (10, 10)
    assert [tokenizer.token_text(number) for number in (0, 9, 8, 10, -1)] == ["a", "<pad>", None, None, None]
    for each in (tokenizer, file):
        assert [each.token_id(token) for token in ("b", "<s>", "c")] == [1, 3, None]
        assert (each.eod_token, each.eod_id) == ("</s>", 2)
    assert tokenizer.decode([3, 1, 2, -1, 10, 8]) == "<s> b </s>"
    assert tokenizer.decode(iter([3, 1, 2]), skip_special_tokens=True) == "b"


def test_ids_that_end_a_generated_text(words, tmp_path):
    assert Tokenizer(words).end_ids == {2} and Tokenizer(words, end_ids=[5, 2, 7]).end_ids == {2, 5, 7}
    assert Tokenizer(words, "<s>", end_ids=(7,)).end_ids == {3, 7}
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    library.save(str(tmp_path / "plain.json"))
    plain = Tokenizer(tmp_path / "plain.json")
    assert (plain.eod_token, plain.eod_id, plain.end_ids) == (None, None, frozenset())


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (["<eos>"], "<eos>"),
        (["<eos>", "<|end_of_text|>"], "<|end_of_text|>"),
        (["<eos>", "<|end_of_text|>", "</s>"], "</s>"),
        (["</s>", "<|endoftext|>", "<eos>"], "<|endoftext|>"),
        (["<s>"], None),
    ],
)
def test_the_end_of_document_token_is_the_first_of_the_known_names(known, found):
    ids = {token: number for number, token in enumerate(known)}  # an id may be 0
    assert find_eod(ids.get, None, "t.json") == (found, None if found is None else ids[found])
    assert find_eod(ids.get, known[0], "t.json") == (known[0], 0)
    with pytest.raises(ConfigError, match=r"where=tokenizer\.eod_token, t\.json; got=<other>"):
        find_eod(ids.get, "<other>", "t.json")
    assert EOD_NAMES == ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


@pytest.mark.parametrize(
    ("ids", "added", "may_be"),
    [
        ({"a": 0, "b": 1}, {}, False),
        ({"a": 0, "b": 1}, {"b": 1}, False),
        ({"a": 0, "b": 1}, {"b": 0}, True),
        ({"a": 0, "b": 1}, {"x": 2, "y": 3}, False),
        ({"a": 0, "b": 1}, {"b": 1, "x": 2}, False),
        ({"a": 0, "b": 1}, {"x": 3}, True),
        ({"a": 0, "b": 1}, {"x": 3, "y": 2}, True),
        ({"a": 0, "b": 5}, {"x": 2}, False),  # counted from the size of the vocabulary
        ({"a": 0, "b": 5}, {"x": 6}, True),
    ],
)
def test_added_tokens_that_the_library_may_number_differently(ids, added, may_be):
    assert may_be_renumbered(ids, added) is may_be


def test_a_vocabulary_that_is_a_list_is_numbered_by_its_order(tmp_path):
    library = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -2.0)], unk_id=0))
    library.add_special_tokens(["<extra>"])
    library.save(str(tmp_path / "t.json"))
    file, tokenizer = TokenizerFile(tmp_path / "t.json"), Tokenizer(tmp_path / "t.json")
    for each in (file, tokenizer):
        assert (each.vocab_size, each.eod_id, each.token_id("a"), each.token_id("<extra>")) == (4, 2, 1, 3)
    assert file.hash == tokenizer.hash == file_hash(tmp_path / "t.json")


def test_the_hash_is_that_of_sorted_json(tmp_path):
    content = {"model": {"vocab": {"b": 1, "a": 0}}, "added_tokens": []}
    wanted = hashlib.sha256(b'{"added_tokens":[],"model":{"vocab":{"a":0,"b":1}}}').hexdigest()
    (tmp_path / "t.json").write_text(json.dumps(content, indent=3))
    assert file_hash(tmp_path / "t.json") == TokenizerFile(tmp_path / "t.json").hash == wanted


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"model": {}}',
        b'{"model": {"vocab": 5}}',
        b'{"model": {"vocab": {"a": "x"}}}',
        b'{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}',
        b'{"model": {"vocab": {}}, "added_tokens": [{"content": "x"}]}',
        b"\xff",
    ],
)
def test_files_of_another_form_are_named(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    for read in (TokenizerFile, Tokenizer):
        with pytest.raises(
            DataError, match=r"not a tokenizer file; where=.*t\.json; got=.*want=a `tokenizers` JSON file"
        ):
            read(tmp_path / "t.json")


def test_special_tokens_are_numbered_in_order_and_never_split(tmp_path):
    special = ["<b>", "<|endoftext|>", "<a>", "<b>"]
    tokenizer = train_tokenizer(["x <b> y"], 259, tmp_path / "t.json", special_tokens=special)
    assert [tokenizer.token_id(token) for token in ("<|endoftext|>", "<b>", "<a>")] == [0, 1, 2]
    assert tokenizer.vocab_size == 259 and tokenizer.encode("<b><a>") == [1, 2] and tokenizer.eod_id == 0
    other = train_tokenizer(["x"], 258, tmp_path / "u.json", eod_token="</s>", special_tokens=["<|endoftext|>"])
    assert (other.eod_token, other.eod_id, other.token_id("<|endoftext|>")) == ("</s>", 0, 1)
    assert other.file == str(tmp_path / "u.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 256}, "too small .*got=256; want=at least 257"),
        ({"vocab_size": 258, "special_tokens": ["<a>", "<b>"]}, "got=258; want=at least 259"),
        ({"vocab_size": 258, "special_tokens": ["<a>", "<a>", "<|endoftext|>", "<b>"]}, "want=at least 259"),
        ({"vocab_size": LARGEST_VOCABULARY + 1}, r"too large; where=--vocab-size; got=16777217; want=at most 16777216"),
        ({"vocab_size": 300, "eod_token": ""}, "special token is empty"),
        ({"vocab_size": 300, "special_tokens": ["<a>", ""]}, "special token is empty"),
    ],
)
def test_sizes_and_tokens_that_cannot_be_trained(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(["text"], out=tmp_path / "t.json", **options)
    assert not list(tmp_path.iterdir())


def test_texts_without_a_character_train_nothing(tmp_path):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(["", ""]), 300, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
    assert train_tokenizer(iter(["", "a"]), 257, tmp_path / "t.json").vocab_size == 257
    assert orjson.loads((tmp_path / "t.json").read_bytes())["model"]["type"] == "BPE"
