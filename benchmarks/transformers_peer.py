"""transformers' model of a preset, which the benchmarks of training and generation compare neox with."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from neox.config.schema import ModelConfig
from neox.convert.huggingface import from_huggingface
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh


def build_peer(model: ModelConfig, attention: str = "sdpa", initializer_range: float = 0.02) -> PreTrainedModel:
    """transformers' model of the same shape with random weights, on the default device and in the default dtype.

    Args:
        model: a shape of GPT-NeoX's or Llama's architecture.
        attention: "sdpa" or "eager".
        initializer_range: standard deviation of the weights.
    """
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": initializer_range,
        "attn_implementation": attention,
    }
    if model.norm == "rmsnorm":
        config = LlamaConfig(num_key_value_heads=model.num_kv_heads, rope_parameters=rope, **common)
        return LlamaForCausalLM(config)
    rope["partial_rotary_factor"] = model.rotary_pct
    config = GPTNeoXConfig(use_parallel_residual=model.parallel_residual, rope_parameters=rope, **common)
    return GPTNeoXForCausalLM(config)


def neox_copy(peer: PreTrainedModel, mesh: Mesh, dtype: torch.dtype) -> GPT:
    """neox's model with the shape and the weights of the peer."""
    config, weights = from_huggingface(peer)
    model = GPT(config, mesh, dtype=dtype)
    model.load_weights(weights)
    return model


def peer_loss(peer: PreTrainedModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss, computed from fp32 logits as transformers' own loss does."""
    logits = peer(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
