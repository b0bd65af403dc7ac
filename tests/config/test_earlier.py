"""Configs written for earlier versions load to the values that those versions gave them (earlier/values.json).

native.yml and defaults.yml were loaded by version 749e916; every_key.yml and gpt_neox.yml by version 3b4715d.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox.config.load import load, loads
from neox.config.values import dump, flatten

EARLIER = Path(__file__).parent / "earlier"
VALUES = json.loads((EARLIER / "values.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", VALUES)
def test_an_earlier_config_loads_to_the_same_values(name):
    loaded = load([EARLIER / f"{name}.yml"])
    now = dict(flatten(loaded.config))
    assert {key: now.get(key) for key in VALUES[name]} == VALUES[name]
    later = now.keys() - VALUES[name].keys()
    assert all(loaded.origins[key].source in ("default", "derived") for key in later)


def test_every_key_of_the_earlier_version_has_a_value_that_is_not_its_default():
    """Otherwise a key that is read wrongly could go unnoticed."""
    loaded = load([EARLIER / "every_key.yml"])
    assert [key for key in VALUES["every_key"] if loaded.origins[key].source in ("default", "derived")] == [
        "tokenizer.file"
    ]
    same = [
        key for key, value in VALUES["defaults"].items() if value is not None and VALUES["every_key"].get(key) == value
    ]
    assert same == ["model.vocab_size", "model.position_embedding"]


@pytest.mark.parametrize("name", VALUES)
def test_a_lock_file_with_the_earlier_values_loads_to_an_equal_config(name):
    config = load([EARLIER / f"{name}.yml"]).config
    tree: dict = {}
    for key, value in VALUES[name].items():
        inner = tree
        *sections, last = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    assert loads(json.dumps(tree)) == config
    assert loads(dump(config)) == config
