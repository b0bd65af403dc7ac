"""Weights by logical name: initial values, loading, reading out."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.model.models import FORMS, SIZES, build, draw


def test_initial_weights_depend_on_seed_and_name_only():
    deep = dict(build("neox", num_layers=3).logical_weights())
    flat = dict(build("neox").logical_weights())
    assert all(torch.equal(weight, deep[name]) for name, weight in flat.items())
    assert not torch.equal(flat["layers.0.mlp.up.weight"], flat["layers.1.mlp.up.weight"])
    other = dict(build("neox", seed=5).logical_weights())
    assert not torch.equal(flat["head.weight"], other["head.weight"])
    padded = dict(build("neox", vocab_multiple=1).logical_weights())
    assert all(torch.equal(weight, padded[name]) for name, weight in flat.items())


def test_meta_then_materialize_equals_direct():
    config = ModelConfig(**(SIZES | FORMS["gpt2"]))
    late = GPT(config, Mesh.single("meta"))
    assert all(parameter.is_meta for parameter in late.parameters())
    late.materialize("cpu")
    direct = GPT(config, Mesh.single())
    assert all(torch.equal(a, b) for a, b in zip(late.parameters(), direct.parameters(), strict=True))
    assert torch.equal(late(draw(1, 5)), direct(draw(1, 5)))


def test_weights_round_trip():
    source, target = build("llama", seed=1), build("llama", seed=2)
    target.load_weights(source.logical_weights())
    assert torch.equal(source(draw(1, 5)), target(draw(1, 5)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("norm.weight"), r"weights are missing; where=norm\.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "no such parameter; where=extra"),
        (
            lambda w: w.update({"norm.weight": torch.ones(47)}),
            r"another shape; where=norm\.weight; got=\(47,\); want=\(48,\)",
        ),
    ],
)
def test_weights_that_do_not_fit(change, match):
    model = build("neox")
    weights = dict(model.logical_weights())
    change(weights)
    with pytest.raises(CheckpointError, match=match):
        model.load_weights(weights)


def test_weight_given_twice():
    model = build("neox")
    with pytest.raises(CheckpointError, match="given twice"):
        model.load_weights([*model.logical_weights(), ("norm.weight", torch.ones(48))])
