"""The keys of config.json that each architecture reads, with the defaults of the classes in transformers.

Only the width is required, because files omit keys that have their default.
"""

from __future__ import annotations

from neox.convert.config_keys import Key
from neox.convert.rope import ROPE_OBJECTS

_SHARED = {
    "initializer_range": Key("number", None, nullable=True),  # does not affect what the model computes
    "pad_token_id": Key("id", None, nullable=True),
}
GPT_NEOX_KEYS = {
    "bos_token_id": Key("id", 0, nullable=True),
    "eos_token_id": Key("ids", 2, nullable=True),
    **_SHARED,
    **ROPE_OBJECTS,
    "vocab_size": Key("count", 50432),
    "hidden_size": Key("count"),
    "num_hidden_layers": Key("count", 44),
    "num_attention_heads": Key("count", 64),
    "intermediate_size": Key("count", 24576),
    "max_position_embeddings": Key("count", 2048),
    "hidden_act": Key("name", "gelu"),
    "layer_norm_eps": Key("positive", 1e-5),
    "use_parallel_residual": Key("flag", True),
    "attention_bias": Key("flag", True),
    "rotary_pct": Key("positive", 0.25),
    "rotary_emb_base": Key("positive", 10000.0),
    "hidden_dropout": Key("share", 0.0),
    "attention_dropout": Key("share", 0.0),
    "tie_word_embeddings": Key("flag", False),
}
GPT2_KEYS = {
    "bos_token_id": Key("id", 50256, nullable=True),
    "eos_token_id": Key("ids", 50256, nullable=True),
    **_SHARED,
    "vocab_size": Key("count", 50257),
    "n_embd": Key("count"),
    "n_layer": Key("count", 12),
    "n_head": Key("count", 12),
    "n_positions": Key("count", 1024),
    "n_inner": Key("count", None, nullable=True),
    "activation_function": Key("name", "gelu_new"),
    "layer_norm_epsilon": Key("positive", 1e-5),
    "scale_attn_weights": Key("flag", True),
    "scale_attn_by_inverse_layer_idx": Key("flag", False),
    "add_cross_attention": Key("flag", False),
    "attn_pdrop": Key("share", 0.1),
    "resid_pdrop": Key("share", 0.1),
    "tie_word_embeddings": Key("flag", True),
}
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_LLAMA_SHARED = {
    **_SHARED,
    **ROPE_OBJECTS,
    "vocab_size": Key("count", 32000),
    "hidden_size": Key("count"),
    "num_hidden_layers": Key("count", 32),
    "num_attention_heads": Key("count", 32),
    "head_dim": Key("count", None, nullable=True),
    "hidden_act": Key("name", "silu"),
    "rms_norm_eps": Key("positive", 1e-6),
    "rope_theta": Key("positive", 10000.0),
    "partial_rotary_factor": Key("positive", None, nullable=True),
    "tie_word_embeddings": Key("flag", False),
}
LLAMA_KEYS = {
    **_LLAMA_SHARED,
    "bos_token_id": Key("id", 1, nullable=True),
    "eos_token_id": Key("ids", 2, nullable=True),
    "intermediate_size": Key("count", 11008),
    "num_key_value_heads": Key("count", None, nullable=True),
    "max_position_embeddings": Key("count", 2048),
    "attention_dropout": Key("share", 0.0, nullable=True),
    "attention_bias": Key("flag", False),
    "mlp_bias": Key("flag", False),
}
MISTRAL_KEYS = {
    **_LLAMA_SHARED,
    "bos_token_id": Key("id", 1, nullable=True),
    "eos_token_id": Key("ids", 2, nullable=True),
    "intermediate_size": Key("count", 14336),
    "num_key_value_heads": Key("count", 8, nullable=True),
    "max_position_embeddings": Key("count", 131072),
    "attention_dropout": Key("share", 0.0),
    "sliding_window": Key("count", 4096, nullable=True),
}
QWEN2_KEYS = {
    **_LLAMA_SHARED,
    "bos_token_id": Key("id", None, nullable=True),
    "eos_token_id": Key("ids", None, nullable=True),
    "vocab_size": Key("count", 151936),
    "intermediate_size": Key("count", 22016),
    "num_key_value_heads": Key("count", 32, nullable=True),
    "max_position_embeddings": Key("count", 32768),
    "attention_dropout": Key("share", 0.0),
    "use_sliding_window": Key("flag", False),
    "sliding_window": Key("count", 4096, nullable=True),
    "max_window_layers": Key("index", 28),
    "layer_types": Key("names", None, nullable=True),
}
QWEN3_KEYS = QWEN2_KEYS | {"head_dim": Key("count", 128), "attention_bias": Key("flag", False)}
STABLELM_KEYS = {
    **_SHARED,
    **ROPE_OBJECTS,
    "bos_token_id": Key("id", 0, nullable=True),
    "eos_token_id": Key("ids", 0, nullable=True),
    "vocab_size": Key("count", 50304),
    "hidden_size": Key("count"),
    "num_hidden_layers": Key("count", 32),
    "num_attention_heads": Key("count", 32),
    "num_key_value_heads": Key("count", 32),
    "intermediate_size": Key("count", 6912),
    "hidden_act": Key("name", "silu"),
    "max_position_embeddings": Key("count", 4096),
    "layer_norm_eps": Key("positive", 1e-5),
    "rope_theta": Key("positive", 10000.0),
    "partial_rotary_factor": Key("positive", 0.25),
    "use_qkv_bias": Key("flag", False),
    "qk_layernorm": Key("flag", False),
    "use_parallel_residual": Key("flag", False),
    "hidden_dropout": Key("share", 0.0),
    "attention_dropout": Key("share", 0.0),
    "tie_word_embeddings": Key("flag", False),
}
