"""Shards cover every element of every parameter once in every stage, and what is written is what is read."""

import math

import pytest
import torch

from neox.checkpoint.reshard import check_coverage
from neox.engine.evaluation import evaluate
from neox.parallel.mesh import Mesh
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
