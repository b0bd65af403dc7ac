"""Llama and the architectures that follow it: Mistral, Qwen 2, Qwen 3 and StableLM."""

from __future__ import annotations

from neox.config.schema import GATED, ModelConfig
from neox.convert.family import THEIR_GATES, Family, lookup, unlike, with_biases
from neox.convert.family_keys import LLAMA_KEYS, MISTRAL_KEYS, QWEN2_KEYS, QWEN3_KEYS, STABLELM_KEYS
from neox.convert.family_rules import Rule, same, separate_qkv
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


def _llama_misfits(config: ModelConfig, wanted: JsonObject) -> list[str]:
    fixed = rope_misfits(config) + unlike(
        config,
        norm="rmsnorm",
        position_embedding="rotary",
        rotary_pct=1.0,
        parallel_residual=False,
        attention_softcap=None,
        hidden_dropout=0.0,
    )
    return fixed + unlike(config, activation=tuple(GATED), **wanted)


def _llama_to_json(config: ModelConfig) -> JsonObject:
    return rope_to_json(config) | {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": GATED[config.activation],
        "max_position_embeddings": positions_to_json(config),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral_to_json(config: ModelConfig) -> JsonObject:
    return _llama_to_json(config) | {"sliding_window": config.sliding_window}


def _qwen_to_json(config: ModelConfig) -> JsonObject:
    windowed = config.sliding_window is not None
    return _llama_to_json(config) | {
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if windowed else config.num_layers,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * config.num_layers,
    }


def _llama_from_json(theirs: JsonObject, attention_bias: bool = False, mlp_bias: bool = False) -> JsonObject:
    """Return the fields shared by Llama and its descendants. Only Llama itself has keys for both biases."""
    heads, head_dim = theirs["num_attention_heads"], theirs["head_dim"]
    rope = rope_from_json(theirs, theirs["rope_theta"], theirs["partial_rotary_factor"] or 1.0)
    if rope["rotary_pct"] != 1:
        raise ConfigError(
            "partial rotary embedding is not supported",
            where="config.json: partial_rotary_factor",
            got=rope["rotary_pct"],
            want="1, as in Llama",
        )
    return rope | {
        "num_layers": theirs["num_hidden_layers"],
        "num_kv_heads": heads if theirs["num_key_value_heads"] is None else theirs["num_key_value_heads"],
        "head_dim": theirs["hidden_size"] // heads if head_dim is None else head_dim,
        "norm": "rmsnorm",
        "norm_eps": theirs["rms_norm_eps"],
        "activation": lookup(THEIR_GATES, theirs["hidden_act"], "config.json: hidden_act"),
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }


def _mistral_from_json(theirs: JsonObject) -> JsonObject:
    return _llama_from_json(theirs) | {"sliding_window": theirs["sliding_window"]}


def _qwen_window(theirs: JsonObject) -> int | None:
    """Return the window if every layer has it, None if no layer has one.

    Raises:
        ConfigError: only some layers have a window.
    """
    window = theirs["sliding_window"] if theirs["use_sliding_window"] else None
    layers, kinds = theirs["num_hidden_layers"], theirs["layer_types"]
    if kinds is None:
        full = layers if window is None else min(theirs["max_window_layers"], layers)
        sliding = layers - full
    else:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
        strange = sorted(set(kinds) - {"sliding_attention", "full_attention"})
        if strange or len(kinds) != layers:
            got = ", ".join(strange[:4]) or f"{len(kinds)} layers"
            raise ConfigError(
                "layer types are not supported",
                where="config.json: layer_types",
                got=got,
                want=f"{layers} x full_attention or sliding_attention",
            )
    if sliding not in (0, layers):
        raise ConfigError(
            "layers differ in their attention window",
            where="config.json: layer_types",
            got=f"{sliding} of {layers} have a window",
            want="all or none",
        )
    return window if sliding else None


def _qwen2_from_json(theirs: JsonObject) -> JsonObject:
    return _llama_from_json(theirs) | {"sliding_window": _qwen_window(theirs), "qkv_bias": True}


def _qwen3_from_json(theirs: JsonObject) -> JsonObject:
    return _llama_from_json(theirs, theirs["attention_bias"]) | {
        "sliding_window": _qwen_window(theirs),
        "qk_norm": True,
    }


def _llama_rules(config: ModelConfig) -> dict[str, Rule]:
    rules = {"embedding.word.weight": same("model.embed_tokens.weight")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rules[f"{ours}.norm1.weight"] = same(f"{theirs}.input_layernorm.weight")
        rules[f"{ours}.norm2.weight"] = same(f"{theirs}.post_attention_layernorm.weight")
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            rules[f"{ours}.attention.qkv.{kind}"] = separate_qkv(f"{theirs}.self_attn", kind, config)
        rules.update(with_biases(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", config.attention_out_bias))
        if config.qk_norm:
            rules[f"{ours}.attention.query_norm.weight"] = same(f"{theirs}.self_attn.q_norm.weight")
            rules[f"{ours}.attention.key_norm.weight"] = same(f"{theirs}.self_attn.k_norm.weight")
        for part in ("up", "gate", "down"):
            rules.update(with_biases(f"{ours}.mlp.{part}", f"{theirs}.mlp.{part}_proj", config.mlp_bias))
    rules["norm.weight"] = same("model.norm.weight")
    return rules | ({} if config.tie_embeddings else {"head.weight": same("lm_head.weight")})


def _stablelm_misfits(config: ModelConfig) -> list[str]:
    fixed = rope_misfits(config) + unlike(
        config,
        norm="layernorm",
        position_embedding="rotary",
        activation=tuple(GATED),
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
    )
    even = rotates_evenly(config.head_dim, config.rotary_pct)
    fixed += unlike(
        config,
        attention_softcap=None,
        head_dim=config.hidden_size // config.num_attention_heads,
        shared_residual_norm=config.parallel_residual,
        hidden_dropout=0.0,  # StableLM drops out the output of the MLP alone
        rotary_pct=config.rotary_pct if even else None,
    )
    return fixed


def _stablelm_to_json(config: ModelConfig) -> JsonObject:
    return rope_to_json(config, partial=True) | {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": GATED[config.activation],
        "max_position_embeddings": positions_to_json(config),
        "layer_norm_eps": config.norm_eps,
        "partial_rotary_factor": config.rotary_pct,
        "use_qkv_bias": config.qkv_bias,
        "qk_layernorm": False,
        "use_parallel_residual": config.parallel_residual,
        "attention_dropout": config.attention_dropout,
    }


def _stablelm_from_json(theirs: JsonObject) -> JsonObject:
    if theirs["qk_layernorm"]:
        raise ConfigError(
            "a norm with its own weights for each head is not supported",
            where="config.json: qk_layernorm",
            got=True,
            want=False,
        )
    if theirs["hidden_dropout"]:
        raise ConfigError(
            "dropout of the MLP alone is not supported",
            where="config.json: hidden_dropout",
            got=theirs["hidden_dropout"],
            want=0,
        )
    rope = rope_from_json(theirs, theirs["rope_theta"], theirs["partial_rotary_factor"])
    require_even_rotation(theirs["hidden_size"] // theirs["num_attention_heads"], rope["rotary_pct"])
    return rope | {
        "num_layers": theirs["num_hidden_layers"],
        "num_kv_heads": theirs["num_key_value_heads"],
        "norm_eps": theirs["layer_norm_eps"],
        "activation": lookup(THEIR_GATES, theirs["hidden_act"], "config.json: hidden_act"),
        "qkv_bias": theirs["use_qkv_bias"],
        "attention_out_bias": False,
        "mlp_bias": False,
        "parallel_residual": theirs["use_parallel_residual"],
        "shared_residual_norm": theirs["use_parallel_residual"],
    }


def _stablelm_rules(config: ModelConfig) -> dict[str, Rule]:
    rules = _llama_rules(config)
    norms = {"norm": "model.norm"}
    for i in range(config.num_layers):
        norms[f"layers.{i}.norm1"] = f"model.layers.{i}.input_layernorm"
        norms[f"layers.{i}.norm2"] = f"model.layers.{i}.post_attention_layernorm"
        if config.parallel_residual:  # one norm for both branches
            del norms[f"layers.{i}.norm2"], rules[f"layers.{i}.norm2.weight"]
    for ours, name in norms.items():
        rules.update(with_biases(ours, name))
    return rules


_LLAMA_FIXED = {"qk_norm": False, "sliding_window": None}
_QWEN2_FIXED = {"qk_norm": False, "qkv_bias": True, "attention_out_bias": False, "mlp_bias": False}

LLAMA_FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        LLAMA_KEYS,
        lambda config: _llama_misfits(config, _LLAMA_FIXED | {"attention_out_bias": config.qkv_bias}),
        _llama_to_json,
        lambda theirs: _llama_from_json(theirs, theirs["attention_bias"], theirs["mlp_bias"]),
        _llama_rules,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        MISTRAL_KEYS,
        lambda config: _llama_misfits(
            config, {"qk_norm": False, "qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
        ),
        _mistral_to_json,
        _mistral_from_json,
        _llama_rules,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        QWEN2_KEYS,
        lambda config: _llama_misfits(config, _QWEN2_FIXED),
        _qwen_to_json,
        _qwen2_from_json,
        _llama_rules,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        QWEN3_KEYS,
        lambda config: _llama_misfits(
            config, {"qk_norm": True, "attention_out_bias": config.qkv_bias, "mlp_bias": False}
        ),
        _qwen_to_json,
        _qwen3_from_json,
        _llama_rules,
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        STABLELM_KEYS,
        _stablelm_misfits,
        _stablelm_to_json,
        _stablelm_from_json,
        _stablelm_rules,
    ),
)
