from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.attention import Context
from neox.model.block import Block, make_block
from neox.parallel.mesh import Mesh

FORMS = {
    "sequential": {},
    "parallel": {"parallel_residual": True},
    "shared": {"parallel_residual": True, "shared_residual_norm": True},
}


def build(form: str, **options) -> Block:
    sizes = {
        "num_layers": 1,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "vocab_size": 5,
        "position_embedding": "none",
    }
    block = make_block(ModelConfig(**(sizes | FORMS[form] | options)))
    for i, parameter in enumerate(block.parameters()):
        with torch.no_grad():
            parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(i))
    return block


def formula(block: Block, form: str, x: torch.Tensor) -> torch.Tensor:
    attended = block.attention(block.norm1(x)[0], Context())
    if form == "sequential":
        middle = x + attended
        return middle + block.mlp(block.norm2(middle)[0])
    norm = block.norm1 if form == "shared" else block.norm2
    return x + attended + block.mlp(norm(x)[0])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("biases", ["qkv_bias", "attention_out_bias", "mlp_bias"])
@pytest.mark.parametrize("form", FORMS)
def test_residual_forms(form, biases, norm):
    block = build(form, norm=norm, **{biases: False})
    x, delta = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    with torch.no_grad():
        stream, rest = block(x, delta, Context())
        assert torch.allclose(stream + rest, formula(block, form, x + delta), atol=1e-4)
        stream, rest = block(x, None, Context())
        assert torch.allclose(stream + rest, formula(block, form, x), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_unbiased_and_off_in_evaluation(form):
    block = build(form, hidden_dropout=0.5)
    x = torch.randn(1, 3, 24)
    with torch.no_grad():
        want = formula(block.eval(), form, x)
        stream, rest = block(x, None, Context())
        assert torch.allclose(stream + rest, want, atol=1e-4)
        if form == "sequential":
            return
        block.train()
        torch.manual_seed(0)
        outs = torch.stack([block(x, None, Context())[0] for _ in range(2000)])
        assert block(x, None, Context())[1] is None
    assert (outs.mean(0) - want).abs().max() <= 6 * (outs.std(0) / 2000**0.5).max()


@pytest.mark.parametrize("biases", [None, "attention_out_bias", "mlp_bias"])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_path_with_dropout_is_the_same_formula(form, with_delta, biases):
    """A probability at which nothing is dropped, and one at which everything but the stream is."""
    x, delta = torch.randn(2, 7, 24), torch.randn(2, 7, 24) if with_delta else None
    total = x if delta is None else x + delta
    for probability in (1e-12, 1.0):
        block = build(form, hidden_dropout=0.5, **({} if biases is None else {biases: False})).train()
        block.dropout = probability
        with torch.no_grad():
            stream, rest = block(x, delta, Context())
            assert rest is None
            want = formula(block.eval(), form, total) if probability < 0.5 else total
        assert torch.allclose(stream, want, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_each_branch_has_a_mask_of_its_own(form):
    block = build(form, hidden_dropout=0.5).train()
    with torch.no_grad():
        for part in (block.attention.out, block.mlp.down):  # each branch adds its bias alone
            part.weight.zero_()
        block.attention.out.bias.fill_(1.0)
        block.mlp.down.bias.fill_(10.0)
        stream, _ = block(torch.zeros(4, 50, 24), None, Context())
    found, counts = stream.unique(return_counts=True)
    assert found.tolist() == [0.0, 2.0, 20.0, 22.0]
    assert (counts / stream.numel()).tolist() == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_masks_of_the_tensor_group_differ_where_their_tokens_do(form, sequence):
    sizes = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "vocab_size": 5}
    config, results = ModelConfig(**sizes | FORMS[form], hidden_dropout=0.5), []
    for rank in range(2):
        block = make_block(config, Mesh(tp=2, rank=rank, sequence=sequence)).train()
        for i, parameter in enumerate(block.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(0)
        with torch.no_grad():
            stream, _ = block(torch.ones(2, 7, 24), None, Context.of(config, 7))
        results.append((stream, torch.rand(())))
    assert torch.equal(results[0][0], results[1][0]) != sequence
    assert torch.equal(results[0][1], results[1][1])
