"""Weights by logical name: initial values, loading, reading out."""

from __future__ import annotations

import re

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.model.norm import LayerNorm
from neox.model.sharded import initialize, shard_specs
from neox.parallel.embedding import ScoreHead
from neox.parallel.linear import ColumnParallelLinear
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


def test_the_first_of_many_missing_weights_are_named_and_counted():
    model = build("neox")
    weights = dict(model.logical_weights())
    kept = {name: weights[name] for name in list(weights)[:3]}
    names = sorted(set(weights) - set(kept))
    with pytest.raises(CheckpointError, match=re.escape(f"where={', '.join(names[:4])}; got=3 of {len(weights)}")):
        model.load_weights(kept)


def test_weights_are_cast_to_the_model_and_padding_is_zero():
    source = dict(build("neox", seed=1).logical_weights())
    model = build("neox", vocab_multiple=64).bfloat16()
    with torch.no_grad():
        model.head.weight.fill_(7.0)
    model.load_weights(iter(source.items()))
    for name, weight in model.logical_weights():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, source[name].bfloat16()), name
    assert not model.head.weight[97:].any() and model.head.weight.requires_grad


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_loads_its_part_of_the_complete_weights(rank):
    config = ModelConfig(**(SIZES | FORMS["gpt2"]))
    whole = dict(GPT(config, seed=3).logical_weights())
    stage = GPT(config, Mesh(pp=2, rank=rank))
    with pytest.raises(CheckpointError, match="weights are missing"):
        stage.load_weights(dict(stage.logical_weights()))
    stage.load_weights(whole)
    held = dict(stage.logical_weights())
    assert all(torch.equal(weight, whole[name]) for name, weight in held.items())
    assert {name.split(".")[0] for name in held} == ({"embedding", "layers"} if rank == 0 else {"layers", "norm"})
    assert {name.split(".")[1] for name in held if name.startswith("layers")} == {str(rank)}
    if rank == 1:
        assert torch.equal(stage.tied.weight[:97], whole["embedding.word.weight"])


def test_a_model_can_be_allocated_without_values(monkeypatch):
    monkeypatch.setattr(GPT, "initialize", lambda self: pytest.fail("initialised"))
    config = ModelConfig(**(SIZES | FORMS["gpt2"]))
    model = GPT(config, Mesh(pp=2, rank=1, device=torch.device("meta"))).materialize("cpu", initialize=False)
    assert all(parameter.is_cpu for parameter in model.parameters())
    assert model.tied.weight.is_cpu and model.tied.weight.requires_grad
    assert model.mesh == Mesh(pp=2, rank=1)


def test_values_of_a_layer_alone_are_those_of_its_names():
    config = ModelConfig(**SIZES)
    norm = initialize(LayerNorm(8, 1e-5), config)
    assert torch.equal(norm.weight, torch.ones(8)) and torch.equal(norm.bias, torch.zeros(8))
    linear = ColumnParallelLinear(400, 6, Mesh(), units=1, what="", bias=True, dtype=torch.float32)
    linear.add_adapter(300, 1.0)
    initialize(linear, config)
    assert not linear.bias.any() and not linear.lora_b.any()
    assert linear.lora_a.std().item() == pytest.approx(400**-0.5, rel=0.02)
    heads = [initialize(ScoreHead(8, Mesh(), dtype=torch.float32), config, seed).weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert list(shard_specs(norm)) == ["weight", "bias"]
