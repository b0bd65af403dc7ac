"""Low-rank adapters: nothing at first, then exactly what the merged weight computes; what a run trains and what it
adds.
"""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import LoraConfig, ModelConfig
from neox.model.adapters import adapter_shapes, is_adapter, is_added, is_trained
from neox.model.gpt import GPT
from neox.parallel.linear import merge_adapter
from neox.parallel.mesh import Mesh

SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "vocab_multiple": 32,
    "max_position_embeddings": 16,
    "init_std": 0.2,
}
FORMS = [{"parallel_residual": True}, {"activation": "swiglu", "norm": "rmsnorm", "mlp_bias": False}]
LORA = {"rank": 3, "alpha": 7.0}
TOKENS = torch.arange(12).view(1, 12)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_adapter_is_neutral_and_a_trained_one_equals_the_merged_weight(form):
    plain = GPT(ModelConfig(**SIZES, **form), Mesh.single())
    model = GPT(ModelConfig(**SIZES, **form, lora=LORA), Mesh.single())
    assert torch.equal(model(TOKENS), plain(TOKENS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    assert not torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-2)
    held = dict(model.named_parameters())
    merged = {name: weight for name, weight in held.items() if not is_adapter(name)}
    for name in [name for name in held if name.endswith("lora_a")]:
        base = name.removesuffix(".lora_a")
        a, b = held[name].double(), held[f"{base}.lora_b"].double()
        weight = merge_adapter(held[f"{base}.weight"], held[name], held[f"{base}.lora_b"], 7.0 / 3.0)
        torch.testing.assert_close(weight.double(), held[f"{base}.weight"] + 7.0 / 3.0 * b @ a, atol=1e-5, rtol=1e-5)
        merged[f"{base}.weight"] = weight
    plain.load_weights(merged)
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_only_adapters_and_a_new_head_have_gradients():
    model = GPT(ModelConfig(**SIZES, lora=LORA | {"targets": ["attention.qkv"]}, output="score"), Mesh.single())
    model(TOKENS, TOKENS).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {
        "score.weight",
        *(f"layers.{i}.attention.qkv.lora_{factor}" for i in range(2) for factor in "ab"),
    }
    assert (
        trained
        == {name for name in model.logical_shapes() if is_trained(model.config, name)}
        == {name for name in model.logical_shapes() if is_added(name)}
    )


def test_names_and_shapes_are_those_of_the_model():
    for form in FORMS:
        model = GPT(ModelConfig(**SIZES, **form, lora=LORA), Mesh.single("meta"))
        assert {name: spec.shape for name, spec in model.shard_specs().items()} == model.logical_shapes()
    assert adapter_shapes(LoraConfig(rank=2, targets=("mlp.gate", "mlp.up")), {"mlp.up.weight": (8, 5)}) == {
        "mlp.up.lora_a": (2, 5),
        "mlp.up.lora_b": (8, 2),
    }


def test_a_reward_model_scores_positions():
    model = GPT(ModelConfig(**SIZES, output="score"), Mesh.single())
    scores = model(TOKENS)
    assert scores.shape == (1, 12, 1) and scores.dtype == torch.float32
    assert torch.equal(model(TOKENS, TOKENS), scores.flatten())
    assert "head.weight" not in dict(model.named_parameters())
