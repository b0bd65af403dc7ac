from __future__ import annotations

import dataclasses

import pytest
import torch

from neox.errors import ConfigError
from neox.parallel.embedding import (
    ScoreHead,
    TiedCopy,
    VocabParallelEmbedding,
    VocabParallelHead,
    project_to_vocabulary,
)
from neox.parallel.mesh import Mesh


def test_lookup_and_projection_share_a_table_when_tied():
    table = VocabParallelEmbedding(5, 8, 3, Mesh.single(), dtype=torch.float32)
    torch.nn.init.normal_(table.weight)
    tokens = torch.tensor([[4, 0, 4]])
    assert torch.equal(table(tokens), table.weight[tokens])
    x = torch.randn(2, 3)
    head = VocabParallelHead(5, 8, 3, Mesh.single(), dtype=torch.float32)
    head.weight = table.weight
    assert torch.equal(project_to_vocabulary(x[None], table.weight, table.mesh), head(x[None]))
    assert head(x[None]).shape == (1, 2, 8)


def test_padding_is_outside_the_shard():
    mesh = dataclasses.replace(Mesh.single("meta"), tp=2, rank=1)
    table = VocabParallelEmbedding(13, 16, 3, mesh, dtype=torch.float32)
    assert (table.low, table.high) == (8, 16)
    assert table.weight.shape == (8, 3)
    assert table.sharding["weight"].slices == ((8, 13), (0, 3))


@pytest.mark.parametrize("sequence", [False, True])
def test_the_score_heads_gradient_is_summed_under_sequence_parallelism(sequence):
    mesh = dataclasses.replace(Mesh.single("meta"), tp=2, sequence=sequence)
    spec = ScoreHead(3, mesh, dtype=torch.float32).sharding["weight"]
    assert spec.partial == sequence and spec.shape == (1, 3) and spec.slices == ((0, 1), (0, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_copy_sums_the_gradients_of_micro_batches_in_fp32(dtype):
    copy = TiedCopy(5, 8, 3, Mesh.single(), dtype=dtype)
    assert (copy.weight.shape, copy.weight.dtype, copy.weight.is_leaf) == ((8, 3), dtype, True)
    assert (copy.spec.shape, copy.spec.slices, copy.spec.dim) == ((5, 3), ((0, 5), (0, 3)), 0)
    assert torch.equal(copy.take_gradient(), torch.zeros(8, 3)) and not copy.take_gradient().requires_grad
    copy.replace(torch.ones(8, 3, dtype=dtype))
    for value in (256.0, 1.0, 1.0):  # bf16 would round each sum back to 256
        copy(torch.full((1, 1, 3), value, dtype=dtype, requires_grad=True)).sum().backward()
        assert copy.weight.grad is None
    taken = copy.take_gradient()
    assert taken.dtype == torch.float32 and torch.equal(taken, torch.full((8, 3), 258.0))
    assert not copy.take_gradient().any()


def test_a_tied_copy_is_of_the_rows_of_its_rank_and_can_move():
    copy = TiedCopy(13, 16, 3, dataclasses.replace(Mesh.single("meta"), tp=2, rank=1), dtype=torch.float32)
    assert copy.weight.shape == (8, 3) and copy.spec.slices == ((8, 13), (0, 3)) and copy.weight.is_meta
    copy.replace(torch.full((8, 3), 2.0, dtype=torch.bfloat16))
    assert copy.weight.requires_grad and copy.weight.dtype == torch.bfloat16 and not copy.weight.is_meta


def test_scores_are_products_in_fp32():
    head = ScoreHead(4, Mesh.single(), dtype=torch.bfloat16)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = head(x)
    assert (scores.shape, scores.dtype) == ((2, 3, 1), torch.float32)
    torch.testing.assert_close(scores, x.float() @ head.weight.float().T)


def test_a_vocabulary_that_the_group_does_not_divide():
    mesh = dataclasses.replace(Mesh.single("meta"), tp=3)
    with pytest.raises(ConfigError, match="the padded vocabulary is not a multiple.*got=16 over 3"):
        VocabParallelHead(13, 16, 3, mesh, dtype=torch.float32)
