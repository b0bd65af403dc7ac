"""Ids of special tokens: read from a folder of theirs, written into one, with every default of the classes."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from neox.config.schema import SpecialIds
from neox.convert.special_ids import generation_config, ids_to_json, read_special_ids
from neox.errors import ConfigError

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(folder, name: str = "config.json", **content) -> dict:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return content


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "stablelm", "gpt_neox", "gpt2"])
@pytest.mark.parametrize(
    "ids",
    [
        {},
        {"bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": 0, "eos_token_id": 7, "pad_token_id": 7},
        {"eos_token_id": [5, 9]},
        {"eos_token_id": [5], "pad_token_id": -1},
    ],
)
def test_ids_are_those_that_transformers_reads(family, ids, tmp_path):
    write(tmp_path, model_type=family, **SIZES, **ids)
    if ids.get("pad_token_id") == -1:  # of the first Llama; transformers 5 refuses it
        wanted = {"pad_token_id": -1, "eos_token_id": [5]}
    else:
        wanted = {key: value for key, value in AutoConfig.from_pretrained(tmp_path).to_dict().items() if key in KEYS}
    assert ids_to_json(read_special_ids(tmp_path)) | wanted == ids_to_json(read_special_ids(tmp_path))


def test_generation_ends_at_the_ids_of_both_files(tmp_path):
    write(tmp_path, model_type="llama", **SIZES, eos_token_id=2)
    assert read_special_ids(tmp_path).ends() == {2}
    write(tmp_path, "generation_config.json", eos_token_id=[2, 7, 9])
    ids = read_special_ids(tmp_path)
    assert ids.ends() == {2, 7, 9} and ids_to_json(ids)["eos_token_id"] == 2
    assert generation_config(ids)["eos_token_id"] == [2, 7, 9]
    write(tmp_path, "generation_config.json", temperature=0.5)
    assert read_special_ids(tmp_path).ends() == {2}


@pytest.mark.parametrize("value", ["2", True, 2.0, [2, "7"], [True], {}, 1 << 40])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_that_are_not_numbers(value, name, tmp_path):
    write(tmp_path, model_type="llama", **SIZES)
    write(tmp_path, name, **({"model_type": "llama", **SIZES} if name == "config.json" else {}), eos_token_id=value)
    with pytest.raises(ConfigError, match=f"where={name}: eos_token_id"):
        read_special_ids(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "stop", "ends"),
    [
        ({}, 7, {0, 7}),
        ({"eos_token_id": None}, 7, {7}),
        ({"eos_token_id": None}, None, set()),
        ({"eos_token_id": [2, 3]}, [3, 9, 2, 5], {2, 3, 5, 9}),
    ],
)
def test_an_id_of_the_generation_file_is_one_or_several(theirs, stop, ends, tmp_path):
    write(tmp_path, model_type="stablelm", **SIZES, **theirs)
    write(tmp_path, "generation_config.json", eos_token_id=stop)
    ids = read_special_ids(tmp_path)
    assert ids.ends() == ends
    own = theirs.get("eos_token_id", 0)
    assert ids.stop == tuple(sorted(ends - {own} if isinstance(own, int) else ends - set(own or ())))


@pytest.mark.parametrize(
    ("ids", "content"),
    [
        (SpecialIds(), {"bos_token_id": None, "eos_token_id": None}),
        (SpecialIds(bos=0, eos=0, pad=0), {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}),
        (SpecialIds(bos=1, eos=(4, 2)), {"bos_token_id": 1, "eos_token_id": [4, 2]}),
        (
            SpecialIds(bos=1, eos=9, pad=3, stop=(4, 2)),
            {"bos_token_id": 1, "eos_token_id": [2, 4, 9], "pad_token_id": 3},
        ),
        (SpecialIds(eos=(9, 1), stop=(4,)), {"bos_token_id": None, "eos_token_id": [1, 4, 9]}),
    ],
)
def test_an_export_generates_to_the_same_ends(ids, content, tmp_path):
    assert generation_config(ids) == content
    write(tmp_path, model_type="llama", **SIZES, **ids_to_json(ids))
    write(tmp_path, "generation_config.json", **generation_config(ids))
    assert read_special_ids(tmp_path) == ids.model_copy(update={"stop": tuple(sorted(ids.stop))})
