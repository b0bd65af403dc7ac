"""What every section has in common, and properties of the complete config."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from neox.config.schema import (
    CheckpointConfig,
    CometConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    SpecialIds,
)
from tests.config.schema.test_bounds import NEEDED, SECTIONS

MODEL = ModelConfig.model_validate({"vocab_size": 8})


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_frozen_and_refuses_unknown_keys(name):
    content = {"model": MODEL} if not name else NEEDED.get(name, {})
    section = SECTIONS[name].model_validate(content)
    first = next(iter(type(section).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, first, getattr(section, first))
    with pytest.raises(ValidationError) as caught:
        SECTIONS[name].model_validate({**content, "no_such_key": 1})
    assert [error["type"] for error in caught.value.errors()] == ["extra_forbidden"]
    assert SECTIONS[name].model_validate(section) == section


@pytest.mark.parametrize("name", SECTIONS)
def test_the_keys_of_a_section_are_its_fields_but_for_keywords_of_python(name):
    section = SECTIONS[name]
    attributes = section.attributes()
    assert list(attributes.values()) == list(section.model_fields)
    assert {key: field for key, field in attributes.items() if key != field} == (
        {"async": "in_background"} if section is CheckpointConfig else {}
    )


def test_entries_have_the_values_in_order():
    class Pair(Section, frozen=True):
        """Two values."""

        second: int = 2
        first: int = 1

    assert list(Pair(first=5).entries()) == [("second", 2), ("first", 5)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (CheckpointConfig, "save_iters", (1, 2)),
        (CometConfig, "tags", ("a",)),
        (DataConfig, "text", ("a", "b")),
        (OptimizerConfig, "betas", (0.1, 0.2)),
        (ParallelConfig, "partition", (1, 2)),
        (SpecialIds, "eos", (1, 2)),
        (SpecialIds, "stop", (3,)),
        (LoraConfig, "targets", ("mlp.up",)),
    ],
)
def test_lists_of_yaml_are_tuples(section, key, value):
    needed = {"rank": 1} if section is LoraConfig else {}
    found = getattr(section.model_validate({**needed, key: list(value)}), key)
    assert found == value and type(found) is tuple


@pytest.mark.parametrize(("objective", "rows"), [("pretrain", 1), ("sft", 1), ("dpo", 2), ("reward", 2)])
def test_the_tokens_of_a_sample(objective, rows):
    config = Config.model_validate({"model": MODEL, "data": {"seq_length": 12}, "train": {"objective": objective}})
    assert config.tokens_per_sample == 12 * rows


@pytest.mark.parametrize(
    ("deepspeed", "computed"),
    [
        ({}, True),
        ({"zero_optimization": {}}, True),
        ({"zero_optimization": None}, True),
        ({"zero_optimization": {"compute_grad_norm": True}}, True),
        ({"zero_optimization": {"compute_grad_norm": False}}, False),
        ({"zero_optimization": {"overlap_comm": False}}, True),
        ({"compute_grad_norm": False}, True),
    ],
)
def test_a_key_of_deepspeed_turns_the_gradient_norm_off(deepspeed, computed):
    assert Config.model_validate({"model": MODEL, "deepspeed": deepspeed}).computes_grad_norm is computed


def test_configs_do_not_share_the_keys_of_deepspeed():
    one, other = (Config.model_validate({"model": MODEL}) for _ in range(2))
    assert one == other and one.deepspeed is not other.deepspeed
