"""Rotary scaling in config.json: what is read, and what transformers 4 and 5 find."""

from __future__ import annotations

import pytest

from neox.config.schema import ModelConfig
from neox.convert.families import family_for
from neox.convert.huggingface import config_from_json
from neox.convert.rope import rope_from_json
from neox.errors import ConfigError

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
SIZES = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 50, "max_position_embeddings": 64}
SCALINGS = [
    {"type": "linear", "factor": 4.0},
    {"type": "ntk", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 30.0},
]


def read(positions: int = 64, **rope) -> dict:
    return rope_from_json({"max_position_embeddings": positions, **rope}, 10000.0, 1.0)


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "got=longrope"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}, "got=mscale"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 0.5}, "got=mscale_all_dim"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate=false"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, r"got=rope_theta 1\.0"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor; got=4.*more than low_freq_factor",
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "high_freq_factor; got=1.*more than low_freq_factor",
        ),
    ],
)
def test_unsupported_scalings(rope, match):
    with pytest.raises(ConfigError, match=match):
        read(rope_parameters=rope)


def test_scaling_of_old_files():
    fields = read(rope_scaling={"type": "linear", "factor": 2.0})
    assert (fields["rope_theta"], fields["rope_scaling"].type, fields["rope_scaling"].factor) == (
        10000.0,
        "linear",
        2.0,
    )


def test_rope_scaling_replaces_rope_parameters_as_in_transformers():
    fields = read(
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0},
    )
    assert (fields["rope_theta"], fields["rope_scaling"].type) == (10000.0, "linear")
    assert read(rope_scaling={}, rope_parameters={"rope_type": "default", "rope_theta": 500.0})["rope_theta"] == 500.0


def test_a_yarn_factor_of_null_is_the_ratio_of_the_lengths():
    assert (
        read(rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16})[
            "rope_scaling"
        ].factor
        == 4.0
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["type"])
def test_exports_name_the_scaling_for_transformers_4_and_5(scaling, family):
    """Version 4 reads rope_scaling and rope_theta alone, version 5 rope_parameters; without the former, 4 computes
    plain rotary.
    """
    config = ModelConfig(
        **SIZES, **(LLAMA if family == "llama" else {"rotary_pct": 0.5}), rope_theta=500.0, rope_scaling=scaling
    )
    written = family_for(config).to_json(config)
    assert family_for(config).model_type == family
    kind = "dynamic" if scaling["type"] == "ntk" else scaling["type"]
    for key in ("rope_scaling", "rope_parameters"):
        assert (written[key]["rope_type"], written[key]["factor"]) == (kind, scaling["factor"])
    assert written["rope_scaling"]["type"] == kind  # the name before 4.43
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500.0
    common = {"model_type": family, "vocab_size": 50, "tie_word_embeddings": False, "initializer_range": 0.02}
    for absent in ("rope_scaling", "rope_parameters", None):  # what each version reads gives the same model
        left = {key: value for key, value in written.items() if key != absent}
        assert config_from_json(common | left) == config


def test_exports_without_scaling_have_the_default_type():
    config = ModelConfig(**SIZES, **LLAMA)
    assert family_for(config).to_json(config)["rope_scaling"] is None
