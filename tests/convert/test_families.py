from __future__ import annotations

import json

import pytest
import torch

from neox.config.schema import ModelConfig, SpecialIds
from neox.convert.families import family_for, family_named
from neox.convert.huggingface import config_from_json, config_json
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


@pytest.mark.parametrize(
    ("options", "closest"),
    [
        ({"attention_softcap": 30.0}, "GPTNeoXForCausalLM"),
        ({"position_embedding": "learned", "qk_norm": True}, "GPT2LMHeadModel"),
        (LLAMA | {"rotary_pct": 0.5}, "LlamaForCausalLM"),
        (LLAMA | {"qk_norm": True, "rotary_pct": 0.5}, "Qwen3ForCausalLM"),
    ],
)
def test_the_closest_architecture_is_named(options, closest):
    with pytest.raises(ConfigError, match=f"settings that {closest}, the closest architecture"):
        family_for(config(**options))


def test_a_reward_model_is_not_exported():
    with pytest.raises(ConfigError, match=r"reward models cannot be exported; where=model\.output; got=score"):
        family_for(config(output="score"))


GPT2 = {"position_embedding": "learned", "tie_embeddings": True}
NTK = {"type": "ntk", "factor": 2.0}
NO_BIASES = {"qkv_bias": False, "attention_out_bias": False}


