"""Rules of the architecture that need a file."""

from __future__ import annotations

import json

import pytest

from neox.config.load import load_config
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.config.rules.contradictions import BASE


def test_a_tokenizer_with_more_ids_than_the_vocabulary(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 100}}}))
    config = load_config(overrides=[*BASE, f"tokenizer.file={file}"])
    with pytest.raises(
        ConfigError, match=r"model.vocab_size = 100, tokenizer.file = .*ids = 101; want=vocab_size at least 101"
    ):
        validate(config, 1, "cpu")
    validate(load_config(overrides=[*BASE, f"tokenizer.file={file}", "model.vocab_size=101"]), 1, "cpu")


def test_an_end_of_document_token_that_the_tokenizer_lacks(tmp_path):
    """A run would train with it, and generation from its checkpoints would fail."""
    file = tmp_path / "t.json"
    added = [{"content": "<eod>", "id": 2}]
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}))
    options = [*BASE, f"tokenizer.file={file}"]
    with pytest.raises(ConfigError, match="token is not in the vocabulary; where=.*tokenizer.eod_token"):
        validate(load_config(overrides=[*options, "tokenizer.eod_token=zzz"]), 1, "cpu")
    for token in ("a", "<eod>", "null"):
        validate(load_config(overrides=[*options, f"tokenizer.eod_token={token}"]), 1, "cpu")
