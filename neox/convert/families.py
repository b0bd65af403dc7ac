"""Hugging Face architectures that neox imports and exports: conversion of their configs and weights.

A family converts configs both ways, and has one rule per neox parameter, so that weights are converted tensor by tensor
in either direction. Sources: the published configs and weight names of the architectures.

In this package "ours" is a name or value of neox, and "theirs" one of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from neox.config.schema import GATED, ModelConfig
from neox.convert.config_keys import Key
from neox.convert.family_keys import (
    GPT2_ALIASES,
    GPT2_KEYS,
    GPT_NEOX_KEYS,
    LLAMA_KEYS,
    MISTRAL_KEYS,
    QWEN2_KEYS,
    QWEN3_KEYS,
)
from neox.convert.family_rules import Rule, contiguous_qkv, same, separate_qkv, transposed
from neox.convert.rope import positions_to_json, rope_from_json, rope_misfits, rope_to_json
from neox.errors import ConfigError
from neox.files import JsonObject

UNGATED_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # neox -> Hugging Face
THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
THEIR_GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        model_type: as in config.json.
        architecture: class name, as in config.json.
        keys: the keys of config.json that it reads, with the defaults of the class and the meaning of null.
        misfits: neox config -> settings that the architecture does not support; empty if all are supported.
        to_json: neox config -> the keys of config.json that are specific to the architecture.
        from_json: values of all keys -> fields of the neox config.
        rules: neox config -> neox parameter name -> Rule.
        aliases: other names of keys.
    """

    model_type: str
    architecture: str
    keys: dict[str, Key]
    misfits: Callable[[ModelConfig], list[str]]
    to_json: Callable[[ModelConfig], JsonObject]
    from_json: Callable[[JsonObject], JsonObject]
    rules: Callable[[ModelConfig], dict[str, Rule]]
    aliases: dict[str, str] = field(default_factory=dict)


def _unlike(config: ModelConfig, **wanted: object) -> list[str]:
    """List the keys of a config whose value is not the wanted one, or one of a tuple of wanted ones."""
    fields = config.model_dump()
    return [
        f"{key}={fields[key]}"
        for key, want in wanted.items()
        if fields[key] not in (want if isinstance(want, tuple) else (want,))
    ]


def _lookup(table: dict[str, str], value: str, where: str) -> str:
    if value not in table:
        raise ConfigError("activation is not supported", where=where, got=value[:80], want=", ".join(table))
    return table[value]


# GPT-NeoX, Pythia


def _rotates_evenly(head_dim: int, rotary_pct: float) -> bool:
    """Whether head_dim x rotary_pct is even. For odd numbers Hugging Face rotates one channel more, neox one less."""
    return int(head_dim * rotary_pct) % 2 == 0


