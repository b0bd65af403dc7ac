"""Types of keys in words."""

from __future__ import annotations

import pytest

from neox.config.key_types import property_schema, type_text


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.rotary_pct", "number > 0, <= 1"),
        ("zero.stage", "integer >= 0, <= 3"),
        ("model.norm", "one of layernorm, rmsnorm"),
        ("optimizer.betas", "list of 2 numbers"),
        ("model.sliding_window", "integer > 0 or null"),
        ("model.rope_scaling", "mapping (RopeScaling) or null"),
        ("model.rope_scaling.factor", "number > 0"),
        ("parallel.partition", "one of parameters, time or list of integer > 0"),
        ("tokenizer.special_ids.eos", "integer or list of integer or null"),
        ("checkpoint.async", "boolean"),
        ("deepspeed", "mapping"),
    ],
)
def test_type_of_a_key(key, text):
    assert type_text(property_schema(key)) == text
