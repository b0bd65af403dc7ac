"""Memory of the stages against sums by hand. tests/train/test_plan_check.py compares it with real runs."""

from __future__ import annotations

import math

import pytest

from neox.config.load import load_config
from neox.engine.footprint import BUCKET
from neox.plan.memory import optimizer_memory, stage_memory
from neox.plan.sizes import resolve


def plan(*overrides: str, world: int = 1, kind: str = "cuda", name: str = "pythia/160M.yml"):
    config = load_config(name, overrides=["train.micro_batch_size=1", "train.global_batch_size=null", *overrides])
    layout = resolve(config, world)
    return config, layout, [stage_memory(config, layout, stage, kind) for stage in layout.stages]


@pytest.mark.parametrize(
    ("zero", "weights", "masters", "gradients"),
    [(1, 2, 4 / 8, 4), (2, 2, 4 / 8, 4 / 8), (3, 2 / 8 + 2, 4 / 8, 4 / 8)],  # bytes per parameter over 8 replicas
)
def test_zero_stages_shard_optimizer_state_gradients_and_weights(zero, weights, masters, gradients):
    config, layout, _ = plan(f"zero.stage={zero}", world=8)
    (stage,) = layout.stages
    have = optimizer_memory(config, layout, stage)
    count = stage.parameters
    assert have.weights == pytest.approx(weights * count, rel=1e-6)
    assert have.masters == pytest.approx(masters * count, rel=1e-6)
    assert have.state == pytest.approx(2 * masters * count, rel=1e-6)
    assert have.gradients == pytest.approx(gradients * count, rel=1e-6)


def test_stage_0_in_fp32_has_no_masters():
    config, layout, _ = plan("zero.stage=0", "precision.dtype=fp32", world=2)
    have = optimizer_memory(config, layout, layout.stages[0])
    assert (have.masters, have.weights, have.gradients) == (
        0,
        4 * layout.stages[0].parameters,
        4 * layout.stages[0].parameters,
    )
    assert have.state == 8 * layout.stages[0].parameters


def test_stage_0_in_bf16_is_planned_as_the_effective_stage():
    config, layout, _ = plan("zero.stage=0", world=2)
    assert optimizer_memory(config, layout, layout.stages[0]) == optimizer_memory(
        *plan("zero.stage=1", world=2)[:2], layout.stages[0]
    )


def test_buckets_are_no_larger_than_the_parameters():
    fp32 = "precision.dtype=fp32"
    config, layout, _ = plan(fp32)
    assert optimizer_memory(config, layout, layout.stages[0]).bucket == 4 * layout.stages[0].parameters
    config, layout, _ = plan(fp32, name="pythia/1B.yml")
    assert optimizer_memory(config, layout, layout.stages[0]).bucket == 4 * BUCKET
    config, layout, _ = plan(fp32, "deepspeed.zero_optimization.reduce_bucket_size=1000")
    assert optimizer_memory(config, layout, layout.stages[0]).bucket == 4000


@pytest.mark.parametrize(
    ("dtype", "zero", "world", "name", "bucket"),  # bytes per parameter
    [
        ("fp32", 0, 1, "pythia/160M.yml", 0),
        ("bf16", 1, 1, "pythia/160M.yml", 0),
        ("fp32", 0, 2, "pythia/160M.yml", 4),
        ("bf16", 1, 2, "pythia/160M.yml", 4 + 2),  # joined, and rounded
        ("bf16", 1, 2, "pythia/1B.yml", 2),  # the matrices alone exceed the bucket
    ],
)
def test_a_reduction_after_the_backward_pass_copies_the_gradients(dtype, zero, world, name, bucket):
    config, layout, _ = plan(f"precision.dtype={dtype}", f"zero.stage={zero}", world=world, name=name)
    (stage,) = layout.stages
    assert optimizer_memory(config, layout, stage).bucket == bucket * stage.parameters


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("zero", [0, 1])
def test_sums_of_bf16_gradients_are_live_in_every_phase(zero, repeats):
    options = (f"zero.stage={zero}", f"train.gradient_accumulation={repeats}")
    _, layout, (memory,) = plan(*options, world=2, kind="cpu")
    count, act = layout.stages[0].parameters, memory.activations
    copies = memory.checkpoint  # of a save before the end
    state = (2 + 12 / 2 + 4) * count
    fresh = 2 * layout.stages[0].largest
    assert memory.phases["start"] == (4 + 2 + 4 / 2 + 4) * count
    assert memory.phases["loss"] == state + act.resident + act.logits + fresh + copies
    assert memory.phases["backward"] == state + act.resident + act.recomputed + act.working + fresh + copies
    assert memory.phases["reduce"] == state + 6 * count + copies
    assert memory.phases["update"] == memory.phases["checkpoint"] == state + copies


