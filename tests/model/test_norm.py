from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.norm import RMSNorm, dual_norm, make_norm
from neox.parallel.mesh import Mesh


def norms(kind: str):
    config = ModelConfig(num_layers=1, hidden_size=17, num_attention_heads=1, vocab_size=5, norm=kind, norm_eps=0.1)
    made = make_norm(config), make_norm(config)
    for norm in made:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    return made


def formula(norm, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if hasattr(norm, "bias"):
        x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double() + (
        norm.bias.double() if hasattr(norm, "bias") else 0
    )


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_returns_the_normed_sum_and_the_sum(kind):
    norm, _ = norms(kind)
    x, stream = 0.3 * torch.randn(2, 3, 17), 0.3 * torch.randn(2, 3, 17)
    normed, total = norm(x, stream)
    assert torch.allclose(total, x + stream)
    assert torch.allclose(normed.double(), formula(norm, x + stream), atol=1e-5)
    normed, total = norm(x)
    assert total is x
    assert torch.allclose(normed.double(), formula(norm, x), atol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True)])
def test_gradients_are_partial_where_members_of_the_tensor_group_see_other_rows(kind, tp, sequence):
    """Under sequence parallelism each has other tokens; a norm per head has other heads."""
    mesh = replace(Mesh.single(), tp=tp, sequence=sequence)
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=1, vocab_size=5, norm=kind)
    specs = make_norm(config, mesh, torch.float32).sharding
    assert {spec.partial for spec in specs.values()} == {sequence} and {spec.dim for spec in specs.values()} == {None}
    assert specs.keys() == ({"weight", "bias"} if kind == "layernorm" else {"weight"})
    assert RMSNorm(16, 1e-5, mesh, dtype=torch.float32, per_head=True).sharding["weight"].partial == (tp > 1)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("with_stream", [False, True])
def test_dual_norm_is_two_norms(kind, with_stream):
    first, second = norms(kind)
    x, stream = torch.randn(2, 3, 17), torch.randn(2, 3, 17) if with_stream else None
    one, two, total = dual_norm(first, second, x, stream)
    want = x + stream if with_stream else x
    assert torch.allclose(total, want)
    assert torch.allclose(one.double(), formula(first, want), atol=1e-5)
    assert torch.allclose(two.double(), formula(second, want), atol=1e-5)
