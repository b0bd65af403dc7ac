from __future__ import annotations

import pytest

from neox.config.schema import ModelConfig
from neox.convert.family import THEIR_GATES, lookup, unlike, with_biases
from neox.errors import ConfigError


def test_settings_that_differ_are_listed():
    config = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=5, norm="rmsnorm")
    assert unlike(config, norm="layernorm", num_layers=1, activation=("silu", "relu")) == [
        "norm=rmsnorm",
        "activation=gelu",
    ]
    assert unlike(config, norm=("layernorm", "rmsnorm")) == []


def test_an_unknown_activation_is_refused_with_the_known_ones():
    assert lookup(THEIR_GATES, "swish", "config.json: hidden_act") == "swiglu"
    with pytest.raises(ConfigError, match=r"where=config\.json: hidden_act; got=mish; want=silu, swish, gelu, relu"):
        lookup(THEIR_GATES, "mish", "config.json: hidden_act")


def test_a_bias_has_a_rule_only_if_there_is_one():
    assert [name for name, _ in with_biases("norm", "model.norm")] == ["norm.weight", "norm.bias"]
    assert [name for name, _ in with_biases("norm", "model.norm", bias=False)] == ["norm.weight"]
