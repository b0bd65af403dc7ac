"""Shards cover every element of every parameter once in every stage, and what is written is what is read."""

import math
from types import SimpleNamespace

import pytest
import torch

from neox.checkpoint.reshard import check_coverage
from neox.config.schema import OptimizerConfig
from neox.engine.evaluation import evaluate
from neox.engine.optimizer import build_optimizer
from neox.engine.optimizer_state import ParameterShard, frozen_shards, replicated_shards, stage3_shards
from neox.errors import CheckpointError
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec
from tests.engine.toy import ROWS, VOCAB, Stored, engine_padding, make_config, make_engine, run

STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def engine_of(dtype, stage):
    return make_engine(make_config(zero={"stage": stage}, precision={"dtype": dtype}), Mesh.single())


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_fragments_cover_the_logical_tensors_before_and_after_the_first_step(dtype, stage):
    engine = engine_of(dtype, stage)
    for steps in (0, 2):
        run(engine, 1, steps)
        shards = {}
        for f in engine.fragments():
            shards.setdefault((f.name, f.kind, f.shape), []).append((f.slices, f.start, f.stop))
            assert f.data.numel() == f.stop - f.start
            assert f.data.dtype == torch.float32
        assert set(shards) == set(engine.state.tensors())
        for (name, kind, shape), parts in shards.items():
            check_coverage(name, kind, shape, parts)
    assert VOCAB < ROWS and ("embedding.word", "weight", (VOCAB, 16)) in shards


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_what_is_written_is_read_back_and_reaches_the_model(dtype, stage):
    engine = engine_of(dtype, stage)
    generator = torch.Generator().manual_seed(8)
    tensors = {
        f"{kind}/{name}": torch.rand(shape, generator=generator).view(-1)
        for name, kind, shape in engine.state.tensors()
    }
    engine.restore(Stored(tensors, {"step": 3, "updates": 3, "optimizer": "adamw"}))
    for f in engine.fragments():
        assert torch.equal(f.data, tensors[f"{f.kind}/{f.name}"][f.start : f.stop])
    assert engine_padding(engine) == 0.0
    result = evaluate(engine, [])
    assert math.isnan(result)  # no target was given
    small = dict(engine.model.named_parameters())["norm.weight"]
    assert torch.equal(small.detach().float(), tensors["weight/norm.weight"].to(small.dtype).float())
    counters = {float(state["step"]) for state in engine.state.optimizer.state.values()}
    assert counters == {3.0}


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_a_group_with_a_learning_rate_of_its_own_keeps_it_in_every_stage(dtype, stage, monkeypatch):
    monkeypatch.setattr("neox.engine.optimizer.ROW_BIASES", (".bias",))  # the toy's biases
    sections = {
        "optimizer": {"lr": 0.01, "row_bias_lr_multiplier": 4, "weight_decay": 0.0},
        "schedule": {"type": "constant"},
    }
    engine = make_engine(make_config(zero={"stage": stage}, precision={"dtype": dtype}, **sections), Mesh.single())
    weights = lambda: {f.name: f.data.clone() for f in engine.fragments() if f.kind == "weight"}  # noqa: E731
    before = weights()
    run(engine, 1, 1)
    moved = {name: float((data - before[name]).abs().max()) for name, data in weights().items()}
    # Adam's first step is the rate
    assert moved == pytest.approx({name: 0.04 if name.endswith(".bias") else 0.01 for name in moved}, rel=1e-3)


