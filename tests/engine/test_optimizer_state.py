"""Shards cover every element of every parameter once in every stage, and what is written is what is read."""

import math
from types import SimpleNamespace

import pytest
import torch

from neox.checkpoint.reshard import check_coverage
from neox.config.schema import OptimizerConfig
from neox.engine.evaluation import evaluate
from neox.engine.footprint import optimizer_state_keys
from neox.engine.optimizer import build_optimizer
from neox.engine.optimizer_state import (
    OptimizerState,
    ParameterShard,
    frozen_shards,
    replicated_shards,
    stage3_shards,
)
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


def local_state(kind="adamw", frozen=(), dtype=torch.float32) -> OptimizerState:
    """The state of a process at stage 0, without DeepSpeed: a layer with an adapter, and a head of a reward model."""
    shapes = {"layers.0.up.weight": (4, 3), "layers.0.up.lora_a": (2, 3), "norm.weight": (3,), "score.weight": (1, 3)}
    named = []
    for name, shape in shapes.items():
        p = torch.nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=name not in frozen)
        named.append((name, p, ShardSpec.replicated(*shape)))
    config = OptimizerConfig(type=kind, lr=0.1)
    optimizer = build_optimizer([(name, p) for name, p, _ in named if p.requires_grad], config)
    kinds = {
        name: () if name in frozen else optimizer_state_keys(config, name, len(shape)) for name, shape in shapes.items()
    }
    return OptimizerState(named, None, optimizer, kinds, shapes, (0, 1))


class Noting(Stored):
    """A checkpoint that notes what was checked."""

    def names(self):
        return sorted({key.split("/")[1] for key in self.tensors})

    def check(self, wanted):
        self.checked = {(name, kind): shape for name, kind, shape in wanted}

    def info(self, name):
        return SimpleNamespace(shape=tuple(self.tensors[f"weight/{name}"].shape))

    def read_into(self, out, name, kind, slices, start, stop):
        out.copy_(self.tensors[f"{kind}/{name}"].flatten()[start:stop])


def weights_of(state):
    return {f.name: float(f.data.mean()) for f in state.fragments() if f.kind == "weight"}


def test_what_a_model_adds_keeps_its_initial_weights_where_the_checkpoint_has_none():
    state = local_state()
    base = {"weight/layers.0.up.weight": torch.ones(4, 3), "weight/norm.weight": torch.full((3,), 2.0)}
    checkpoint = Noting(base, {})
    state.take_weights(checkpoint)
    assert checkpoint.checked == {("layers.0.up.weight", "weight"): (4, 3), ("norm.weight", "weight"): (3,)}
    kept = {"layers.0.up.lora_a": 7.0, "score.weight": 7.0}
    assert weights_of(state) == {"layers.0.up.weight": 1.0, "norm.weight": 2.0, **kept}
    checkpoint = Noting({**base, "weight/layers.0.up.lora_a": torch.full((2, 3), 5.0)}, {})
    state.take_weights(checkpoint)
    assert checkpoint.checked["layers.0.up.lora_a", "weight"] == (2, 3)
    assert weights_of(state)["layers.0.up.lora_a"] == 5.0


def test_a_reward_model_accepts_an_output_head_and_does_not_read_it():
    state = local_state()
    tensors = {"weight/layers.0.up.weight": torch.ones(4, 3), "weight/norm.weight": torch.ones(3)}
    checkpoint = Noting({**tensors, "weight/head.weight": torch.ones(9, 3)}, {})
    state.take_weights(checkpoint)
    assert checkpoint.checked["head.weight", "weight"] == (9, 3)
    assert weights_of(state)["score.weight"] == 7.0
    del state.shapes["score.weight"]  # a model that predicts tokens with a tied head: the head is one too many
    state.take_weights(checkpoint)
    assert ("head.weight", "weight") not in checkpoint.checked


def test_a_weight_that_is_missing_is_asked_for():
    checkpoint = Noting({"weight/layers.0.up.weight": torch.ones(4, 3)}, {})
    with pytest.raises(KeyError):  # which a checkpoint's check would have reported
        local_state().take_weights(checkpoint)
    assert ("norm.weight", "weight") in checkpoint.checked


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [("adamw", {"exp_avg", "exp_avg_sq"}), ("lion", {"exp_avg"}), ("sgd", {"momentum_buffer"})],
)
def test_the_state_of_a_resumed_optimizer_is_complete(kind, kinds):
    """Also that of a parameter that has had no gradient yet; frozen ones have a weight only."""
    frozen = ("layers.0.up.weight",)
    state = local_state(kind, frozen)
    assert {f.kind for f in state.fragments() if f.name == "norm.weight"} == {"weight", *kinds}
    assert all(float(f.data.abs().sum()) == 0 for f in state.fragments() if f.kind != "weight")
    assert {f.kind for f in state.fragments() if f.name in frozen} == {"weight"}
    tensors = {f"{of}/{name}": torch.rand(shape) for name, of, shape in state.tensors()}
    state.restore(Noting(tensors, {"optimizer": kind, "updates": 9}), kind)
    for f in state.fragments():
        assert torch.equal(f.data, tensors[f"{f.kind}/{f.name}"].flatten())
    inside = [state.optimizer.state[p] for group in state.optimizer.param_groups for p in group["params"]]
    assert all(one.keys() == kinds | ({"step"} if kind == "adamw" else set()) for one in inside)
    assert kind != "adamw" or {float(one["step"]) for one in inside} == {9.0}
    assert len(state.optimizer.state) == len(inside), "nothing for a frozen one"


def test_frozen_16_bit_weights_are_written_in_fp32():
    state = local_state(frozen=("layers.0.up.weight",), dtype=torch.bfloat16)
    (one,) = [f for f in state.fragments() if f.name == "layers.0.up.weight"]
    assert one.data.dtype == torch.float32 and (one.start, one.stop, one.shape) == (0, 12, (4, 3))


def test_padding_of_the_vocabulary_is_neither_written_nor_read():
    p = torch.nn.Parameter(torch.arange(24.0).view(6, 4))
    spec = ShardSpec.sharded((9, 4), 0, 5, 11)  # rows 5 to 8 of 9, and two of padding
    optimizer = build_optimizer([("w", p)], OptimizerConfig(type="sgd"))
    for rank, want in ((0, (0, 12)), (1, (12, 16))):
        state = OptimizerState([("w", p, spec)], None, optimizer, {"w": ()}, {"w": (9, 4)}, (rank, 2))
        (one,) = state.fragments()
        assert (one.start, one.stop, one.slices) == (*want, ((5, 9), (0, 4)))
        assert one.data.tolist() == list(range(*want))
    state.take_weights(Noting({"weight/w": -torch.arange(1.0, 37.0)}, {}))
    assert p.detach()[:4].flatten().tolist() == [-float(i) for i in range(1, 17)]
    assert p.detach()[4:].flatten().tolist() == list(range(16, 24))


@pytest.mark.parametrize("rank", [0, 2])
def test_the_last_replica_may_have_padding_only(rank):
    p = torch.nn.Parameter(torch.arange(12.0).view(6, 2))
    optimizer = build_optimizer([("w", p)], OptimizerConfig(type="sgd"))
    state = OptimizerState(
        [("w", p, ShardSpec.sharded((4, 2), 0, 0, 6))], None, optimizer, {"w": ()}, {"w": (4, 2)}, (rank, 3)
    )
    assert [(f.start, f.stop) for f in state.fragments()] == ([(0, 4)] if rank == 0 else [])
