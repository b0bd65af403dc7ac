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
    yaml_constant,
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


def test_as_many_problems_as_are_shown_are_not_counted():
    with pytest.raises(ConfigErrors) as caught:
        raise_problems([ConfigError(f"p{i}") for i in range(SHOWN)])
    assert caught.value.line().splitlines() == [f"error[2] p{i}" for i in range(SHOWN)]
    with pytest.raises(ConfigErrors) as caught:
        raise_problems([ConfigError(f"p{i}") for i in range(SHOWN + 1)])
    assert caught.value.line().splitlines()[SHOWN:] == ["error[2] and 1 more problems like these"]


def test_the_parts_of_several_problems_are_those_of_the_first():
    problems = [ConfigError("a", where="w", got="g", want="x", do="d"), ConfigError("b", where="v")]
    error = ConfigErrors(problems)
    assert error.parts() == problems[0].parts() and error.problems == tuple(problems)


@pytest.mark.parametrize(
    ("wrong", "known", "meant"),
    [
        # the same name elsewhere comes before a typo in the section, and that before a typo elsewhere
        ("a.rate", ["a.rates", "b.rate"], "b.rate"),
        ("a.rate", ["c.rate", "b.rate"], "b.rate"),
        ("a.ratee", ["a.rat", "b.rate"], "a.rat"),
        ("a.ratee", ["a.other", "c.rate", "b.rate"], "b.rate"),
        ("a.warmup", ["a.warm_up_iter", "b.x"], "a.warm_up_iter"),  # in the section a rough likeness is enough
        ("b.warmup", ["a.warm_up_iter", "b.x"], None),
        ("batch_size", ["train.batch_sizes", "train.micro_batch_size"], "train.micro_batch_size"),
        ("batch_size", ["train.batch_sizes"], "train.batch_sizes"),  # a name of other libraries for an absent key
        ("max-steps", ["train.train_iters"], "train.train_iters"),
        ("x", [], None),
    ],
)
def test_which_likeness_comes_first(wrong, known, meant):
    assert nearest(wrong, known) == meant


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("heads", ["num_heads", "num_kv_heads", "heads"], ["heads"]),
        ("heads", ["num_heads", "num_kv_heads"], ["num_heads"]),
        ("heads", ["num_kv_heads"], []),  # two words more than one
        ("a_b", ["a_b_c_d"], ["a_b_c_d"]),
        ("a_b", ["a_b_c_d_e"], []),
        ("a_b", ["d_a_b", "c_b_a", "b_a_e", "a_f_b"], ["a_f_b", "b_a_e", "c_b_a"]),
        ("rate_rate", ["rate_decay"], []),  # each word counts once
        ("attention_dropuot", ["attention_dropout", "hidden_dropout"], ["attention_dropout"]),
    ],
)
def test_which_flat_keys_are_similar(name, known, meant):
    assert similar_words(name, known) == meant


def test_only_the_closest_word_is_the_same_word():
    assert same_word("trainiters", ["train_iter", "train_iters", "train_item"]) == ["train_iters"]
    assert same_word("num_lay", ["num_layers"]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (1, "1"),
        ("null", "'null'"),
        ("x" * 78, "'" + "x" * 78 + "'"),
        ("x" * 79, "'" + "x" * 76 + "..."),
    ],
)
def test_brief_writes_values_as_yaml_does(value, text):
    assert brief(value) == text and len(text) <= 80
    assert yaml_constant(value) == (text if value is None or isinstance(value, bool) else None)


def test_brief_has_a_limit():
    assert brief("abcdef", 8) == "'abcdef'" and brief("abcdefg", 8) == "'abcd..."
