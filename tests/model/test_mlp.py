from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from neox.config.schema import ModelConfig
from neox.model.mlp import MLP

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}


def build(activation: str, bias: bool, recompute: bool = False) -> MLP:
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        intermediate_size=23,
        vocab_size=5,
        activation=activation,
        mlp_bias=bias,
    )
    mlp = MLP(config, recompute=recompute)
    for i, parameter in enumerate(mlp.parameters()):
        with torch.no_grad():
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return mlp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_formula(activation, bias):
    mlp, x = build(activation, bias), torch.randn(2, 3, 16)
    up = F.linear(x, mlp.up.weight, mlp.up.bias)
    inner = (
        FUNCTIONS[activation](up)
        if mlp.gate is None
        else FUNCTIONS[activation](F.linear(x, mlp.gate.weight, mlp.gate.bias)) * up
    )
    assert torch.allclose(mlp(x), F.linear(inner, mlp.down.weight, mlp.down.bias), atol=1e-4)
    assert torch.allclose(mlp(x, partial=True), F.linear(inner, mlp.down.weight), atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_recomputation_stores_less_and_changes_nothing(activation):
    x, kept, gradients = torch.randn(64, 16), [], []
    for recompute in (False, True):
        mlp, sizes = build(activation, True, recompute), {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = mlp(x)
        kept.append(sum(sizes.values()))
        out.sum().backward()
        gradients.append([parameter.grad for parameter in mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] <= kept[0] - 64 * 23 * 4


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "geglu"])
def test_recomputation_gives_the_same_output(activation, partial):
    x = torch.randn(3, 16)
    plain, recomputed = (build(activation, True, recompute)(x, partial) for recompute in (False, True))
    assert torch.equal(plain, recomputed)
    assert torch.equal(plain + (build(activation, True).down.bias if partial else 0), build(activation, True)(x))


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    monkeypatch.setattr("neox.model.mlp.checkpoint", lambda *_, **__: pytest.fail("recomputation without gradients"))
    with torch.no_grad():
        build("gelu", True, recompute=True)(torch.ones(2, 16))
    build("gelu", True)(torch.ones(2, 16))