def _gpt_neox_misfits(config: ModelConfig) -> list[str]:
    fixed = rope_misfits(config) + _unlike(
        config,
        norm="layernorm",
        position_embedding="rotary",
        mlp_bias=True,
        qk_norm=False,
        sliding_window=None,
        attention_softcap=None,
    )
    fixed += _unlike(
        config,
        activation=tuple(UNGATED_ACTIVATIONS),
        num_kv_heads=config.num_attention_heads,
        attention_out_bias=config.qkv_bias,
    )
    fixed += _unlike(config, head_dim=config.hidden_size // config.num_attention_heads)
    fixed += _unlike(
        config, rotary_pct=config.rotary_pct if _rotates_evenly(config.head_dim, config.rotary_pct) else None
    )
    return fixed + (_unlike(config, shared_residual_norm=False) if config.parallel_residual else [])


def _gpt_neox_to_json(config: ModelConfig) -> JsonObject:
    rope = rope_to_json(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_pct
    return rope | {
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
    head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
    if not _rotates_evenly(head_dim, rope["rotary_pct"]):
        raise ConfigError(
            "odd number of rotary channels",
            where="config.json: rotary_pct",
            got=f"{head_dim} x {rope['rotary_pct']}",
            want="an even number",
        )
    return rope | {
        "num_layers": theirs["num_hidden_layers"],
        "norm_eps": theirs["layer_norm_eps"],
        "activation": _lookup(THEIR_ACTIVATIONS, theirs["hidden_act"], "config.json: hidden_act"),
        "parallel_residual": theirs["use_parallel_residual"],
        "qkv_bias": theirs["attention_bias"],
        "attention_out_bias": theirs["attention_bias"],
        "hidden_dropout": theirs["hidden_dropout"],
    }


def _with_biases(ours: str, theirs: str, bias: bool = True) -> Iterator[tuple[str, Rule]]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield f"{ours}.{kind}", same(f"{theirs}.{kind}")


def _gpt_neox_rules(config: ModelConfig) -> dict[str, Rule]:
    rules = {"embedding.word.weight": same("gpt_neox.embed_in.weight")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        rules.update(_with_biases(f"{ours}.norm1", f"{theirs}.input_layernorm"))
        rules.update(_with_biases(f"{ours}.norm2", f"{theirs}.post_attention_layernorm"))
        rules.update(_with_biases(f"{ours}.attention.qkv", f"{theirs}.attention.query_key_value", config.qkv_bias))
        rules.update(_with_biases(f"{ours}.attention.out", f"{theirs}.attention.dense", config.attention_out_bias))
        rules.update(_with_biases(f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h"))
        rules.update(_with_biases(f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h"))
    rules.update(_with_biases("norm", "gpt_neox.final_layer_norm"))
    return rules | ({} if config.tie_embeddings else {"head.weight": same("embed_out.weight")})


# GPT-2


def _gpt2_misfits(config: ModelConfig) -> list[str]:
    fixed = _unlike(
        config,
        norm="layernorm",
        position_embedding="learned",
        parallel_residual=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    fixed += _unlike(
        config, qk_norm=False, sliding_window=None, attention_softcap=None, num_kv_heads=config.num_attention_heads
    )
    return fixed + _unlike(
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
        "activation": _lookup(THEIR_ACTIVATIONS, theirs["activation_function"], "config.json: activation_function"),
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
        rules.update(_with_biases(f"{ours}.norm1", f"{theirs}.ln_1"))
        rules.update(_with_biases(f"{ours}.norm2", f"{theirs}.ln_2"))
        rules[f"{ours}.attention.qkv.weight"] = contiguous_qkv(f"{theirs}.attn.c_attn.weight", config, transpose=True)
        rules[f"{ours}.attention.qkv.bias"] = contiguous_qkv(f"{theirs}.attn.c_attn.bias", config, transpose=False)
        for mine, name in (("attention.out", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            rules[f"{ours}.{mine}.weight"] = transposed(f"{theirs}.{name}.weight")
            rules[f"{ours}.{mine}.bias"] = same(f"{theirs}.{name}.bias")
    rules.update(_with_biases("norm", "transformer.ln_f"))
    return rules | ({} if config.tie_embeddings else {"head.weight": same("lm_head.weight")})


# Llama and its descendants


def _llama_misfits(config: ModelConfig, wanted: JsonObject) -> list[str]:
    fixed = rope_misfits(config) + _unlike(
        config,
        norm="rmsnorm",
        position_embedding="rotary",
        rotary_pct=1.0,
        parallel_residual=False,
        attention_softcap=None,
        hidden_dropout=0.0,
    )
    return fixed + _unlike(config, activation=tuple(GATED), **wanted)


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
        "activation": _lookup(THEIR_GATES, theirs["hidden_act"], "config.json: hidden_act"),
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
        rules.update(_with_biases(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", config.attention_out_bias))
        if config.qk_norm:
            rules[f"{ours}.attention.query_norm.weight"] = same(f"{theirs}.self_attn.q_norm.weight")
            rules[f"{ours}.attention.key_norm.weight"] = same(f"{theirs}.self_attn.k_norm.weight")
        for part in ("up", "gate", "down"):
            rules.update(_with_biases(f"{ours}.mlp.{part}", f"{theirs}.mlp.{part}_proj", config.mlp_bias))
    rules["norm.weight"] = same("model.norm.weight")
    return rules | ({} if config.tie_embeddings else {"head.weight": same("lm_head.weight")})


_LLAMA_FIXED = {"qk_norm": False, "sliding_window": None}
_QWEN2_FIXED = {"qk_norm": False, "qkv_bias": True, "attention_out_bias": False, "mlp_bias": False}

FAMILIES = (
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
)


def family_for(config: ModelConfig) -> Family:
    """Return the architecture that represents this config exactly.

    Raises:
        ConfigError: there is none; names the settings that the closest one does not support.
    """
    if config.output == "score":
        raise ConfigError("reward models cannot be exported", where="model.output", got="score", want="tokens")
    ranked = sorted(FAMILIES, key=lambda family: len(family.misfits(config)))
    misfits = ranked[0].misfits(config)
    if misfits:
        raise ConfigError(
            "no Hugging Face architecture represents this model",
            where="model",
            got=", ".join(misfits),
            want=f"settings that {ranked[0].architecture}, the closest architecture, supports",
        )
    return ranked[0]


def family_named(model_type: object) -> Family:
    """Return the architecture of a model_type in config.json.

    Raises:
        ConfigError: it is not supported.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise ConfigError(
        "architecture is not supported",
        where="config.json: model_type",
        got=model_type,
        want=", ".join(family.model_type for family in FAMILIES),
    )
