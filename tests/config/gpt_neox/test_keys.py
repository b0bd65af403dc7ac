"""The table of GPT-NeoX's keys: complete, and consistent with the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox.config.deepspeed_keys import DEEPSPEED_KEYS
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS, IGNORED_BECAUSE, REQUIRED
from neox.config.values import known_keys
from tests.config.gpt_neox.test_model import result


def test_every_rule_is_complete():
    for name, row in GPT_NEOX_KEYS.items():
        assert row.to if row.kind == "renamed" else row.text, name
        assert (row.kind == "renamed") <= (len(row.to) == 1), name
    assert set(REQUIRED) <= set(GPT_NEOX_KEYS)


ARGUMENTS = json.loads((Path(__file__).parent / "arguments.json").read_text())


def test_every_argument_of_gpt_neox_is_known_with_its_default():
    """arguments.json has the fields of all classes in megatron/neox_arguments at commit ea7aefd8, and their
    defaults.
    """
    assert len(ARGUMENTS) == 318
    assert set(ARGUMENTS) - set(GPT_NEOX_KEYS) == set()
    for name, default in ARGUMENTS.items():
        row = GPT_NEOX_KEYS[name]
        if row.kind in ("renamed", "translated") and None not in (row.default, default):
            assert row.default == default, name
        if row.kind == "unsupported":
            assert default in row.harmless, name


def unknown(name: str) -> str:
    (problem,) = result({name: 3})[2]
    return problem.partition("do=")[2]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("sed", "did you mean seed?"),
        ("numlayers", "did you mean num_layers?"),
        ("gradient_acumulation_steps", "did you mean gradient_accumulation_steps?"),
        ("micro_batch_size", "did you mean train_micro_batch_size_per_gpu?"),
        ("num_heads", "did you mean num_attention_heads or num_kv_heads?"),
        ("wandb_run_id", None),
        ("moe_router_bias", None),
        ("weight_server_host", None),
        ("vocab_size", None),
    ],
)
def test_an_unknown_key_is_answered_with_a_suggestion(wrong, meant):
    assert unknown(wrong) == (meant or "`neox config reference --gpt-neox` lists the known keys; remove this one")


def test_native_keys_exist():
    known = set(known_keys()) | {f"deepspeed.{name}" for name in DEEPSPEED_KEYS}
    assert {target for row in GPT_NEOX_KEYS.values() for target in row.to} <= known


def test_no_key_is_ignored_for_two_reasons():
    names = [name for names in IGNORED_BECAUSE.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["comet", "wandb", "comms_logger"])
def test_deepspeed_keys_are_passed_through(name):
    assert GPT_NEOX_KEYS[name].to == (f"deepspeed.{name}",)


@pytest.mark.parametrize("name", ["attention_type", "decay_lr_to", "gas", "warmup_iters"])
def test_keys_of_shipped_files_that_are_no_arguments_are_known(name):
    """Files of GPT-NeoX and Pythia use them, its argument classes do not have them."""
    assert name not in ARGUMENTS and name in GPT_NEOX_KEYS


@pytest.mark.parametrize(
    ("name", "kind", "to", "default"),
    [
        ("num_layers", "renamed", ("model.num_layers",), None),
        ("seq_length", "renamed", ("data.seq_length",), None),
        ("data_path", "renamed", ("data.path",), None),
        ("train_batch_size", "renamed", ("train.global_batch_size",), None),
        ("log_interval", "renamed", ("logging.interval",), 100),
        ("gpt_j_residual", "renamed", ("model.parallel_residual",), False),
        ("tokenizer_type", "translated", ("model.vocab_size", "tokenizer.file"), "GPT2BPETokenizer"),
        ("valid_data_paths", "translated", ("data.validation",), None),
        ("test_data_weights", "translated", ("data.test",), None),
        ("neg_valid_label_data_paths", "translated", ("data.validation",), None),
        ("pos_test_data_paths", "translated", ("data.test",), None),
        ("deepspeed_extra_args", "translated", ("deepspeed",), None),
        ("csv_monitor", "translated", ("deepspeed.csv_monitor",), None),
        ("num_nodes", "ignored", (), None),
        ("use_qk_layernorm", "unsupported", (), None),
    ],
)
def test_the_rule_of_a_key(name, kind, to, default):
    rule = GPT_NEOX_KEYS[name]
    assert (rule.kind, rule.to, rule.default) == (kind, to, default)


def test_a_model_needs_its_size():
    assert REQUIRED == ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    assert all(GPT_NEOX_KEYS[name].kind == "renamed" and GPT_NEOX_KEYS[name].default is None for name in REQUIRED)


def test_every_value_that_enables_nothing_is_accepted_and_every_other_refused():
    plain = result({})
    unsupported = {name: rule for name, rule in GPT_NEOX_KEYS.items() if rule.kind == "unsupported"}
    for index in range(3):
        values = {name: rule.harmless[index] for name, rule in unsupported.items() if index < len(rule.harmless)}
        assert result(values) == plain
    lines = result(dict.fromkeys(unsupported, "on"))[2]
    assert len(lines) == len(unsupported)
    for line, (name, rule) in zip(lines, unsupported.items(), strict=True):
        assert line.endswith(f"where=a.yml:1 {name}; got='on'; do={rule.text}")


def test_ignored_keys_have_no_effect():
    ignored = [name for name, rule in GPT_NEOX_KEYS.items() if rule.kind == "ignored"]
    assert len(ignored) > 100 and result(dict.fromkeys(ignored, "on")) == result({})
