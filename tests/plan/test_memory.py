"""Memory of the stages, against sums made by hand; what a run really takes is compared in tests/train/test_planned.py."""

from __future__ import annotations

import pytest

from neox.config.load import load_config
from neox.engine.footprint import BUCKET
from neox.plan.memory import held, stage_memory
from neox.plan.sizes import resolve


def plan(*overrides: str, world: int = 1, kind: str = "cuda", name: str = "pythia/160M.yml"):
    config = load_config(name, overrides=["train.micro_batch_size=1", "train.global_batch_size=null", *overrides])
    layout = resolve(config, world)
    return config, layout, [stage_memory(config, layout, stage, kind) for stage in layout.stages]


@pytest.mark.parametrize(
    ("zero", "weights", "masters", "gradients"),
    [(1, 2, 4 / 8, 4), (2, 2, 4 / 8, 4 / 8), (3, 2 / 8 + 2, 4 / 8, 4 / 8)],  # bytes per parameter over 8 replicas
)
def test_zero_stages_cut_what_they_say(zero, weights, masters, gradients):
    config, layout, _ = plan(f"zero.stage={zero}", world=8)
    (stage,) = layout.stages
    have = held(config, layout, stage)
    count = stage.parameters
    assert have.weights == pytest.approx(weights * count, rel=1e-6)
    assert have.masters == pytest.approx(masters * count, rel=1e-6)
    assert have.state == pytest.approx(2 * masters * count, rel=1e-6)
    assert have.gradients == pytest.approx(gradients * count, rel=1e-6)


def test_stage_0_in_fp32_has_no_masters():
    config, layout, _ = plan("zero.stage=0", "precision.dtype=fp32", world=2)
    have = held(config, layout, layout.stages[0])
    assert (have.masters, have.weights, have.gradients) == (0, 4 * layout.stages[0].parameters, 4 * layout.stages[0].parameters)
    assert have.state == 8 * layout.stages[0].parameters


def test_stage_0_in_bf16_is_planned_as_the_stage_that_runs():
    config, layout, _ = plan("zero.stage=0", world=2)
    assert held(config, layout, layout.stages[0]) == held(*plan("zero.stage=1", world=2)[:2], layout.stages[0])


def test_buckets_are_no_larger_than_the_parameters():
    config, layout, _ = plan()
    assert held(config, layout, layout.stages[0]).bucket == 4 * layout.stages[0].parameters
    config, layout, _ = plan(name="pythia/1B.yml")
    assert held(config, layout, layout.stages[0]).bucket == 4 * BUCKET
    config, layout, _ = plan("deepspeed.zero_optimization.reduce_bucket_size=1000")
    assert held(config, layout, layout.stages[0]).bucket == 4000


@pytest.mark.parametrize("zero", [1, 2])
def test_overlap_takes_a_second_bucket(zero):
    config, layout, (alone,) = plan(f"zero.stage={zero}", world=2)
    _, _, (both,) = plan(f"zero.stage={zero}", "deepspeed.zero_optimization.overlap_comm=true", world=2)
    bucket = held(config, layout, layout.stages[0]).bucket
    assert {name: both.phases[name] - alone.phases[name] for name in alone.phases} == {"start": 0, "loss": 0, "backward": bucket, "reduce": bucket, "update": 0}
    assert both.buffers - alone.buffers == bucket


def test_a_bucket_larger_than_the_model_is_not_copied_whole():
    _, layout, (fitting,) = plan(world=2)
    count = layout.stages[0].parameters
    _, _, (large,) = plan(f"deepspeed.zero_optimization.reduce_bucket_size={2 * count}", world=2)
    assert large.phases["reduce"] - fitting.phases["reduce"] == 4 * count


@pytest.mark.parametrize(
    ("dtype", "zero", "resident", "gradients"),  # bytes per parameter over 8 replicas; resident: weights, masters and two moments
    [
        ("fp32", 0, 4 + 8, 4),
        ("bf16", 1, 2 + 12 / 8, 4 / 8),
        ("bf16", 2, 2 + 12 / 8, 4 / 8),
        ("bf16", 3, 2 / 8 + 2 + 12 / 8, 4 / 8),
    ],
)
def test_the_update_reads_the_gradients_that_a_process_owns(dtype, zero, resident, gradients):
    config, layout, (memory,) = plan(f"zero.stage={zero}", f"precision.dtype={dtype}", world=8)
    (stage,) = layout.stages
    bucket = held(config, layout, stage).bucket if zero == 1 else 0  # of stage 1, which holds others' gradients until the end of the update
    assert memory.phases["update"] == pytest.approx((resident + gradients) * stage.parameters + bucket, rel=1e-6)


def test_offloaded_state_is_the_hosts():
    _, layout, (here,) = plan()
    _, _, (away,) = plan("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    assert here.optimizer == 12 * layout.stages[0].parameters and away.optimizer == 0
    assert away.host - here.host == here.optimizer
    assert away.peak < here.peak


def test_copies_for_checkpoints_are_host_memory_or_on_a_cpu_the_models():
    _, layout, (gpu,) = plan()
    assert gpu.checkpoint == gpu.host == 12 * layout.stages[0].parameters
    _, _, (one,) = plan(kind="cpu")
    _, _, (none,) = plan("checkpoint.async=false", kind="cpu")
    assert one.peak - none.peak == one.checkpoint and one.host == 0


def test_checkpoints_are_shared_out_over_replicas_and_stages():
    _, layout, memories = plan("parallel.pipeline=2", world=8)
    total = sum(memory.checkpoint for memory in memories) * layout.replicas
    assert total == pytest.approx(12 * 162_322_944, rel=1e-6)  # fp32 weights and two moments of all parameters


def test_early_stages_hold_more_micro_batches():
    _, _, memories = plan("parallel.pipeline=4", "train.gradient_accumulation=8", world=4)
    assert [memory.activations.in_flight for memory in memories] == [4, 3, 2, 1]
    assert memories[1].activations.resident == 3 * memories[1].activations.kept


@pytest.mark.parametrize(("smaller", "larger"), [("full", "selective"), ("selective", "none")])
def test_checkpointing_lowers_the_peak(smaller, larger):
    _, _, (one,) = plan(f"train.activation_checkpointing={smaller}", "train.micro_batch_size=16")
    _, _, (other,) = plan(f"train.activation_checkpointing={larger}", "train.micro_batch_size=16")
    assert one.peak < other.peak
    assert one.activations.whole == other.activations.whole
