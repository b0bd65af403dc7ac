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


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "anything"),
        ({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "integer >= 0"),
        ({"type": "integer", "minimum": 1, "maximum": 2**31 - 2}, "integer >= 1, <= 2.14748e+09"),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 8}, "integer > 0, < 8"),
        ({"type": "number", "minimum": -1, "exclusiveMaximum": 0.5}, "number >= -1, < 0.5"),
        ({"type": "array"}, "list of anything"),
        ({"type": "array", "items": {"type": "integer", "minimum": 0}}, "list of integer >= 0"),
        ({"type": "array", "prefixItems": [{}, {}, {}]}, "list of 3 numbers"),
        ({"enum": [1, "a"], "type": "string"}, "one of 1, a"),
        ({"$ref": "#/$defs/Some"}, "mapping (Some)"),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, "mapping or null"),
    ],
)
def test_the_words_of_a_schema(schema, text):
    assert type_text(schema) == text


def test_properties_of_references_and_of_null():
    assert property_schema("model")["title"] == "ModelConfig" and "$ref" in property_schema("model")
    assert property_schema("model.lora.alpha")["default"] == 16.0
    assert property_schema("logging.wandb.mode")["enum"] == ["online", "offline"]
    assert property_schema("data.fim.rate")["maximum"] == 1
    for key in ("model.nothing", "nothing", "model.rope_scaling.nothing"):
        with pytest.raises(KeyError):
            property_schema(key)
