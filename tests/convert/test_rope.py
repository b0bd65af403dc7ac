"""Rotary scaling in config.json: what is read, and what transformers 4 and 5 find."""

from __future__ import annotations

import contextlib

import pytest

from neox.config.schema import ModelConfig
from neox.convert.families import family_for
from neox.convert.huggingface import config_from_json
from neox.convert.rope import (
    positions_to_json,
    require_even_rotation,
    rope_from_json,
    rope_misfits,
    rope_to_json,
    rotates_evenly,
)
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


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "yarn", "factor": 2.0}, {"original_max_position_embeddings": 64, "attention_factor": None}),
        ({"type": "yarn", "factor": None}, {"original_max_position_embeddings": 64, "factor": 1.0}),
        (
            {"type": "yarn", "factor": 2.0, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5, "mscale": 0},
            {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5},
        ),
        ({"type": "yarn", "factor": 2.0, "beta_fast": None, "truncate": True}, {"beta_fast": 32.0, "beta_slow": 1.0}),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
            {"original_max_position_embeddings": 64, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
        ),
        ({"rope_type": "dynamic", "factor": 2.5}, {"type": "ntk", "original_max_position_embeddings": 64}),
    ],
)
def test_every_value_of_a_scaling_is_read(rope, wanted):
    for name in ("rope_scaling", "rope_parameters"):
        scaling = read(**{name: rope})["rope_scaling"]
        assert {key: getattr(scaling, key) for key in wanted} == wanted


def test_base_and_share_are_those_of_the_object_before_those_of_the_file():
    given = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 7, "partial_rotary_factor": 0.5}}
    wanted = {"rope_theta": 7.0, "rotary_pct": 0.5, "max_position_embeddings": 64}
    assert rope_from_json(given, 500.0, 0.25) == wanted
    for rope in ({}, {"rope_parameters": None, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert rope_from_json({"max_position_embeddings": 64} | rope, 500.0, 0.25) == wanted | {
            "rope_theta": 500.0,
            "rotary_pct": 0.25,
        }


@pytest.mark.parametrize(("factor", "positions"), [(2.5, 160), (1.0, 64), (0.5, 64)])
def test_dynamic_scaling_lengthens_the_context_and_never_shortens_it(factor, positions):
    fields = read(rope_scaling={"type": "dynamic", "factor": factor})
    assert (fields["max_position_embeddings"], fields["rope_scaling"].factor) == (positions, factor)


@pytest.mark.parametrize(
    ("head_dim", "share", "even"),
    [(8, 0.25, True), (8, 0.75, True), (12, 0.25, False), (10, 0.4, True), (10, 0.5, False)],
)
def test_rotated_channels_come_in_pairs(head_dim, share, even):
    assert rotates_evenly(head_dim, share) == even
    with contextlib.nullcontext() if even else pytest.raises(ConfigError, match=f"got={head_dim} x {share}"):
        require_even_rotation(head_dim, share)


@pytest.mark.parametrize("original", [None, 16])
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_lengths_that_are_written(kind, original):
    """Theirs takes the length that ntk scaling starts from as that of the model; ours of yarn is the model's own by
    default.
    """
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": original, "attention_factor": 1.25}
    config = ModelConfig(**SIZES, **LLAMA, rotary_pct=0.5, rope_scaling=scaling)
    written = rope_to_json(config, partial=True)["rope_parameters"]
    assert written.get("original_max_position_embeddings") == ((original or 64) if kind in ("yarn", "llama3") else None)
    assert positions_to_json(config) == (16 if kind == "ntk" and original else 64)
    assert len(rope_misfits(config)) == (kind == "ntk" and original is None)
    assert written.get("attention_factor") == (1.25 if kind == "yarn" else None)
    assert ("beta_fast" in written, "low_freq_factor" in written) == (kind == "yarn", kind == "llama3")
    assert written["partial_rotary_factor"] == 0.5
    assert "partial_rotary_factor" not in rope_to_json(config)["rope_parameters"]
    assert rope_to_json(config.model_copy(update={"rope_scaling": None}))["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }


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
