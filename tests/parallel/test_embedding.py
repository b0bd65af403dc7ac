from __future__ import annotations

import dataclasses

import pytest
import torch

from neox.parallel.embedding import ScoreHead, VocabParallelEmbedding, VocabParallelHead, project_to_vocabulary
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
