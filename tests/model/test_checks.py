"""Inputs that a forward pass refuses."""

from __future__ import annotations

import pytest
import torch

from neox.errors import DataError
from neox.model.kv_cache import KVCache
from tests.model.models import build, draw


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.tensor([[1, 97]]), r"token id outside the vocabulary.*got=97; want=0 \.\. 96"),
        (torch.tensor([[-1, 3]]), "got=-1"),
        (torch.zeros(1, 4, dtype=torch.int32), "wrong form.*torch.int32"),
        (torch.zeros(4, dtype=torch.int64), "wrong form"),
        (torch.zeros(1, 0, dtype=torch.int64), "wrong form"),
    ],
)
def test_wrong_tokens(tokens, match):
    with pytest.raises(DataError, match=match):
        build("neox")(tokens)


@pytest.mark.parametrize("target", [97, -1])
def test_wrong_targets(target):
    with pytest.raises(DataError, match=f"target id outside the vocabulary.*got={target}"):
        build("neox")(draw(1, 3), torch.tensor([[1, target, -100]]))


def test_targets_of_another_shape():
    with pytest.raises(DataError, match="targets do not fit"):
        build("neox")(draw(1, 3), draw(1, 4))


@pytest.mark.parametrize("form", ["neox", "gpt2"])
def test_positions_beyond_the_table(form):
    model = build(form)
    model(draw(1, 32))
    with pytest.raises(
        DataError,
        match=r"longer than the model's positions; where=model\.max_position_embeddings; got=position 32; want=0 \.\. "
        r"31",
    ):
        model(draw(1, 33))
    with pytest.raises(DataError, match="got=position 40"):
        model(draw(1, 2), position_ids=torch.tensor([[0, 40]]))
    cache = KVCache(33)
    cache.length = 30
    with pytest.raises(DataError, match="got=position 32"):
        model(draw(1, 3), cache=cache)


def test_alibi_has_no_maximum_length():
    assert build("alibi")(draw(1, 50)).shape == (1, 50, 97)
