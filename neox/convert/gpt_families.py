"""GPT-NeoX (Pythia) and GPT-2."""

from __future__ import annotations

from neox.config.schema import ModelConfig
from neox.convert.family import THEIR_ACTIVATIONS, UNGATED_ACTIVATIONS, Family, lookup, unlike, with_biases
from neox.convert.family_keys import GPT2_ALIASES, GPT2_KEYS, GPT_NEOX_KEYS
from neox.convert.family_rules import Rule, contiguous_qkv, same, transposed
from neox.convert.rope import (
    positions_to_json,
    require_even_rotation,
    rope_from_json,
    rope_misfits,
    rope_to_json,
    rotates_evenly,
)
from neox.errors import ConfigError
from neox.files import JsonObject

# GPT-NeoX, Pythia


def _gpt_neox_misfits(config: ModelConfig) -> list[str]:
    fixed = rope_misfits(config) + unlike(
        config,
        norm="layernorm",
        position_embedding="rotary",
        mlp_bias=True,
        qk_norm=False,
        sliding_window=None,
        attention_softcap=None,
    )
    fixed += unlike(
        config,
        activation=tuple(UNGATED_ACTIVATIONS),
        num_kv_heads=config.num_attention_heads,
        attention_out_bias=config.qkv_bias,
    )
    fixed += unlike(config, head_dim=config.hidden_size // config.num_attention_heads)
    fixed += unlike(
        config, rotary_pct=config.rotary_pct if rotates_evenly(config.head_dim, config.rotary_pct) else None
    )
    return fixed + (unlike(config, shared_residual_norm=False) if config.parallel_residual else [])


def _gpt_neox_to_json(config: ModelConfig) -> JsonObject:
    return rope_to_json(config, partial=True) | {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": UNGATED_ACTIVATIONS[config.activation],
        "max_position_embeddings": positions_to_json(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rope_theta,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
    }


def _gpt_neox_from_json(theirs: JsonObject) -> JsonObject:
    rope = rope_from_json(theirs, theirs["rotary_emb_base"], theirs["rotary_pct"])
    require_even_rotation(theirs["hidden_size"] // theirs["num_attention_heads"], rope["rotary_pct"])
    return rope | {
        "num_layers": theirs["num_hidden_layers"],
        "norm_eps": theirs["layer_norm_eps"],
        "activation": lookup(THEIR_ACTIVATIONS, theirs["hidden_act"], "config.json: hidden_act"),
        "parallel_residual": theirs["use_parallel_residual"],
        "qkv_bias": theirs["attention_bias"],
        "attention_out_bias": theirs["attention_bias"],
        "hidden_dropout": theirs["hidden_dropout"],
    }


def _gpt_neox_rules(config: ModelConfig) -> dict[str, Rule]:
    rules = {"embedding.word.weight": same("gpt_neox.embed_in.weight")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        rules.update(with_biases(f"{ours}.norm1", f"{theirs}.input_layernorm"))
        rules.update(with_biases(f"{ours}.norm2", f"{theirs}.post_attention_layernorm"))
        rules.update(with_biases(f"{ours}.attention.qkv", f"{theirs}.attention.query_key_value", config.qkv_bias))
        rules.update(with_biases(f"{ours}.attention.out", f"{theirs}.attention.dense", config.attention_out_bias))
        rules.update(with_biases(f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h"))
        rules.update(with_biases(f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h"))
    rules.update(with_biases("norm", "gpt_neox.final_layer_norm"))
    return rules | ({} if config.tie_embeddings else {"head.weight": same("embed_out.weight")})


# GPT-2


def _gpt2_misfits(config: ModelConfig) -> list[str]:
    fixed = unlike(
        config,
        norm="layernorm",
        position_embedding="learned",
        parallel_residual=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    fixed += unlike(
        config, qk_norm=False, sliding_window=None, attention_softcap=None, num_kv_heads=config.num_attention_heads
    )
    return fixed + unlike(
        config, activation=tuple(UNGATED_ACTIVATIONS), head_dim=config.hidden_size // config.num_attention_heads
    )


def _gpt2_to_json(config: ModelConfig) -> JsonObject:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
    }


def _gpt2_from_json(theirs: JsonObject) -> JsonObject:
    for key, want in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if theirs[key] is not want:
            raise ConfigError("GPT-2 option is not supported", where=f"config.json: {key}", got=theirs[key], want=want)
    return {
        "hidden_size": theirs["n_embd"],
        "num_layers": theirs["n_layer"],
        "num_attention_heads": theirs["n_head"],
        "intermediate_size": 4 * theirs["n_embd"] if theirs["n_inner"] is None else theirs["n_inner"],
        "max_position_embeddings": theirs["n_positions"],
        "position_embedding": "learned",
        "activation": lookup(THEIR_ACTIVATIONS, theirs["activation_function"], "config.json: activation_function"),
        "norm_eps": theirs["layer_norm_epsilon"],
        "attention_dropout": theirs["attn_pdrop"],
        "hidden_dropout": theirs["resid_pdrop"],
    }


def _gpt2_rules(config: ModelConfig) -> dict[str, Rule]:
    rules = {
        "embedding.word.weight": same("transformer.wte.weight"),
        "embedding.position.weight": same("transformer.wpe.weight"),
    }
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        rules.update(with_biases(f"{ours}.norm1", f"{theirs}.ln_1"))
        rules.update(with_biases(f"{ours}.norm2", f"{theirs}.ln_2"))
        rules[f"{ours}.attention.qkv.weight"] = contiguous_qkv(f"{theirs}.attn.c_attn.weight", config, transpose=True)
        rules[f"{ours}.attention.qkv.bias"] = contiguous_qkv(f"{theirs}.attn.c_attn.bias", config, transpose=False)
        for mine, name in (("attention.out", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            rules[f"{ours}.{mine}.weight"] = transposed(f"{theirs}.{name}.weight")
            rules[f"{ours}.{mine}.bias"] = same(f"{theirs}.{name}.bias")
    rules.update(with_biases("norm", "transformer.ln_f"))
    return rules | ({} if config.tie_embeddings else {"head.weight": same("lm_head.weight")})


GPT_FAMILIES = (
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        GPT_NEOX_KEYS,
        _gpt_neox_misfits,
        _gpt_neox_to_json,
        _gpt_neox_from_json,
        _gpt_neox_rules,
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", GPT2_KEYS, _gpt2_misfits, _gpt2_to_json, _gpt2_from_json, _gpt2_rules, GPT2_ALIASES
    ),
)
