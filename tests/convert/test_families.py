from __future__ import annotations

import pytest

from neox.config.schema import ModelConfig
from neox.convert.families import family_for, family_named
from neox.convert.huggingface import config_from_json
from neox.errors import ConfigError

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}

STABLELM_PARALLEL = {"norm": "layernorm", "qkv_bias": True, "parallel_residual": True, "shared_residual_norm": True}


def config(**options) -> ModelConfig:
    return ModelConfig(**({"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 50} | options))


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ({"parallel_residual": True, "rotary_pct": 0.5}, "gpt_neox"),
        ({}, "gpt_neox"),
        ({"position_embedding": "learned", "tie_embeddings": True}, "gpt2"),
        (LLAMA | {"num_kv_heads": 2}, "llama"),
        (LLAMA | {"sliding_window": 9}, "mistral"),
        (LLAMA | {"qkv_bias": True}, "qwen2"),
        (LLAMA | {"qk_norm": True}, "qwen3"),
        (LLAMA | {"norm": "layernorm", "rotary_pct": 0.25}, "stablelm"),
        (LLAMA | STABLELM_PARALLEL, "stablelm"),
    ],
)
def test_family_is_chosen_by_what_the_model_has(options, model_type):
    assert family_for(config(**options)).model_type == model_type


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position_embedding": "alibi"}, "position_embedding=alibi"),
        ({"parallel_residual": True, "shared_residual_norm": True}, "shared_residual_norm=True"),
        ({"attention_softcap": 30.0}, "attention_softcap=30.0"),
        ({"rotary_pct": 0.4}, "rotary_pct=0.4"),
        (LLAMA | {"rotary_pct": 0.5}, "rotary_pct=0.5"),
    ],
)
def test_a_model_that_no_family_holds_is_refused_with_the_reason(options, reason):
    with pytest.raises(ConfigError, match=reason):
        family_for(config(**options))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_rules_cover_exactly_the_parameters(groups):
    from neox.model.gpt import GPT
    from neox.parallel.mesh import Mesh

    for options in (
        {},
        {"position_embedding": "learned", "tie_embeddings": True},
        LLAMA | {"num_kv_heads": groups},
        LLAMA | {"qk_norm": True},
        LLAMA | {"qkv_bias": True},
        LLAMA | {"norm": "layernorm", "num_kv_heads": groups},
        LLAMA | STABLELM_PARALLEL,
    ):
        model = config(**options)
        assert family_for(model).rules(model).keys() == GPT(model, Mesh.single("meta")).shard_specs().keys()


def test_unknown_architecture():
    with pytest.raises(ConfigError, match="got=bert"):
        family_named("bert")


def test_the_width_is_required():
    with pytest.raises(ConfigError, match=r"key is missing in config\.json"):
        config_from_json({"model_type": "llama"})
