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
