"""Small models in every form, for the tests of this folder."""

from __future__ import annotations

import torch

from neox.config.schema import ModelConfig
from neox.model.gpt import GPT

SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "init_std": 0.3,
    "output_init": "normal",
}
NO_BIAS = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
FORMS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "neox-sequential": {},
    "gpt2": {"position_embedding": "learned", "tie_embeddings": True, "activation": "gelu_tanh"},
    "gptj": {"parallel_residual": True, "shared_residual_norm": True, "qkv_bias": False, "attention_out_bias": False},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2} | NO_BIAS,
    "rms-parallel": {"norm": "rmsnorm", "activation": "geglu", "parallel_residual": True},
    "qwen3-window": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1, "qk_norm": True, "sliding_window": 5}
    | NO_BIAS,
    "alibi": {"position_embedding": "alibi", "activation": "relu"},
    "no-positions-softcap": {"position_embedding": "none", "attention_softcap": 5.0, "activation": "silu"},
}


def build(form: str, seed: int = 1234, **options) -> GPT:
    model = GPT(ModelConfig(**(SIZES | FORMS[form] | options)), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))
