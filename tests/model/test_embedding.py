"""The embedding with learned positions and dropout."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.embedding import Embedding
from neox.model.sharded import initialize
from neox.parallel.mesh import Mesh

SIZES = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 11, "max_position_embeddings": 9}
TOKENS = torch.tensor([[3, 1, 10], [0, 0, 7]])


def build(**options) -> Embedding:
    config = ModelConfig(**(SIZES | options))
    return initialize(Embedding(config), config)


def test_learned_positions_are_added_to_the_words():
    embedding = build(position_embedding="learned")
    words, positions = embedding.word.weight[TOKENS], embedding.position.weight
    assert torch.equal(embedding(TOKENS), words + positions[:3])
    assert torch.equal(embedding(TOKENS, start=4), words + positions[4:7])
    ids = torch.tensor([[8, 0, 2], [1, 1, 1]])
    assert torch.equal(embedding(TOKENS, 4, ids), words + positions[ids])


def test_other_position_embeddings_add_nothing():
    embedding = build(position_embedding="alibi")
    assert embedding.position is None and torch.equal(embedding(TOKENS, start=4), embedding.word.weight[TOKENS])


def test_dropout_acts_in_training_only():
    embedding = build(hidden_dropout=0.5)
    torch.manual_seed(0)
    dropped = embedding.train()(TOKENS)
    without = embedding.eval()(TOKENS)
    assert torch.equal(without, embedding.word.weight[TOKENS])
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert torch.equal(dropped[dropped != 0], 2 * without[dropped != 0])


@pytest.mark.parametrize("rank", [0, 1])
def test_learned_positions_of_a_share_of_the_sequence(rank):
    """With sequence parallelism the words that arrive are those of this process's part."""
    config = ModelConfig(**SIZES, position_embedding="learned", vocab_multiple=1)
    mesh = Mesh(tp=2, sequence=True, rank=rank)
    embedding = Embedding(config.model_copy(update={"vocab_size": 12}), mesh)
    embedding.position.weight.data.normal_()
    embedding.word = torch.nn.Embedding(12, 8)
    words, positions = embedding.word(TOKENS), embedding.position.weight
    assert torch.equal(embedding(TOKENS, start=2), words + positions[2 + 3 * rank : 5 + 3 * rank])


def test_words_are_padded_and_positions_are_not():
    embedding = build(position_embedding="learned", vocab_multiple=8)
    assert (embedding.word.weight.shape, embedding.position.weight.shape) == ((16, 8), (9, 8))
    assert Embedding(ModelConfig(**SIZES), dtype=torch.bfloat16).word.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("sequence", [False, True])
def test_masks_of_the_tensor_group_differ_where_their_tokens_do(sequence):
    config, masks = ModelConfig(**SIZES, hidden_dropout=0.5), []
    for rank in range(2):
        embedding = Embedding(config, Mesh(tp=2, rank=rank, sequence=sequence)).train()
        torch.nn.init.ones_(embedding.word.weight)
        torch.manual_seed(0)
        masks.append((embedding(TOKENS), torch.rand(())))
    assert torch.equal(masks[0][0], masks[1][0]) != sequence
    assert torch.equal(masks[0][1], masks[1][1])
