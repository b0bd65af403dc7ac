"""Memory of every phase by hand: what DeepSpeed holds in each ZeRO stage, in bytes per parameter over two replicas."""

from __future__ import annotations

import math

import pytest

from neox.plan.memory import OptimizerMemory, optimizer_memory
from neox.plan.sizes import Stage
from tests.plan.test_memory import plan

TABLE = 50304 * 768  # elements of the embedding, the largest parameter
OPTIONS = ("train.activation_checkpointing=selective", "checkpoint.async=false")


def held(name: str, world: int, *overrides: str) -> tuple[OptimizerMemory, Stage]:
    config, layout, _ = plan(*overrides, world=world, name=name)
    return optimizer_memory(config, layout, layout.stages[0]), layout.stages[0]


@pytest.mark.parametrize(
    ("dtype", "zero", "repeats", "start", "loss", "backward", "reduce", "update"),
    # bytes per parameter, and bytes per element of the largest parameter: of a new gradient, of its sum or norm
    [
        # weights 4, moments 8, gradients 4; the reduction joins all gradients
        ("fp32", 0, 1, (4, 0), (12, 0), (12, 4), (20, 0), (16, 0)),
        ("fp32", 0, 2, (4, 0), (16, 4), (16, 4), (20, 0), (16, 0)),
        # weights 4, masters 2, moments 4, gradients 4, share 2, its flat copy 2, bucket 4, joined 4
        ("fp32", 1, 1, (8, 0), (10, 0), (14, 4), (20, 0), (14, 0)),
        ("fp32", 1, 2, (8, 0), (18, 4), (18, 4), (20, 0), (14, 0)),
        # the gradients are the share, twice with accumulation
        ("fp32", 2, 1, (8, 0), (12, 0), (16, 0), (20, 0), (14, 0)),
        ("fp32", 2, 2, (8, 0), (18, 4), (18, 4), (22, 0), (14, 0)),
        # weights 2, masters 2, moments 4, share 2, bucket 2, joined 2; a gradient is widened; its norm is in fp64
        ("bf16", 2, 1, (4, 0), (10, 2), (12, 0), (14, 4), (10, 8)),
        ("bf16", 2, 2, (4, 0), (12, 2), (12, 2), (14, 4), (10, 8)),
        # weights 1 and all of them gathered 2
        ("bf16", 3, 1, (5, 0), (11, 2), (13, 0), (13, 0), (11, 0)),
        ("bf16", 3, 2, (5, 0), (13, 2), (13, 2), (13, 0), (11, 0)),
        # gradients 4, bucket 4, joined 4, parts in 16 bits 2
        ("fp16", 1, 1, (4, 0), (8, 2), (12, 2), (20, 0), (10, 0)),
        ("fp16", 1, 2, (4, 0), (16, 2), (16, 2), (20, 0), (10, 0)),
    ],
)
def test_the_phases_of_every_stage(dtype, zero, repeats, start, loss, backward, reduce, update):
    options = (f"precision.dtype={dtype}", f"zero.stage={zero}", f"train.gradient_accumulation={repeats}")
    _, layout, (memory,) = plan(*OPTIONS, *options, world=2)
    act, count = memory.activations, layout.stages[0].parameters
    assert layout.stages[0].largest == TABLE and act.recomputed > 0 < act.logits
    last = act.working + max(act.recomputed, act.saved // 12)  # the backward pass of the first block
    moving = {"start": 0, "loss": act.saved + act.logits, "backward": act.saved + act.recomputed + act.working}
    moving |= {"reduce": last if zero else 0, "update": 0}
    expected = dict(zip(("start", "loss", "backward", "reduce", "update"), (start, loss, backward, reduce, update),
                        strict=True))  # fmt: skip
    assert memory.phases == {
        name: round(parameters * count) + largest * TABLE + moving[name]
        for name, (parameters, largest) in expected.items()
    }
    assert memory.peak == max(memory.phases.values()) == memory.phases[memory.moment]


def test_a_small_bucket_moves_gradients_in_parts():
    """The share of this replica grows while the gradients that are not yet in the bucket remain."""
    options = ("precision.dtype=fp32", "deepspeed.zero_optimization.reduce_bucket_size=1000000")
    _, layout, (memory,) = plan(*OPTIONS, *options, world=2)
    act, count = memory.activations, layout.stages[0].parameters
    last = act.working + max(act.recomputed, act.saved // 12)
    bucket = 4_000_000
    assert memory.phases["reduce"] == 10 * count + bucket + (4 * count - bucket + 2 * count + bucket) + last
    assert memory.buffers == bucket + 2 * count  # and the flat copy


def test_one_process_reduces_nothing():
    _, layout, (memory,) = plan(*OPTIONS, "precision.dtype=fp32", "zero.stage=1")
    act, count = memory.activations, layout.stages[0].parameters
    last = act.working + max(act.recomputed, act.saved // 12)
    assert memory.phases["reduce"] == (4 + 4 + 8 + 4 + 4) * count + last
    _, _, (bf16,) = plan(*OPTIONS, "zero.stage=2")
    assert bf16.phases["reduce"] == (2 + 4 + 8 + 2 + 4 + 2) * count + 4 * TABLE + last_of(bf16)
    _, _, (whole,) = plan(*OPTIONS, "zero.stage=3")
    assert whole.parameters == 2 * count  # nothing is gathered


def last_of(memory) -> int:
    act = memory.activations
    return act.working + max(act.recomputed, act.saved // 12)


def test_stage_0_reduces_after_the_backward_pass():
    """The joined gradients and the last block's activations are not live together."""
    options = ("precision.dtype=fp32", "zero.stage=0", "model.num_layers=1", "checkpoint.async=false")
    _, layout, (memory,) = plan(*options, "train.micro_batch_size=256", world=2)
    count, act = layout.stages[0].parameters, memory.activations
    last = act.working + act.saved
    assert last > 4 * count and memory.phases["reduce"] == (12 + 4) * count + last


def test_a_pipeline_holds_messages_and_a_copy_of_a_tied_embedding():
    options = (*OPTIONS, "zero.stage=1", "precision.dtype=fp16", "train.gradient_accumulation=2")
    tied = "model.tie_embeddings=true"
    _, layout, (first, last) = plan(*options, tied, "parallel.pipeline=2", world=2)
    assert [stage.tied for stage in layout.stages] == [0, TABLE]
    stream = 2048 * 768 * 2
    for stage, memory in zip(layout.stages, (first, last), strict=True):
        act, count, copy = memory.activations, stage.parameters, (2 + 4) * stage.tied
        assert act.boundary == stream and memory.buffers == 4 * count + copy
        state = (2 + 12) * count + copy
        fresh = 2 * stage.largest
        assert memory.phases["loss"] == state + 8 * count + act.resident + act.logits + 2 * stream + fresh
        working = act.resident + act.recomputed + act.working + 2 * stream + fresh
        assert memory.phases["backward"] == state + 8 * count + working
        assert memory.phases["update"] == state + 4 * count
    assert (first.activations.in_flight, last.activations.in_flight) == (2, 1)
    assert first.activations.logits == 0 < last.activations.logits


def test_offloaded_state_leaves_every_phase_but_the_start():
    options = (*OPTIONS, "precision.dtype=fp32", "zero.stage=1")
    _, layout, (here,) = plan(*options, world=2)
    for device in ("cpu", "nvme"):
        _, _, (away,) = plan(*options, f"deepspeed.zero_optimization.offload_optimizer.device={device}", world=2)
        state = (2 + 4) * layout.stages[0].parameters
        assert {name: here.phases[name] - away.phases[name] for name in here.phases} == {
            "start": 0,
            **dict.fromkeys(("loss", "backward", "reduce", "update"), state),
        }
        assert (away.host, away.optimizer, here.host) == (state, 0, 0)
    _, _, (none,) = plan(*options, "deepspeed.zero_optimization.offload_optimizer.device=none", world=2)
    assert none == here


def test_offloading_in_bf16_leaves_the_sums_of_gradients_to_stage_1():
    """DeepSpeed's BF16_Optimizer cannot offload."""
    offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    (have, stage), (sums, _) = (held("pythia/160M.yml", 2, "zero.stage=1", *more) for more in ((offload,), ()))
    assert (have.bucket, sums.bucket) == (4 * stage.parameters, 6 * stage.parameters)
    assert have.gradients == sums.gradients == 4 * stage.parameters


@pytest.mark.parametrize(
    ("interval", "steps", "before_the_end"),
    [
        (99, "[]", True),
        (100, "[]", False),
        (101, "[]", False),
        (0, "[]", False),
        (0, "[100]", False),
        (0, "[0]", False),
        (0, "[99]", True),
        (0, "[1]", True),
        (0, "[0, 100, 50]", True),
    ],
)
def test_copies_for_a_checkpoint_are_live_after_the_first_save(interval, steps, before_the_end):
    """On a CPU they are in the memory of the process. The last save happens after the last step."""
    options = ("train.train_iters=100", f"checkpoint.save_interval={interval}", f"checkpoint.save_iters={steps}")
    _, _, (memory,) = plan(*options, kind="cpu")
    _, _, (without,) = plan(*options, "checkpoint.async=false", kind="cpu")
    copies = memory.checkpoint if before_the_end else 0
    assert {name: memory.phases[name] - without.phases[name] for name in memory.phases} == {
        "start": 0,
        **dict.fromkeys(("loss", "backward", "reduce", "update"), copies),
        "checkpoint": memory.checkpoint,
    }
    assert memory.host == without.host == 0 and memory.checkpoint == without.checkpoint


@pytest.mark.parametrize(
    ("dtype", "zero", "resident"),
    [("bf16", 1, 2 + 6 + 4), ("bf16", 2, 2 + 6), ("fp32", 1, 4 + 6), ("bf16", 3, 3 + 6), ("fp32", 0, 4 + 8)],
)
def test_what_a_checkpoint_finds_in_memory(dtype, zero, resident):
    options = ("checkpoint.async=false", f"precision.dtype={dtype}", f"zero.stage={zero}")
    _, layout, (memory,) = plan(*options, kind="cpu", world=2)
    assert memory.phases["checkpoint"] == resident * layout.stages[0].parameters
    _, _, (gpu,) = plan(*options, world=2)
    assert "checkpoint" not in gpu.phases
    unrounded = 0 if dtype == "fp32" else 4 * layout.stages[0].parameters
    assert memory.phases["start"] - gpu.phases["start"] == unrounded == gpu.host


@pytest.mark.parametrize(
    ("world", "dtype", "copies", "host"), [(2, "bf16", 6, 6), (4, "bf16", 3, 4), (4, "fp32", 3, 3)]
)
def test_host_memory_is_the_larger_of_copies_and_unrounded_weights(world, dtype, copies, host):
    """Bytes per parameter: master weights and two moments over the replicas, and the fp32 weights of the start."""
    _, layout, (memory,) = plan(f"precision.dtype={dtype}", world=world)
    count = layout.stages[0].parameters
    assert (memory.checkpoint, memory.host) == (copies * count, host * count)


def test_shares_are_rounded_up():
    have, stage = held("pythia/70M.yml", 3, "zero.stage=1", "precision.dtype=fp32")
    share = math.ceil(stage.parameters / 3)
    assert stage.parameters % 3
    assert (have.masters, have.share, have.flat) == (4 * share, 4 * share, 4 * share)
    assert have.state == math.ceil(8 * stage.parameters / 3)


def test_adapters_change_what_is_reduced_and_updated_and_not_the_weights():
    options = ("model.lora={rank: 8}", "zero.stage=2", "train.gradient_accumulation=2")
    have, stage = held("pythia/160M.yml", 2, *options)
    trained = stage.trained
    factor = max(math.prod(shape) for name, shape in stage.block.items() if "lora" in name)
    assert factor == 8 * 3072 == stage.largest
    assert (have.weights, have.masters, have.gradients) == (2 * stage.parameters, 2 * trained, 2 * trained)
    assert (have.state, have.fresh) == (4 * trained, 2 * factor)
    _, _, (memory,) = plan(*OPTIONS, *options, world=2)
    resident = 2 * stage.parameters + 6 * trained
    bucket = 2 * stage.parameters  # of which only the gradients are filled
    assert memory.phases["reduce"] == resident + bucket + 2 * trained + 2 * trained + 4 * factor + last_of(memory)
    assert memory.phases["start"] == max(4 * stage.parameters, 2 * stage.parameters + 2 * trained)
    assert memory.checkpoint == 6 * trained + (stage.parameters - trained)


def test_a_late_reduction_joins_at_most_half_a_billion_elements():
    have, stage = held("pythia/1B.yml", 2, "zero.stage=0", "precision.dtype=fp32")
    assert stage.parameters > 500_000_000 and have.bucket == 4 * 500_000_000
