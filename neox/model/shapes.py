"""Parameter names and shapes, parameter counts and FLOPs: computed from the config, without torch."""

from __future__ import annotations

import math

from neox.config.schema import ModelConfig
from neox.model.adapters import adapter_shapes


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and logical shape of every parameter of the complete model, in layer order; tied weights once."""
    h, f = config.hidden_size, config.intermediate_size
    norm = {"weight": (h,), **({"bias": (h,)} if config.norm == "layernorm" else {})}
    rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    inner = config.num_attention_heads * config.head_dim

    def linear(prefix: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.weight": (out, into), **({f"{prefix}.bias": (out,)} if bias else {})}

    block = {f"norm1.{key}": shape for key, shape in norm.items()}
    block |= linear("attention.qkv", rows, h, config.qkv_bias) | linear(
        "attention.out", h, inner, config.attention_out_bias
    )
    if config.qk_norm:
        block |= {"attention.query_norm.weight": (config.head_dim,), "attention.key_norm.weight": (config.head_dim,)}
    if not (config.parallel_residual and config.shared_residual_norm):
        block |= {f"norm2.{key}": shape for key, shape in norm.items()}
    block |= linear("mlp.up", f, h, config.mlp_bias)
    if config.gated:
        block |= linear("mlp.gate", f, h, config.mlp_bias)
    block |= linear("mlp.down", h, f, config.mlp_bias)
    if config.lora is not None:
        block |= adapter_shapes(config.lora, block)
    shapes = {"embedding.word.weight": (config.vocab_size, h)}
    if config.position_embedding == "learned":
        shapes["embedding.position.weight"] = (config.max_position_embeddings, h)
    shapes |= {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in block.items()}
    shapes |= {f"norm.{key}": shape for key, shape in norm.items()}
    if config.output == "score":
        shapes["score.weight"] = (1, h)
    elif not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, h)
    return shapes


def block_parameters(config: ModelConfig) -> int:
    """Elements of the matrices of one block; vectors are negligible and not counted."""
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = config.hidden_size * (qkv + config.num_attention_heads * config.head_dim)
    return attention + (3 if config.gated else 2) * config.hidden_size * config.intermediate_size


def head_rows(config: ModelConfig) -> int:
    """Rows of the output's matrix: the vocabulary, or one of a reward model."""
    return 1 if config.output == "score" else config.vocab_size


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the logical model: without vocabulary padding, tied weights once."""
    return sum(math.prod(shape) for shape in logical_shapes(config).values())


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward per token: 2 per multiply-add, the backward twice the forward, no recomputation.

    Only matrix products and attention count. Attention counts in full, as in the tables of Megatron-LM and llm-foundry:
    every query against all seq_length keys (or sliding_window keys, if fewer), although the causal mask hides half.
    """
    matrices = config.num_layers * block_parameters(config) + head_rows(config) * config.hidden_size
    keys = min(seq_length, config.sliding_window or seq_length)
    attention = 2 * config.num_layers * config.num_attention_heads * config.head_dim * keys
    return 6 * (matrices + attention)