@pytest.mark.parametrize(("dtype", "zero"), [("fp32", 1), ("bf16", 2)])
def test_overlap_needs_a_second_bucket(dtype, zero):
    options = (f"precision.dtype={dtype}", f"zero.stage={zero}")
    config, layout, (alone,) = plan(*options, world=2)
    _, _, (both,) = plan(*options, "deepspeed.zero_optimization.overlap_comm=true", world=2)
    bucket = optimizer_memory(config, layout, layout.stages[0]).bucket
    assert {name: both.phases[name] - alone.phases[name] for name in alone.phases} == {
        "start": 0,
        "loss": 0,
        "backward": bucket,
        "reduce": bucket,
        "update": 0,
    }
    assert both.buffers - alone.buffers == bucket


def test_a_bucket_larger_than_the_model_is_copied_up_to_the_model():
    _, layout, (fitting,) = plan("precision.dtype=fp32", world=2)
    count = layout.stages[0].parameters
    options = ("precision.dtype=fp32", f"deepspeed.zero_optimization.reduce_bucket_size={2 * count}")
    _, _, (large,) = plan(*options, world=2)
    assert large.phases["reduce"] - fitting.phases["reduce"] == 4 * count


@pytest.mark.parametrize(
    (
        "dtype",
        "zero",
        "resident",
        "gradients",
    ),  # bytes per parameter over 8 replicas; resident: weights, masters and two moments
    [
        ("fp32", 0, 4 + 8, 4),
        ("fp32", 1, 4 + 12 / 8, 8 / 8),  # and a flat copy
        ("bf16", 1, 2 + 12 / 8, 4),  # all of them stay
        ("bf16", 2, 2 + 12 / 8, 4 / 8),
        ("bf16", 3, 2 / 8 + 2 + 12 / 8, 4 / 8),
    ],
)
def test_the_update_reads_the_local_share_of_the_gradients(dtype, zero, resident, gradients):
    _, layout, (memory,) = plan(f"zero.stage={zero}", f"precision.dtype={dtype}", world=8)
    (stage,) = layout.stages
    norm = 8 * stage.largest if (dtype, zero) == ("bf16", 2) else 0  # in fp64
    assert memory.phases["update"] == pytest.approx((resident + gradients) * stage.parameters + norm, rel=1e-6)


def test_frozen_weights_have_no_gradients_masters_or_optimizer_state():
    _, layout, (adapted,) = plan("model.lora={rank: 8}")
    (stage,) = layout.stages
    factors = [math.prod(shape) for name, shape in stage.block.items() if "lora" in name]
    assert stage.trained == stage.blocks * sum(factors) < stage.parameters // 100
    assert (adapted.parameters, adapted.optimizer, adapted.gradients) == (
        2 * stage.parameters,
        12 * stage.trained,
        4 * stage.trained,
    )
    assert adapted.checkpoint == 12 * stage.trained + 2 * (stage.parameters - stage.trained)
    _, _, (full,) = plan()
    assert adapted.peak < full.peak / 2


def test_offloaded_state_is_host_memory():
    _, layout, (here,) = plan()
    _, _, (away,) = plan("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    assert here.optimizer == 12 * layout.stages[0].parameters and away.optimizer == 0
    assert away.host - here.host == here.optimizer
    assert away.peak < here.peak


def test_the_unrounded_initial_weights_are_in_host_memory():
    options = ("checkpoint.async=false", "zero.stage=1")
    _, layout, (gpu,) = plan(*options, world=64)
    count = layout.stages[0].parameters
    assert gpu.host == 4 * count and plan(*options, "precision.dtype=fp32", world=64)[2][0].host == 0
    assert plan(*options, world=64, kind="cpu")[2][0].phases["start"] - gpu.phases["start"] == 4 * count


def test_copies_for_checkpoints_are_in_host_memory():
    _, layout, (gpu,) = plan()
    assert gpu.checkpoint == gpu.host == 12 * layout.stages[0].parameters
    _, _, (one,) = plan(kind="cpu")
    _, _, (none,) = plan("checkpoint.async=false", kind="cpu")
    assert one.peak - none.peak == one.checkpoint and one.host == 0


def test_replicas_and_stages_divide_a_checkpoint():
    _, layout, memories = plan("parallel.pipeline=2", world=8)
    total = sum(memory.checkpoint for memory in memories) * layout.replicas
    assert total == pytest.approx(12 * 162_322_944, rel=1e-6)  # fp32 weights and two moments of all parameters


def test_early_stages_have_more_micro_batches_in_flight():
    _, _, memories = plan("parallel.pipeline=4", "train.gradient_accumulation=8", world=4)
    assert [memory.activations.in_flight for memory in memories] == [4, 3, 2, 1]
    assert memories[1].activations.resident == 3 * memories[1].activations.saved


@pytest.mark.parametrize(("smaller", "larger"), [("full", "selective"), ("selective", "none")])
def test_checkpointing_lowers_the_peak(smaller, larger):
    _, _, (one,) = plan(f"train.activation_checkpointing={smaller}", "train.micro_batch_size=16")
    _, _, (other,) = plan(f"train.activation_checkpointing={larger}", "train.micro_batch_size=16")
    assert one.peak < other.peak
    assert one.activations.uncheckpointed == other.activations.uncheckpointed
