from __future__ import annotations

import pytest

from neox.convert.huggingface import config_from_json
from neox.errors import ConfigError

GPT2 = {"model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}


@pytest.mark.parametrize(
    ("theirs", "match"),
    [
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2 | {"activation_function": "mish"}, "got=mish"),
    ],
)
def test_gpt2_configs_that_are_refused(theirs, match):
    with pytest.raises(ConfigError, match=match):
        config_from_json(theirs)


def test_the_mlp_of_gpt2_is_four_times_the_width_unless_it_is_given():
    assert config_from_json(GPT2).intermediate_size == 16
    assert config_from_json(GPT2 | {"n_inner": 7}).intermediate_size == 7


def test_an_odd_number_of_rotary_channels_is_refused():
    theirs = {"model_type": "gpt_neox", "vocab_size": 5, "hidden_size": 24, "num_attention_heads": 2}
    theirs |= {"num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(ConfigError, match="odd number of rotary channels"):
        config_from_json(theirs | {"rotary_pct": 0.25})
    assert config_from_json(theirs | {"rotary_pct": 0.5}).rotary_pct == 0.5
