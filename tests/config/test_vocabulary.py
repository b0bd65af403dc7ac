"""Vocabulary size and ids of a tokenizer file."""

from __future__ import annotations

import json

import pytest

from neox.config.vocabulary import tokenizer_ids, tokenizer_vocab_size


@pytest.fixture
def write(tmp_path):
    """Write the content of a tokenizer file and return its path."""

    def _write(content: object) -> str:
        (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
        return str(tmp_path / "t.json")

    return _write


def test_ids_of_a_mapping_with_added_tokens(write):
    file = write({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": "<eod>"}]})
    assert tokenizer_ids(file) == {"a": 0, "b": 1, "<eod>": 5}
    assert tokenizer_vocab_size(file) == 6


def test_ids_of_a_list(write):
    """Unigram models store [token, score] pairs, whose position is the id."""
    assert tokenizer_ids(write({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}})) == {"a": 0, "b": 1}
    assert tokenizer_ids(write({"model": {"vocab": ["x", "y"]}})) == {"x": 0, "y": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "missing `model`"),
        ({"model": []}, "missing `model`"),
        ({"model": {}}, "missing `model.vocab`"),
        ({"model": {"vocab": {}}}, "not numbers"),
        ({"model": {"vocab": {"a": True}}}, "not numbers"),
        ({"model": {"vocab": {"a": -1}}}, "not numbers"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}, "not numbers"),
    ],
)
def test_other_files_are_refused(write, content, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer_ids(write(content))


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"model": {"vocab": {"a": 3}}}, {"a": 3}),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": None}, {"a": 0}),
        # an added token that the vocabulary has keeps the id that is added
        ({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "a", "id": 7}, "x"]}, {"a": 7, "b": 1}),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": "a", "id": 0}]}, {"a": 0}),
        ({"model": {"vocab": [["a", 0.5], "b", [], ["a", 0.1]]}}, {"a": 3, "b": 1, "[]": 2}),
    ],
)
def test_ids_of_unusual_files(write, content, ids):
    file = write(content)
    assert tokenizer_ids(file) == ids
    assert tokenizer_vocab_size(file) == max(ids.values()) + 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x", "missing `model`"),
        ({"vocab": {}}, "missing `model`"),
        ({"model": {"vocab": 3}}, "missing `model.vocab`"),
        ({"model": {"vocab": {"a": 1.0}}}, "not numbers"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": {"b": 1}}, "`added_tokens` is not a list"),
        ({"model": {"vocab": []}}, "not numbers"),
    ],
)
def test_further_files_are_refused(write, content, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer_vocab_size(write(content))


def test_a_file_that_is_missing_or_no_json(tmp_path):
    with pytest.raises(FileNotFoundError):
        tokenizer_ids(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError):
        tokenizer_ids(str(tmp_path / "bad.json"))
