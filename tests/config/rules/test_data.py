"""Rules of the data that need a file."""

from __future__ import annotations

import json

import pytest

from neox.config.load import load_config
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.config.rules.contradictions import BASE


def test_tokens_of_fill_in_the_middle_are_in_the_vocabulary(tmp_path):
    file = tmp_path / "t.json"
    added = [{"content": f"<|fim_{name}|>", "id": 2 + number} for number, name in enumerate(("prefix", "suffix"))]
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}))
    options = [*BASE, f"tokenizer.file={file}", "data.fim.rate=0.5"]
    with pytest.raises(
        ConfigError,
        match=r"not in the vocabulary; where=data.fim.middle_token, .*got=data.fim.middle_token = '<\|fim_middle\|>'",
    ):
        validate(load_config(overrides=options), 1, "cpu")
    validate(load_config(overrides=[*options, "data.fim.middle_token=a"]), 1, "cpu")
    with pytest.raises(ConfigError, match=r"where=.*data.fim.split_sample"):
        validate(load_config(overrides=[*options, "data.fim.middle_token=a", "data.fim.split_sample=zz"]), 1, "cpu")
