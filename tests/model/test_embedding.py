"""The embedding with learned positions and dropout."""

from __future__ import annotations

import torch

from neox.config.schema import ModelConfig
from neox.model.embedding import Embedding
from neox.model.sharded import initialize

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
