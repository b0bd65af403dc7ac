"""A block as one operator against the block's own path, in every form that a model can have."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model import decode
from neox.model.attention import Context
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


@pytest.mark.parametrize(
    ("tokens", "cached", "gradients", "one_operator"),
    [
        (1, 1, False, True),
        (decode.FEW_TOKENS, 5, False, True),
        (decode.FEW_TOKENS + 1, 5, False, False),
        (1, 0, False, False),
        (1, 5, True, False),
    ],
)
def test_few_new_tokens_after_cached_ones_take_one_operator(tokens, cached, gradients, one_operator):
    model, cache = model_of("llama"), KVCache(99)
    cache.length = cached
    with torch.set_grad_enabled(gradients):
        layers = decode.decoding_layers(model.layers.values(), tokens, cache)
    assert [isinstance(layer, decode.BlockDecoder) for layer in layers] == [one_operator] * 3
    assert one_operator or layers == list(model.layers.values())
    assert [layer.index for layer in layers] == [0, 1, 2] if one_operator else cache.decoders == {}
    with torch.no_grad():
        again = decode.decoding_layers(model.layers.values(), tokens, cache)
    assert all(a is b for a, b in zip(layers, again, strict=True)) or gradients


def turned(weight: torch.Tensor) -> torch.nn.Parameter:
    """The same values in another order in memory."""
    return torch.nn.Parameter(weight.detach().t().contiguous().t())


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.train(),
        lambda block: block.to(torch.float16),
        lambda block: block.to(torch.float64),
        lambda block: block.to("meta"),
        lambda block: setattr(block, "mesh", dataclasses.replace(block.mesh, tp=2)),
        lambda block: setattr(block, "mesh", dataclasses.replace(block.mesh, cp=2)),
        lambda block: setattr(block.attention, "backend", "hopper"),
        lambda block: setattr(block.mlp, "activation", "silu"),
        *(
            lambda block, part=part: block.get_submodule(part).add_adapter(2, 1.0)
            for part in ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
        ),
        lambda block: setattr(block.mlp.down, "weight", turned(block.mlp.down.weight)),
    ],
)
def test_blocks_that_the_operator_does_not_compute(change):
    block = model_of("llama").layers["1"]
    assert decode.BlockDecoder.supports(block)
    change(block)
    assert not decode.BlockDecoder.supports(block)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_the_operator_computes(backend, dtype):
    for form in FORMS:
        assert decode.BlockDecoder.supports(model_of(form, dtype, attention_backend=backend).layers["0"])


def test_a_decoder_needs_a_cache():
    block = model_of("llama").layers["0"]
    with pytest.raises(ValueError, match="needs a context with a cache"):
        decode.BlockDecoder(block)(torch.zeros(1, 1, 48), None, Context())


def test_parameters_are_found_by_their_dotted_names():
    block = model_of("llama").layers["0"]
    found = decode.find_parameter(block, "mlp.up.weight")
    assert torch.equal(found, block.mlp.up.weight) and not found.requires_grad
    for name in ("norm1.bias", "attention.query_norm.weight", "mlp.up", "nothing.weight", "mlp.gate.bias"):
        assert decode.find_parameter(block, name) is None