def held_parts(shards, name):
    return [shard.owned for shard in shards if shard.name == name]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_replicas_write_every_element_once(size):
    """Trained or frozen; also where there are more replicas than elements."""
    named = [
        (name, torch.nn.Parameter(torch.arange(float(count))), ShardSpec.replicated(count))
        for name, count in (("a", 11), ("b", 2))
    ]
    optimizer = build_optimizer([(name, p) for name, p, _ in named], OptimizerConfig(type="sgd"))
    for shards_of in (
        lambda rank: replicated_shards(named, optimizer, rank, size),
        lambda rank: frozen_shards(named, rank, size),
    ):
        shards = [shard for rank in range(size) for shard in shards_of(rank)]
        for name, p, _ in named:
            parts = held_parts(shards, name)
            assert [i for low, high in parts for i in range(low, high)] == list(range(p.numel()))
            assert max(high - low for low, high in parts) <= -(-p.numel() // size)
        assert all((shard.start, shard.stop) == (0, shard.flat.numel()) for shard in shards)
    assert {shard.group for shard in replicated_shards(named, optimizer, 0, 1)} == {0}
    assert {shard.group for shard in frozen_shards(named, 0, 1)} == {-1}


def test_a_view_is_of_the_local_parameter_within_a_flat_partition():
    flat = torch.arange(100.0).requires_grad_()
    shard = ParameterShard("a", ShardSpec.replicated(40), flat, 30, 10, 25, 0, (10, 25))
    assert shard.view(flat, 10, 25).tolist() == list(range(30, 45))
    assert shard.view(flat, 12, 14).tolist() == [32.0, 33.0]
    assert not shard.view(flat, 12, 14).requires_grad
    shard.view(flat, 12, 14).zero_()
    assert float(flat.detach()[32:34].abs().sum()) == 0, "a view, not a copy"


@pytest.mark.parametrize("rank", range(3))
def test_stage_3_pads_the_last_shards(rank):
    """Of 7 elements over 3 processes: 3, 3 and 1; of 2 elements the third process has none."""
    named = [
        (name, torch.nn.Parameter(torch.zeros(0)), ShardSpec.replicated(count)) for name, count in (("a", 7), ("b", 2))
    ]
    for (_, p, _), count in zip(named, (7, 2), strict=True):
        vars(p)["ds_numel"] = count
    flats = [torch.zeros(9), torch.zeros(9)]
    wrapper = SimpleNamespace(
        grad_position={id(named[0][1]): [0, 4, 3], id(named[1][1]): [1, 2, 1]},
        get_param_id=id,
        fp32_partitioned_groups_flat=flats,
        sub_group_to_group_id={0: 5, 1: 6},
    )
    want = {
        0: [("a", 0, 3), ("b", 0, 1)],
        1: [("a", 3, 6), ("b", 1, 2)],
        2: [("a", 6, 7)],
    }[rank]
    shards = list(stage3_shards(named, wrapper, rank))
    assert [(one.name, one.start, one.stop) for one in shards] == want
    assert all(one.owned == (one.start, one.stop) for one in shards)
    assert [(one.offset, one.group, one.flat is flats[i]) for i, one in enumerate(shards)] == [
        (4, 5, True),
        (2, 6, True),
    ][: len(shards)]


@pytest.mark.parametrize(("dtype", "stage"), STAGES[::3])
def test_weights_alone_are_taken_without_the_optimizers_state(dtype, stage):
    engine = engine_of(dtype, stage)
    run(engine, 1, 2)
    before = {(f.kind, f.name): f.data.clone() for f in engine.fragments()}
    weights = {
        f"weight/{name}": torch.rand(shape).view(-1) for name, kind, shape in engine.state.tensors() if kind == "weight"
    }
    engine.take_weights(WeightsOnly(weights, {}))
    for f in engine.fragments():
        want = weights[f"weight/{f.name}"][f.start : f.stop] if f.kind == "weight" else before[f.kind, f.name]
        assert torch.equal(f.data, want), (f.kind, f.name)
    assert (engine.step, engine.updates) == (2, 2)
    small = dict(engine.model.named_parameters())["norm.weight"]
    assert torch.equal(small.detach().float(), weights["weight/norm.weight"].to(small.dtype).float())
    del weights["weight/norm.weight"]
    with pytest.raises(CheckpointError, match="do not fit"):
        engine.take_weights(WeightsOnly(weights, {}))


class WeightsOnly(Stored):
    """A checkpoint without optimizer state."""

    def names(self):
        return sorted(key.removeprefix("weight/") for key in self.tensors)


def test_a_checkpoint_of_weights_alone_cannot_be_resumed():
    engine = engine_of("fp32", 0)
    with pytest.raises(CheckpointError, match="holds weights only: nothing to resume; .*checkpoint.init_from: memory"):
        engine.restore(Stored({}, {"step": 3}))
    assert engine.step == 0
