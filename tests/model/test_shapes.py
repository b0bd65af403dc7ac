from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.model.shapes import block_parameters, flops_per_token, logical_shapes, num_parameters
from neox.parallel.mesh import Mesh

SIZES = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "vocab_multiple": 8,
    "max_position_embeddings": 16,
}
FORMS = {
    "neox": {"parallel_residual": True},
    "shared norm": {"parallel_residual": True, "shared_residual_norm": True},
    "gpt2": {"position_embedding": "learned", "tie_embeddings": True},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
    },
    "reward": {"output": "score", "tie_embeddings": True, "mlp_bias": False, "head_dim": 6},
    "adapters": {"lora": {"rank": 3, "targets": ["attention.out", "mlp.gate", "mlp.up"]}, "attention_out_bias": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_those_of_the_modules_over_all_stages(form):
    config = ModelConfig(**SIZES, **FORMS[form])
    want = {name: spec.shape for name, spec in GPT(config, Mesh.single("meta")).shard_specs().items()}
    assert logical_shapes(config) == want
    found = {}
    for rank in range(3):
        stage = GPT(config, dataclasses.replace(Mesh.single("meta"), pp=3, rank=rank))
        for name, spec in stage.shard_specs().items():
            assert name not in found
            found[name] = spec.shape
    assert found == want


def test_counts_of_a_published_model():
    pythia = ModelConfig(
        num_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=50304, parallel_residual=True
    )
    assert num_parameters(pythia) == 162_322_944
    assert flops_per_token(pythia, 2048) == 6 * (12 * 12 * 768**2 + 50304 * 768 + 2 * 12 * 768 * 2048)


def test_matrices_of_a_block():
    llama = ModelConfig(**SIZES, **FORMS["llama"], intermediate_size=80)
    shapes = {name: shape for name, shape in logical_shapes(llama).items() if name.startswith("layers.0.")}
    assert block_parameters(llama) == sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    gpt = ModelConfig(**SIZES)
    assert block_parameters(gpt) == 12 * 32**2
    windowed = ModelConfig(**SIZES, sliding_window=4)
    assert flops_per_token(gpt, 16) - flops_per_token(windowed, 16) == 6 * 2 * 6 * 32 * 12
    assert flops_per_token(windowed, 3) == flops_per_token(gpt, 3)


def test_the_last_stage_of_a_tied_model_copies_the_table():
    config = ModelConfig(**SIZES, tie_embeddings=True)
    meshes = [dataclasses.replace(Mesh.single(), pp=2, rank=rank) for rank in range(2)]
    first, last = (GPT(config, mesh) for mesh in meshes)
    assert "embedding.word.weight" not in dict(last.named_parameters())
    assert torch.equal(first.embedding.word.weight, last.tied.weight)
    whole = {name: torch.rand(shape) for name, shape in logical_shapes(config).items()}
    last.load_weights(whole)
    assert torch.equal(last.tied.weight[:50].detach(), whole["embedding.word.weight"])
    last.tied(torch.ones(1, 2, 32, requires_grad=True)).sum().backward()
    last.tied(torch.ones(1, 2, 32, requires_grad=True)).sum().backward()
    assert torch.equal(last.tied.take_gradient(), torch.full((56, 32), 4.0)) and last.tied.weight.grad is None
    assert not last.tied.take_gradient().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"head_dim": 6, "intermediate_size": 50}, {"sliding_window": 7}])
def test_flops_are_those_of_the_matrices_and_of_every_score(form, options):
    """2 per multiply-add, three times: forward, and two products backward."""
    config = ModelConfig(**SIZES | FORMS[form] | options)
    blocks = {name: shape for name, shape in logical_shapes(config).items() if name.startswith("layers.")}
    matrices = sum(math.prod(shape) for name, shape in blocks.items() if len(shape) == 2 and "lora" not in name)
    head = 32 * (1 if form == "reward" else 50)
    for length in (5, 7, 16):
        keys = min(length, options.get("sliding_window", length))
        scores_and_values = 2 * 6 * 4 * config.head_dim * keys
        assert flops_per_token(config, length) == 6 * (matrices + head + scores_and_values)


def test_parameters_of_published_models():
    """Sizes that their authors give: GPT-2, Llama 2 7B, Qwen3 0.6B (both with one copy of the table and with two)."""
    gpt2 = {"position_embedding": "learned", "tie_embeddings": True, "max_position_embeddings": 1024}
    no_biases = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
    llama = {"norm": "rmsnorm", "activation": "swiglu"} | no_biases
    sizes = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
    small = {"num_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 3072}
    qwen = {"num_kv_heads": 8, "head_dim": 128, "qk_norm": True, "tie_embeddings": True}
    assert num_parameters(ModelConfig(vocab_size=50257, **gpt2)) == 124_439_808
    assert num_parameters(ModelConfig(vocab_size=32000, **llama, **sizes)) == 6_738_415_616
    assert num_parameters(ModelConfig(vocab_size=151936, **llama, **small, **qwen)) == 596_049_920