@pytest.mark.parametrize(
    ("model_type", "fitting", "others"),
    [
        (
            "gpt_neox",
            ({}, {"parallel_residual": True}, NO_BIASES, {"rotary_pct": 0.75}, {"hidden_dropout": 0.1}),
            {
                "norm": "rmsnorm",
                "position_embedding": "alibi",
                "mlp_bias": False,
                "qk_norm": True,
                "sliding_window": 9,
                "attention_softcap": 30.0,
                "activation": "swiglu",
                "num_kv_heads": 2,
                "attention_out_bias": False,
                "head_dim": 12,
                "rotary_pct": 0.625,
                "rope_scaling": NTK,
            },
        ),
        (
            "gpt2",
            (GPT2, GPT2 | {"activation": "relu", "tie_embeddings": False, "hidden_dropout": 0.1}),
            {
                "norm": "rmsnorm",
                "position_embedding": "rotary",
                "parallel_residual": True,
                "qkv_bias": False,
                "attention_out_bias": False,
                "mlp_bias": False,
                "qk_norm": True,
                "sliding_window": 9,
                "attention_softcap": 30.0,
                "activation": "swiglu",
                "num_kv_heads": 2,
                "head_dim": 12,
            },
        ),
        (
            "llama",
            (
                LLAMA,
                LLAMA | {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
                LLAMA | {"num_kv_heads": 2, "head_dim": 12, "activation": "geglu", "attention_dropout": 0.1},
            ),
            {
                "norm": "layernorm",
                "position_embedding": "learned",
                "rotary_pct": 0.5,
                "parallel_residual": True,
                "attention_softcap": 30.0,
                "hidden_dropout": 0.1,
                "activation": "silu",
                "qk_norm": True,
                "sliding_window": 9,
                "attention_out_bias": True,
                "rope_scaling": NTK,
            },
        ),
        (
            "mistral",
            (LLAMA, LLAMA | {"sliding_window": 9, "num_kv_heads": 2, "head_dim": 12}),
            {"qk_norm": True, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "activation": "gelu"},
        ),
        (
            "qwen2",
            (LLAMA | {"qkv_bias": True}, LLAMA | {"qkv_bias": True, "sliding_window": 9}),
            {"qk_norm": True, "qkv_bias": False, "attention_out_bias": True, "mlp_bias": True, "hidden_dropout": 0.1},
        ),
        (
            "qwen3",
            (LLAMA | {"qk_norm": True}, LLAMA | {"qk_norm": True, "qkv_bias": True, "attention_out_bias": True}),
            {"qk_norm": False, "attention_out_bias": True, "mlp_bias": True, "norm": "layernorm"},
        ),
        (
            "stablelm",
            (LLAMA | {"norm": "layernorm"}, LLAMA | STABLELM_PARALLEL | {"rotary_pct": 0.25, "num_kv_heads": 2}),
            {
                "norm": "rmsnorm",
                "position_embedding": "alibi",
                "activation": "gelu",
                "attention_out_bias": True,
                "mlp_bias": True,
                "qk_norm": True,
                "sliding_window": 9,
                "attention_softcap": 30.0,
                "head_dim": 12,
                "parallel_residual": True,
                "hidden_dropout": 0.1,
                "rotary_pct": 0.625,
                "rope_scaling": NTK,
            },
        ),
    ],
)
def test_settings_that_an_architecture_supports_and_those_that_it_does_not(model_type, fitting, others):
    family = family_named(model_type)
    assert [family.misfits(config(**options)) for options in fitting] == [[]] * len(fitting)
    for key, value in others.items():
        (misfit,) = family.misfits(config(**fitting[0] | {key: value}))
        reported = "shared_residual_norm" if (model_type, key) == ("stablelm", "parallel_residual") else key
        assert misfit.startswith(reported), (key, misfit)


@pytest.mark.parametrize("model_type", ["gpt_neox", "stablelm"])
def test_one_norm_for_both_branches_as_the_architecture_has_it(model_type):
    parallel = LLAMA | STABLELM_PARALLEL if model_type == "stablelm" else {"parallel_residual": True}
    shared = {"shared_residual_norm": model_type != "stablelm"}
    assert family_named(model_type).misfits(config(**parallel)) == []
    assert family_named(model_type).misfits(config(**parallel | shared)) == [
        f"shared_residual_norm={shared['shared_residual_norm']}"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"parallel_residual": True, "rotary_pct": 0.25, "hidden_dropout": 0.2, "rope_theta": 500.0},
        NO_BIASES | {"activation": "relu"},
        GPT2 | {"hidden_dropout": 0.2, "activation": "silu"},
        LLAMA | {"num_kv_heads": 2, "head_dim": 12, "mlp_bias": True, "rope_theta": 500.0},
        LLAMA | {"qkv_bias": True, "attention_out_bias": True, "activation": "reglu"},
        LLAMA | {"num_kv_heads": 3, "sliding_window": 9},
        LLAMA | {"qkv_bias": True, "num_kv_heads": 1, "sliding_window": 9},
        LLAMA | {"qk_norm": True, "num_kv_heads": 2, "head_dim": 12, "qkv_bias": True, "attention_out_bias": True},
        LLAMA | {"norm": "layernorm", "rotary_pct": 0.25, "rope_theta": 500.0, "num_kv_heads": 2},
        LLAMA | STABLELM_PARALLEL | {"activation": "geglu"},
    ],
)
def test_every_setting_survives_an_export_and_an_import(options):
    """No value is the default of either side."""
    model = config(
        **{"num_layers": 3, "intermediate_size": 72, "max_position_embeddings": 96, "norm_eps": 3e-4}
        | {"init_std": 0.03, "attention_dropout": 0.3}
        | options
    )
    written = config_json(model, family_for(model), torch.bfloat16, SpecialIds(bos=1, eos=(2, 3), pad=4))
    read = config_from_json(json.loads(json.dumps(written)))
    assert read == model
    assert (written["dtype"], written["torch_dtype"], written["architectures"]) == (
        "bfloat16",
        "bfloat16",
        [family_for(model).architecture],
    )
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [2, 3], 4)


def test_the_dropouts_of_gpt2_are_those_of_its_class():
    model = config(**GPT2, hidden_dropout=0.2, attention_dropout=0.3)
    written = family_for(model).to_json(model)
    assert [written[f"{name}_pdrop"] for name in ("embd", "resid", "attn")] == [0.2, 0.2, 0.3]
