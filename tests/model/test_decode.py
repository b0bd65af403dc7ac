"""A block as one operator against the block's own path, in every form that a model can have."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model import decode
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.mesh import Mesh

SHAPE = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
FORMS = {
    "neox": {"rotary_pct": 0.25, "parallel_residual": True},
    "sequential, exact gelu": {"parallel_residual": False, "activation": "gelu"},
    "shared norm": {"parallel_residual": True, "shared_residual_norm": True, "rotary_pct": 0.5},
    "gpt2": {
        "position_embedding": "learned",
        "tie_embeddings": True,
        "parallel_residual": False,
        "activation": "gelu_tanh",
    },
    "llama": {**LLAMA, "num_kv_heads": 2},
    "parallel rms": {**LLAMA, "activation": "geglu", "parallel_residual": True},
    "mlp bias": {"norm": "rmsnorm", "activation": "reglu", "num_kv_heads": 1},
    "qwen3": {**LLAMA, "num_kv_heads": 1, "sliding_window": 5, "qk_norm": True},
    "alibi": {"position_embedding": "alibi"},
    "softcap": {"attention_softcap": 2.0, "num_kv_heads": 2},
}
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 0.06}


def model_of(form: str, dtype: torch.dtype = torch.float32, **extra) -> GPT:
    """A random model; biases and norms are random too."""
    model = GPT(ModelConfig(**SHAPE, **FORMS[form], **extra), Mesh.single(), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.2)
    return model


def logits_of(
    model: GPT, tokens: torch.Tensor, steps: list[int], pads: list[int] | None = None
) -> tuple[torch.Tensor, KVCache]:
    """Logits of all tokens [b, t, v], read in steps of the given sizes; pads: padding before each sequence."""
    cache = KVCache(tokens.shape[1])
    parts, columns = [], torch.arange(tokens.shape[1])[None]
    with torch.inference_mode():
        for step in steps:
            start, end = cache.length, cache.length + step
            options = {}
            if pads:
                padding = torch.tensor(pads)[:, None]
                options = {
                    "segment_ids": (columns[:, :end] >= padding).int(),
                    "position_ids": (columns[:, start:end] - padding).clamp(min=0),
                }
            parts.append(model(tokens[:, start:end], cache=cache, **options))
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "pads"), [(1, None), (3, [0, 4, 2])])
def test_equals_the_ordinary_path(form, dtype, batch, pads, monkeypatch):
    model = model_of(form, dtype)
    tokens = torch.randint(97, (batch, 20), generator=torch.Generator().manual_seed(1))
    steps = [9, 1, 1, 2, 1, 2, 1, 1, 1, 1]
    got, cache = logits_of(model, tokens, steps, pads)
    assert sorted(cache.decoders) == [0, 1, 2]
    assert all(isinstance(one, decode.BlockDecoder) for one in cache.decoders.values())
    monkeypatch.setattr(decode, "FEW_TOKENS", 0)
    want, cache = logits_of(model, tokens, steps, pads)
    assert cache.decoders == {}
    visible = torch.arange(20)[None] >= torch.tensor(pads or [0] * batch)[:, None]
    error = (got.double() - want.double()).abs()[visible].max() / want.double().abs().max()
    assert error < DTYPES[dtype]


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "relu"},
        {"attention_backend": "sdpa"},
        {"lora": {"rank": 2, "alpha": 4.0}},
    ],
    ids=["activation", "sdpa", "lora"],
)
def test_unsupported_blocks_take_the_ordinary_path(change):
    model = GPT(ModelConfig(**SHAPE, **change), Mesh.single()).eval()
    tokens = torch.arange(10)[None]
    got, cache = logits_of(model, tokens, [8, 1, 1])
    assert cache.decoders == {0: None, 1: None, 2: None}
    want = logits_of(model, tokens, [10])[0]
    assert (got - want).abs().max() < 1e-5


def test_gradients_and_dropout_take_the_ordinary_path():
    model = model_of("llama")
    cache = KVCache(10)
    model(torch.arange(8)[None], cache=cache)
    model(torch.arange(1)[None], cache=cache)
    assert cache.decoders == {}
    model.train()
    with torch.no_grad():
        model(torch.arange(1)[None], cache=cache)
    assert cache.decoders == {0: None, 1: None, 2: None}
