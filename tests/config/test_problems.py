"""Several problems as one error, and the nearest key."""

from __future__ import annotations

import pytest

from neox.config.problems import (
    OTHER_NAMES,
    SHOWN,
    ConfigErrors,
    brief,
    nearest,
    raise_problems,
    same_word,
    similar_words,
)
from neox.config.values import known_keys
from neox.errors import ConfigError

KEYS = [
    "model.num_layers",
    "model.num_attention_heads",
    "model.hidden_size",
    "optimizer.lr",
    "optimizer.eps",
    "model.norm_eps",
    "data.seq_length",
]


def test_nothing_collected_raises_nothing():
    raise_problems([])


def test_one_problem_is_raised_as_it_is():
    problem = ConfigError("a", where="x")
    with pytest.raises(ConfigError) as caught:
        raise_problems([problem])
    assert caught.value is problem


def test_several_problems_have_a_line_each_and_repeats_are_dropped():
    with pytest.raises(ConfigErrors) as caught:
        raise_problems([ConfigError("a"), ConfigError("b"), ConfigError("a")])
    assert caught.value.line() == "error[2] a\nerror[2] b"
    assert caught.value.exit_code == 2


def test_a_flood_is_cut_and_counted():
    with pytest.raises(ConfigErrors) as caught:
        raise_problems([ConfigError(f"p{i}") for i in range(SHOWN + 7)])
    lines = caught.value.line().splitlines()
    assert len(lines) == SHOWN + 1
    assert lines[-1] == "error[2] and 7 more problems like these"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("num_layers", "model.num_layers"),  # no section
        ("train.lr", "optimizer.lr"),  # wrong section
        ("model.num-layers", "model.num_layers"),
        ("model.hiden_size", "model.hidden_size"),
        ("model.num_attn_heads", "model.num_attention_heads"),
        ("seq_len", "data.seq_length"),
        ("model.eps", "optimizer.eps"),  # the same last part elsewhere
        ("model.qqqq", None),
    ],
)
def test_nearest(wrong, meant):
    assert nearest(wrong, KEYS) == meant


def test_words_of_a_flat_key_match_in_any_order_and_none_is_left_over():
    known = [
        "wandb_team",
        "wandb_group",
        "train_micro_batch_size_per_gpu",
        "num_kv_heads",
        "num_attention_heads",
        "a_very_long_key_with_heads",
    ]
    assert similar_words("micro_batch_size", known) == ["train_micro_batch_size_per_gpu"]
    assert similar_words("heads_num", known) == ["num_attention_heads", "num_kv_heads"]
    assert similar_words("wandb_run_name", known) == similar_words("heads", ["a_very_long_key_with_heads"]) == []
    assert same_word("numkv_headz", known) == ["num_kv_heads"] and same_word("wandb_troop", known) == []


def test_brief_cuts_long_values():
    assert brief("x" * 500) == "'" + "x" * 76 + "..."
    assert brief([1]) == "[1]"


def test_names_of_other_libraries_lead_to_keys_that_exist():
    for name, key in OTHER_NAMES.items():
        assert key in known_keys()
        assert nearest(f"train.{name}", known_keys()) == key
