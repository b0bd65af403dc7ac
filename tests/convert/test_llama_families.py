from __future__ import annotations

import pytest

from neox.convert.huggingface import config_from_json
from neox.errors import ConfigError

SIZES = {"vocab_size": 5, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 4}
QWEN3 = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2}
STABLELM = {"model_type": "stablelm", **SIZES, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("theirs", "match"),
    [
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 2}, "2 of 4 have a window"),
        (QWEN3 | {"layer_types": ["full_attention"] * 3}, "got=3 layers"),
        (QWEN3 | {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "got=linear_attention"),
        ({"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}, "partial_rotary_factor; got=0.5"),
        (STABLELM | {"qk_layernorm": True}, "qk_layernorm"),
        (STABLELM | {"hidden_dropout": 0.1}, "hidden_dropout; got=0.1"),
        (STABLELM | {"partial_rotary_factor": 0.25}, "odd number of rotary channels"),
    ],
)
def test_configs_that_are_refused(theirs, match):
    with pytest.raises(ConfigError, match=match):
        config_from_json(theirs)


def test_a_window_of_every_layer_is_read_and_one_of_none_is_not():
    windowed = QWEN3 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    assert config_from_json(windowed).sliding_window == 7
    assert config_from_json(windowed | {"use_sliding_window": False}).sliding_window is None
    assert config_from_json(windowed | {"max_window_layers": 4}).sliding_window is None


@pytest.mark.parametrize("parallel", [False, True])
def test_a_parallel_stablelm_shares_its_norm(parallel):
    ours = config_from_json(STABLELM | {"use_parallel_residual": parallel})
    assert (ours.norm, ours.activation, ours.rotary_pct, ours.mlp_bias) == ("layernorm", "swiglu", 0.5, False)
    assert (ours.parallel_residual, ours.shared_residual_norm) == (parallel, parallel)
