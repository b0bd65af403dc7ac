from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from neox.config.schema import GATED, ModelConfig
from neox.convert.family import THEIR_ACTIVATIONS, THEIR_GATES, UNGATED_ACTIVATIONS, lookup, unlike, with_biases
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


@pytest.mark.parametrize("value", [-1.5, -0.3, 0.7, 2.5])
def test_activations_compute_what_their_names_mean_in_transformers(value):
    x = torch.tensor(value, dtype=torch.float64)
    functions = {
        "gelu": torch.nn.functional.gelu(x),
        "gelu_tanh": torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu(x),
        "silu": torch.nn.functional.silu(x),
    }
    for theirs, ours in THEIR_ACTIVATIONS.items():
        torch.testing.assert_close(ACT2FN[theirs](x), functions[ours])
    for theirs, ours in THEIR_GATES.items():
        torch.testing.assert_close(ACT2FN[theirs](x), functions[GATED[ours]])
    assert {THEIR_ACTIVATIONS[theirs]: theirs for theirs in UNGATED_ACTIVATIONS.values()} == UNGATED_ACTIVATIONS
