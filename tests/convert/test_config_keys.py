"""Hostile and unlucky config.json files: one line, no traceback, no wait."""

from __future__ import annotations

import json
import os

import pytest

from neox.convert.config_keys import Key, read_json, read_keys
from neox.convert.huggingface import config_from_json
from neox.errors import CheckpointError, ConfigError, NeoxError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def test_missing_null_and_value_are_three_things():
    table = {"a": Key("count", 7, nullable=True)}
    assert [read_keys(table, given)["a"] for given in ({}, {"a": None}, {"a": 3})] == [7, None, 3]
    with pytest.raises(ConfigError, match=r"key is missing in config.json; where=config.json: a"):
        read_keys({"a": Key("count")}, {})


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("count", (1, 2**31 - 1), (0, -1, True, 8.0, "8", 2**31, 10**400, None, [8])),
        ("index", (0, 5, 2**31 - 1), (-1, False, 0.0, "0", None, 2**31)),
        ("number", (0, -1.5, 3, 9.9e29, -9.9e29), (True, "1", float("nan"), float("inf"), 10**400, None, 1e30, -1e30)),
        ("positive", (1, 1e-9, 9.9e29), (0, -1, True, "1", float("nan"), 1e30)),
        ("id", (0, -1, 2**31 - 1, 1 - 2**31), (2**31, -(2**31), True, 1.0, "1", [1], None)),
        ("ids", (0, -1, [], [3, 0, -1]), (2**31, [2**31], [1, True], [1, [2]], "1", {}, None)),
        ("share", (0, 0.5), (1, -0.1, True, "0", None)),
        ("flag", (True, False), (0, 1, "true", None)),
        ("name", ("", "x"), (1, None, ["x"])),
        ("names", ([], ["x"]), ("x", [1], ["x", 1], {"x": 1}, None)),
        ("object", ({},), ([], "x", 1, None)),
    ],
)
def test_kinds(kind, right, wrong):
    for value in right:
        assert read_keys({"a": Key(kind)}, {"a": value})["a"] == value
    for value in wrong:
        with pytest.raises(ConfigError, match="invalid value; where=config.json: a") as caught:
            read_keys({"a": Key(kind)}, {"a": value})
        assert len(caught.value.line()) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "8"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": -2},
        {"num_hidden_layers": True},
        {"head_dim": 1e3},
        {"rms_norm_eps": "1e-6"},
        {"rms_norm_eps": float("nan")},
        {"hidden_act": ["silu"]},
        {"hidden_act": "x" * 10_000},
        {"tie_word_embeddings": "false"},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_scaling": {"type": ["linear"], "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
        {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1},
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        {"rope_theta": 0},
        {"partial_rotary_factor": 0.5},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": 4},
    ],
)
def test_values_that_no_model_has(changes):
    with pytest.raises(ConfigError) as caught:
        config_from_json(LLAMA | changes)
    assert "\n" not in caught.value.line() and len(caught.value.line()) < 400


def test_heads_that_do_not_divide_are_named_as_in_the_file():
    wanted = "do not divide the query heads; where=config.json: num_key_value_heads; got=3; want=a divisor of "
    with pytest.raises(ConfigError, match=wanted):
        config_from_json(LLAMA | {"num_key_value_heads": 3})


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"null", b"{", b"\xff\xfe", b'{"a":' * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5_000 + b"}"],
    ids=["empty", "list", "null", "cut", "bytes", "deep-objects", "deep-lists", "digits"],
)
def test_files_that_hold_no_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_json(tmp_path / "config.json")
    assert len(caught.value.line()) < 500 + len(str(tmp_path))


def test_pipes_devices_and_huge_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "zero", "huge", "folder", "absent", "a\0b"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(NeoxError):
            read_json(tmp_path / name)


def test_a_linked_file_is_read(tmp_path):
    """The cache of the Hub holds links."""
    (tmp_path / "blob").write_text(json.dumps(LLAMA), encoding="utf-8")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == LLAMA


def test_what_is_wanted_is_named_with_the_file_and_whether_null_is():
    table = {"a": Key("count", 7), "b": Key("flag", None, nullable=True)}
    for given, problem in (
        ({"a": None}, "where=x.json: a; got=null; want=a positive whole number$"),
        ({"b": 0}, "where=x.json: b; got=0; want=true or false or null$"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read_keys(table, given, "x.json")
    assert read_keys(table, {"b": False, "c": "ignored"}) == {"a": 7, "b": False}
    with pytest.raises(ConfigError, match=r"missing in x\.json; where=x\.json: a; want=a number;"):
        read_keys({"a": Key("number")}, {}, "x.json")
