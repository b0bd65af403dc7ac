"""Planned activations against the tensors that autograd saves in a real forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd.graph import saved_tensors_hooks

from neox.config.schema import Config
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.plan.activations import activations
from neox.plan.sizes import resolve

SEEDS = 256  # bytes of dropout's seeds and ALiBi's slopes, which the plan leaves out
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
}
FORMS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "sequential": {"rotary_pct": 0.5, "tie_embeddings": True},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "tie_embeddings": True},
    "gpt2": {"position_embedding": "learned", "activation": "gelu_tanh"},
    "gptj": {"parallel_residual": True, "shared_residual_norm": True},
    "relu": {"activation": "relu", "position_embedding": "alibi"},
    "silu": {"activation": "silu", "mlp_bias": False},
    "dropout": {"hidden_dropout": 0.1},
}


def make_config(form: str, checkpointing: str = "none", dtype: str = "fp32") -> Config:
    return Config.model_validate(
        {
            "model": {
                "num_layers": 3,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 160,
                "vocab_size": 500,
                "max_position_embeddings": 64,
                **FORMS[form],
            },
            "data": {"seq_length": 48},
            "precision": {"dtype": dtype},
            "train": {"micro_batch_size": 3, "activation_checkpointing": checkpointing},
        }
    )


def held_by_autograd(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the distinct storages that the graph of a forward and its checkpoints hold, parameters and rotary
    tables aside.
    """
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    model = GPT(
        config.model, Mesh.single(), dtype=dtype, activation_checkpointing=config.train.activation_checkpointing
    ).train()
    tokens = torch.randint(0, 500, (3, 48))
    targets = torch.randint(0, 500, (3, 48))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        # keeps it alive, so that an address is not used twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def keep_arguments(function, *arguments, **options):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                pack(argument)
        return torch.utils.checkpoint.checkpoint(function, *arguments, **options)

    monkeypatch.setattr("neox.model.gpt.checkpoint", keep_arguments)
    monkeypatch.setattr("neox.model.mlp.checkpoint", keep_arguments)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, targets).sum()
    if model.rotary is not None:
        known |= {model.rotary.cos.untyped_storage().data_ptr(), model.rotary.sin.untyped_storage().data_ptr()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_activations_match_autograd(form, dtype, monkeypatch):
    config = make_config(form, dtype=dtype)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert plan.saved == plan.uncheckpointed and plan.in_flight == 1
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("form", ["neox", "llama", "sequential", "dropout"])
def test_saved_activations_with_checkpointing_match_autograd(form, checkpointing, monkeypatch):
    config = make_config(form, checkpointing)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert plan.saved < plan.uncheckpointed
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_of_adapted_layers_are_planned_from_above(checkpointing, monkeypatch):
    """Adapted layers save their merged matrices. Inputs that only frozen weights would need are saved by the plan
    alone.
    """
    monkeypatch.setitem(FORMS, "adapters", {**LLAMA, "lora": {"rank": 4}})
    config = make_config("adapters", checkpointing)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    held = held_by_autograd(config, monkeypatch)
    assert held <= plan.saved + plan.logits <= 1.1 * held


@pytest.mark.parametrize("form", ["neox", "sequential"])
def test_a_single_checkpointed_block_saves_its_input(form, monkeypatch):
    monkeypatch.setitem(FORMS, "single", {**FORMS[form], "num_layers": 1})
    config = make_config("single", "full")
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)
