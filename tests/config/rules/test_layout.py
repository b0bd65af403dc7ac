"""Layouts that satisfy every condition of a rule but one are valid."""

from __future__ import annotations

import re

import pytest

from neox.config.load import load_config
from neox.config.rules import data_parallel_size
from neox.config.validate import validate
from tests.config.rules.contradictions import BASE

PAIRS = "data.train=[{path: a, rejected: b}]"


VALID_LAYOUTS = [  # (processes, overrides): each condition of a rule but one
    (1, "model.attention_softcap=30"),
    (1, "model.head_dim=256 model.attention_backend=native"),
    (1, "model.position_embedding=alibi model.head_dim=9"),
    (1, "model.position_embedding=learned data.seq_length=64"),
    (1, "model.rope_scaling={type: linear, factor: 1}"),
    (
        1,
        "model.rope_scaling={type: linear, factor: 2, low_freq_factor: 4, high_freq_factor: 4, beta_slow: 32, "
        "beta_fast: 32}",
    ),
    (1, "model.rope_scaling={type: llama3, factor: 4, original_max_position_embeddings: 64}"),
    (1, "model.parallel_residual=true"),
    (1, "data.packing=best_fit"),
    (1, "data.order=neox"),
    (1, "train.objective=sft data.train=[{path: a, labels: b}] data.packing=best_fit"),
    (1, f"train.objective=dpo {PAIRS}"),
    (1, f"train.objective=dpo {PAIRS} data.validation=[{{path: c, rejected: d}}] evaluate.interval=5"),
    (1, "train.objective=dpo data.train=[{path: a, labels: b, rejected: c, rejected_labels: d}]"),
    (1, f"train.objective=reward model.output=score {PAIRS}"),
    (1, "train.objective=reward model.output=score data.train=[{path: a, labels: b, rejected: c}]"),
    (2, f"train.objective=reward model.output=score {PAIRS} parallel.tensor=2 parallel.sequence=true"),
    (2, f"train.objective=dpo {PAIRS} parallel.pipeline=2"),
    (2, "train.objective=sft data.train=[{path: a, labels: b}] parallel.context=2"),
    (1, "data.train=[] data.path=x data.split='99,1'"),
    (1, "model.lora={rank: 2} zero.stage=2"),
    (1, "model.lora={rank: 2, targets: [mlp.gate]} model.activation=swiglu"),
    (1, "model.lora={rank: 2, targets: [mlp.gate, mlp.up]}"),
    (1, "model.lora={rank: 2} model.tie_embeddings=true"),
    (2, "model.lora={rank: 2} parallel.pipeline=2 model.tie_embeddings=false"),
    (
        2,
        f"model.lora={{rank: 2}} parallel.pipeline=2 model.tie_embeddings=true train.objective=reward "
        f"model.output=score {PAIRS}",
    ),
    (1, "zero.stage=3"),
    (1, "schedule.type=wsd schedule.warmup_iters=99 schedule.cooldown_iters=1"),
    *((1, f"schedule.rule=gpt_neox schedule.type={kind}") for kind in ("constant", "linear", "cosine")),
    (1, "precision.min_loss_scale=4 precision.initial_scale_power=2"),
    (1, "optimizer.type=muon"),
    (4, "parallel.tensor=2 parallel.pipeline=2"),
    (8, "parallel.tensor=2 parallel.pipeline=2 parallel.context=2"),
    (8, "parallel.tensor=2"),
    (2, "parallel.tensor=2 data.seq_length=63"),
    (4, "parallel.tensor=2 parallel.context=2 parallel.sequence=true data.seq_length=60"),
    (4, "parallel.tensor=2 parallel.context=2 model.num_kv_heads=4"),
    (2, "parallel.pipeline=2 zero.stage=1"),
    (2, "parallel.pipeline=2 parallel.partition=[1, 1]"),
    (2, "zero.stage=2"),
    (1, "zero.stage=1 deepspeed.zero_optimization.offload_optimizer.device=cpu"),
    (1, "guard.loss_spike=rollback checkpoint.save_interval=0 checkpoint.save_iters=[5]"),
    (1, "guard.loss_spike=rollback checkpoint.save_interval=5"),
    (1, "guard.loss_spike=skip data.order=neox checkpoint.save_interval=0"),
]


@pytest.mark.parametrize(("world_size", "overrides"), VALID_LAYOUTS, ids=str)
def test_valid_layouts_pass(world_size, overrides):
    values = re.split(r" (?=[a-z0-9_.]+=)", overrides)
    validate(load_config(overrides=[*BASE, *values]), world_size, "cpu")


def test_the_data_parallel_size_is_what_the_other_axes_leave():
    config = load_config(overrides=[*BASE, "parallel.tensor=2", "parallel.context=2"])
    assert [data_parallel_size(config, world_size) for world_size in (1, 4, 8)] == [1, 1, 2]
