"""Random Hugging Face models of odd shapes, with weights large enough that every part of the model shows in the
logits.
"""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

NEOX = {
    "vocab_size": 101,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 140,
    "layer_norm_eps": 1e-2,
}
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 92,
    "rms_norm_eps": 1e-2,
    "max_position_embeddings": 64,
}


def neox(rotary_pct: float, **options) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_pct}
    return randomized(
        GPTNeoXForCausalLM, GPTNeoXConfig(**(NEOX | {"max_position_embeddings": 64, "rope_parameters": rope} | options))
    )


def gpt2(**options) -> PreTrainedModel:
    sizes = {
        "vocab_size": 101,
        "n_embd": 60,
        "n_layer": 3,
        "n_head": 5,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return randomized(GPT2LMHeadModel, GPT2Config(**(sizes | options)))


def llama(**options) -> PreTrainedModel:
    return randomized(LlamaForCausalLM, LlamaConfig(**(LLAMA | options)))


def mistral(**options) -> PreTrainedModel:
    return randomized(
        MistralForCausalLM, MistralConfig(**(LLAMA | {"num_key_value_heads": 2, "sliding_window": 7} | options))
    )


def qwen2(**options) -> PreTrainedModel:
    return randomized(Qwen2ForCausalLM, Qwen2Config(**(LLAMA | {"num_key_value_heads": 3} | options)))


def qwen3(**options) -> PreTrainedModel:
    return randomized(Qwen3ForCausalLM, Qwen3Config(**(LLAMA | {"num_key_value_heads": 2, "head_dim": 14} | options)))


def stablelm(**options) -> PreTrainedModel:
    sizes = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"} | {"layer_norm_eps": 1e-2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}  # 4 of 10 channels
    sizes |= {"num_key_value_heads": 3, "rope_parameters": rope}
    return randomized(StableLmForCausalLM, StableLmConfig(**(sizes | options)))


def randomized(kind: type[PreTrainedModel], config) -> PreTrainedModel:
    """A model whose biases are not zero, norms not one, and scores not flat."""
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 / parameter.shape[1] ** 0.5, generator=generator)
            else:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3, generator=generator)
    return model


MODELS = {
    "neox-parallel-25": lambda: neox(0.25),
    "neox-parallel-50": lambda: neox(0.5),
    "neox-sequential-100": lambda: neox(1.0, use_parallel_residual=False),
    "neox-tanh-tied-no-attention-bias": lambda: neox(
        0.5, hidden_act="gelu_new", tie_word_embeddings=True, attention_bias=False
    ),
    "neox-linear-scaling": lambda: neox(
        0.5, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    ),
    "gpt2": gpt2,
    "gpt2-untied-erf": lambda: gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=77),
    "llama": lambda: llama(num_key_value_heads=6),
    "llama-gqa-tied": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True, head_dim=16),
    "llama-mqa-biases-geglu": lambda: llama(
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "llama-llama3-scaling": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "llama-yarn": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "llama-dynamic": lambda: llama(
        max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral-window": mistral,
    "mistral-no-window": lambda: mistral(sliding_window=None),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3-window-bias": lambda: qwen3(
        use_sliding_window=True, sliding_window=5, max_window_layers=0, attention_bias=True
    ),
    "stablelm": stablelm,
    "stablelm-parallel-bias": lambda: stablelm(use_parallel_residual=True, use_qkv_bias=True, tie_word_embeddings=True),
}
