"""The state of a translation: sources of values, and precedence of native settings."""

from __future__ import annotations

import math

import pytest

from neox.config.gpt_neox.translation import DEFAULT, Given, Translation


def translation(native: dict | None = None, **values) -> Translation:
    return Translation(
        {name: Given(value, "a.yml", line) for line, (name, value) in enumerate(values.items(), 1)}, native or {}
    )


def test_a_value_is_from_the_file_or_the_default_or_native():
    work = translation({("model", "num_layers"): 7}, num_layers=2, warmup=None)
    assert (work.value("num_layers"), work.value("warmup"), work.value("rotary_pct")) == (7, 0.01, 1.0)


def test_settings_have_a_line():
    work = translation(hidden_size=8, norm="rmsnorm")
    work.set("model.norm", "rmsnorm", "norm")
    work.set("model.init", "normal", "init_method")
    assert [(item.path, item.source, item.line) for item in work.settings] == [
        (("model", "norm"), "a.yml", 2),
        (("model", "init"), DEFAULT, 0),
    ]


def test_a_native_value_suppresses_a_problem():
    work = translation({("model", "init"): "normal"}, init_method="orthogonal")
    work.refuse("init_method", "no", decides="model.init")
    assert work.problems == []
    work.refuse("init_method", "no")
    assert work.problems[0].where == "a.yml:1 init_method" and work.problems[0].got == "'orthogonal'"


def test_harmless_values_of_unsupported_keys_pass():
    work = translation(use_mup=False, moe_num_experts=1, amp={"enabled": False}, elasticity={})
    work.unknown_and_unsupported()
    assert work.problems == []
    work = translation(use_mup=True, moe_num_experts=True)
    work.unknown_and_unsupported()
    assert len(work.problems) == 2


def test_numbers_are_checked():
    work = translation(warmup="0.1", lr_decay_iters=True, min_lr=1)
    assert (work.number("warmup"), work.number("lr_decay_iters"), work.number("min_lr")) == (None, None, 1)
    assert len(work.problems) == 2


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (-1.5, -1.5),
        (2**63, 2**63),
        (-(2**63), -(2**63)),
        (2**63 + 1, None),
        (-(2**63) - 2000, None),
        (math.nan, None),
        (-math.inf, None),
        (True, None),
        ("1", None),
        ([1], None),
    ],
)
def test_numbers_are_finite_and_no_larger_than_a_float_can_multiply(value, number):
    work = translation(warmup=value)
    assert work.number("warmup") == number
    assert [problem.what for problem in work.problems] == ([] if number is not None else ["bad value"])
    if number is None:
        is_number = isinstance(value, (int, float)) and value is not True
        assert work.problems[0].want == ("a finite number" if is_number else "a number")


def test_null_gives_no_number_and_no_problem():
    work = translation(lr_decay_iters=None)
    assert work.number("lr_decay_iters") is None and work.problems == []
    assert work.number("warmup") == 0.01  # GPT-NeoX's default


def test_the_first_of_some_keys_is_the_first_that_a_file_sets():
    work = translation(gas=2, batch_size=None)
    assert work.first("gradient_accumulation_steps", "gas") == "gas"
    assert work.first("batch_size", "save_interval") == "batch_size"  # null is not set, so the first of all
    assert translation(gas=1, gradient_accumulation_steps=2).first("gradient_accumulation_steps", "gas") == (
        "gradient_accumulation_steps"
    )


def test_notes_and_locations_of_keys():
    work = translation(hidden_size=8, norm="rmsnorm")
    work.note("text")
    work.note("text", "norm")
    work.note("text", "warmup")
    assert work.notes == ["text", "a.yml:2 norm: text", "warmup: text"]


def test_a_native_value_decides_about_its_own_key_only():
    work = translation({("model", "init"): "normal"}, init_method="x")
    work.refuse("init_method", "no", want="w", do="d", decides="model.output_init")
    (problem,) = work.problems
    assert problem.line() == "error[2] no; where=a.yml:1 init_method; got='x'; want=w; do=d"


def test_only_renamed_keys_are_read_from_native_values():
    native = {("model", "norm"): "rmsnorm", ("train", "train_iters"): 5}
    assert translation(native, norm="layernorm").value("norm") == "layernorm"
    assert translation(native, train_iters=9).value("train_iters") == 5
    assert translation(native).value("train_iters") == 5
    assert translation({("train", "train_iters"): None}, train_iters=9).value("train_iters") is None


def test_the_report_of_unknown_and_unsupported_keys():
    work = translation(zzz=[1], hiden_size=8, use_mup=True, warmup_iters=3, log_dir="x")
    work.unknown_and_unsupported()
    assert [problem.line() for problem in work.problems] == [
        "error[2] unknown key of GPT-NeoX; where=a.yml:1 zzz; got=[1]; "
        "do=`neox config reference --gpt-neox` lists the known keys; remove this one",
        "error[2] unknown key of GPT-NeoX; where=a.yml:2 hiden_size; got=8; do=did you mean hidden_size?",
        "error[2] GPT-NeoX key is not supported; where=a.yml:3 use_mup; got=true; "
        "do=muP is not implemented; set use_mup: false",
        "error[2] invalid file: GPT-NeoX has no such key; where=a.yml:4 warmup_iters; got=3; "
        "do=not a key of GPT-NeoX; set warmup, a fraction of lr_decay_iters",
    ]


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("moe_num_experts", 1, True),
        ("moe_num_experts", 0, False),
        ("moe_num_experts", 1.0, False),
        ("opt_pos_emb_offset", 0, True),
        ("opt_pos_emb_offset", False, False),
        ("z_loss", 0.0, True),
        ("z_loss", 0.1, False),
        ("s3_path", False, False),
        ("train_reward_data_paths", [], True),
        ("train_reward_data_paths", ["x"], False),
        ("test_reward_data_paths", ["x"], False),
        ("soft_prompt_tuning", {}, True),
        ("soft_prompt_tuning", {"enabled": False}, False),
        ("amp", {"enabled": True}, False),
        ("curriculum_learning", {"enabled": False}, True),
        ("elasticity", False, True),
        ("mlp_type", "regular", True),
        ("mlp_type", "llama", False),
        ("model_arch", "gpt2", True),
        ("model_arch", "t5", False),
        ("no_load_optim", False, True),
        ("no_load_optim", True, False),
        ("loss_scale", 0, True),
        ("use_qk_layernorm", True, False),
    ],
)
def test_which_values_of_unsupported_keys_enable_nothing(name, value, harmless):
    work = translation(**{name: value})
    work.unknown_and_unsupported()
    assert (work.problems == []) is harmless


def test_a_model_may_be_completed_by_native_values():
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    assert translation(**dict.fromkeys(names, 8)).complete()
    for name in names:
        others = {other: 8 for other in names if other != name}
        work = translation(**others)
        assert not work.complete()
        (problem,) = work.problems
        assert problem.line() == (
            f"error[2] incomplete GPT-NeoX config; where=a.yml; want={name}; "
            "do=add the file of a model: --conf 125M.yml local_setup.yml"
        )
        assert translation({("model", name): 8}, **others).complete()
