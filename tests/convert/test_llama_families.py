from __future__ import annotations

import pytest

from neox.convert.families import family_for
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


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, 7),
        ({"layer_types": ["sliding_attention"] * 4, "max_window_layers": 4}, 7),  # the list decides
        ({"layer_types": ["full_attention"] * 4, "max_window_layers": 0}, None),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, None),
        ({"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False}, None),
        ({"max_window_layers": 9}, None),
        ({"max_window_layers": 0}, 7),
        ({"max_window_layers": 0, "sliding_window": None}, None),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_window_is_of_the_layers_that_the_file_names(model_type, changes, window):
    given = QWEN3 | {"model_type": model_type, "use_sliding_window": True, "sliding_window": 7}
    assert config_from_json(given | changes).sliding_window == window


@pytest.mark.parametrize("sliding", [1, 3])
def test_layers_with_and_without_a_window_are_counted(sliding):
    kinds = ["sliding_attention"] * sliding + ["full_attention"] * (4 - sliding)
    with pytest.raises(ConfigError, match=f"got={sliding} of 4 have a window"):
        config_from_json(QWEN3 | {"use_sliding_window": True, "layer_types": kinds})
    with pytest.raises(ConfigError, match=f"got={sliding} of 4 have a window"):
        config_from_json(QWEN3 | {"use_sliding_window": True, "max_window_layers": 4 - sliding})


@pytest.mark.parametrize("windowed", [False, True])
def test_an_exported_qwen_has_its_window_in_every_layer_or_in_none(windowed):
    """Version 4 of theirs reads max_window_layers, version 5 layer_types."""
    ours = config_from_json(QWEN3).model_copy(update={"sliding_window": 7 if windowed else None})
    written = family_for(ours).to_json(ours)
    assert (written["use_sliding_window"], written["sliding_window"]) == (windowed, ours.sliding_window)
    assert written["max_window_layers"] == (0 if windowed else 4)
    assert written["layer_types"] == [("sliding" if windowed else "full") + "_attention"] * 4


@pytest.mark.parametrize(
    ("model_type", "changes", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("stablelm", {"partial_rotary_factor": 0.5}, (False, False, False)),
        ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}, (True, False, False)),
    ],
)
def test_biases_of_each_architecture(model_type, changes, biases):
    ours = config_from_json({"model_type": model_type, **SIZES, "num_key_value_heads": 1, **changes})
    assert (ours.qkv_bias, ours.attention_out_bias, ours.mlp_bias) == biases
    assert (ours.qk_norm, ours.num_kv_heads) == (model_type == "qwen3", 1)
