from __future__ import annotations

from dataclasses import replace

import pytest

from neox.config.load import load_config
from neox.model.shapes import block_parameters
from neox.plan.communication import traffic
from neox.plan.devices import find_device
from neox.plan.fit import estimate
from neox.plan.time import bandwidth_of, stage_flops, stage_time

H100 = find_device("h100")


def made(*overrides: str, world: int = 1, device=H100):
    config = load_config(
        "pythia/160M.yml", overrides=["train.micro_batch_size=4", "train.global_batch_size=null", *overrides]
    )
    return estimate(config, world, device)


def test_executed_arithmetic_is_the_models_less_masked_attention():
    found = made()
    (stage,) = found.layout.stages
    tokens = 4 * 2048
    attention = 6 * 2 * 12 * 768 * 2048 * tokens  # as counted in full
    assert stage_flops(found.config, found.layout, stage) == pytest.approx(found.time.flops - attention / 2)


def test_full_checkpointing_runs_the_blocks_again():
    plain, again = made().time, made("train.activation_checkpointing=full").time
    head = 6 * 50304 * 768 * 4 * 2048
    assert again.executed - head == pytest.approx((plain.executed - head) * 4 / 3)
    assert again.flops == plain.flops and again.total > plain.total


def test_the_parts_add_up():
    time = made("parallel.tensor=2", "parallel.pipeline=2", "train.gradient_accumulation=4", world=8).time
    parts = time.products + time.elementwise + time.messages + time.bubble + time.reduction + time.update
    assert time.total == pytest.approx(parts) and min(time.messages, time.bubble, time.reduction, time.update) > 0


def test_the_bubble_shrinks_with_micro_batches():
    few = made("parallel.pipeline=4", "train.gradient_accumulation=4", world=4).time
    many = made("parallel.pipeline=4", "train.gradient_accumulation=16", world=4).time
    assert few.bubble == pytest.approx(0.75 * (few.products + few.elementwise + few.messages))
    assert many.bubble / many.total < few.bubble / few.total


def test_a_faster_device_is_faster():
    assert made(device=replace(H100, flops=2e15)).time.products == pytest.approx(made().time.products * 989 / 2000)


def test_groups_beyond_a_node_go_over_the_network():
    layout = made("parallel.tensor=8", "parallel.pipeline=2", world=32, device=H100).layout
    assert bandwidth_of("tensor", layout, H100) == H100.link
    assert bandwidth_of("data", layout, H100) == bandwidth_of("pipeline", layout, H100) == H100.network


@pytest.mark.parametrize(
    ("overrides", "world", "parts"),
    [
        ((), 1, (0.012871, 0.0038002, 0, 0, 0, 0.001817)),
        (("zero.stage=0", "precision.dtype=fp32"), 4, (0.19, 0.0075938, 0, 0, 0.0021643, 0.0014536)),
        (("zero.stage=1",), 4, (0.012871, 0.0038002, 0, 0, 0.0016232, 0.00054511)),
        (
            ("zero.stage=3", "train.activation_checkpointing=full"),
            16,
            (0.015998, 0.0060037, 0, 0, 0.012174, 0.0002347),
        ),
        (
            ("parallel.tensor=2", "parallel.sequence=true"),
            2,
            (0.0064356, 0.0019018, 0.0014126, 0, 0, 0.00090994),
        ),
        (("parallel.context=2",), 2, (0.0064356, 0.0019846, 0.00067109, 0, 0.0010822, 0.00096909)),
        (
            ("parallel.pipeline=2", "train.gradient_accumulation=4"),
            2,
            (0.032725, 0.010117, 0.00011185, 0.010738, 0, 0.00090853),
        ),
        (("model.sliding_window=256",), 1, (0.011565, 0.0038002, 0, 0, 0, 0.001817)),
    ],
)
def test_the_parts_of_a_step_are_pinned(overrides, world, parts):
    """Seconds on an H100. A change of the formulas changes them, and docs/plan.md."""
    time = made(*overrides, world=world).time
    found = (time.products, time.elementwise, time.messages, time.bubble, time.reduction, time.update)
    assert found == pytest.approx(parts, rel=1e-3)


def test_the_reach_of_every_group():
    layout = made("parallel.tensor=2", "parallel.context=2", world=16).layout
    links = [bandwidth_of(axis, layout, replace(H100, per_node=n)) == H100.link for n in (1, 2, 4, 16)
             for axis in ("tensor", "context", "data", "pipeline")]  # fmt: skip
    assert links == [False] * 4 + [True, False, False, False] + [True, True, False, False] + [True] * 4


@pytest.mark.parametrize(("objective", "rows"), [("pretrain", 1), ("dpo", 2), ("reward", 2)])
def test_the_arithmetic_of_a_step_counts_both_answers_of_a_pair(objective, rows):
    output = "score" if objective == "reward" else "tokens"
    found = made(f"train.objective={objective}", f"model.output={output}")
    model, length = found.config.model, found.config.data.seq_length
    head = model.hidden_size * (1 if output == "score" else model.vocab_size)
    attention = 2 * model.num_layers * model.hidden_size * length
    per_token = 6 * (model.num_layers * block_parameters(model) + head + attention)
    assert found.time.flops == per_token * found.layout.batch.global_batch_size * rows * length


def test_the_step_is_as_slow_as_its_slowest_stage():
    uneven = [
        made("parallel.pipeline=2", f"parallel.partition={how}", world=2) for how in ("[9, 3]", "[3, 9]", "[6, 6]")
    ]
    for found in uneven:
        each = [
            stage_time(found.config, found.layout, stage, memory, H100)
            for stage, memory in zip(found.layout.stages, found.memories, strict=True)
        ]
        assert found.time == max(each, key=lambda time: time.total) and each[0].total != each[1].total
    assert uneven[0].time.total < uneven[2].time.total < uneven[1].time.total  # the last stage has the head


@pytest.mark.parametrize(
    ("window", "keys"), [("null", 1024), (2048, 1024), (4096, 1024), (1, 1 - 1 / 4096), (2, 2 - 4 / 4096)]
)
def test_the_mean_number_of_keys_of_a_window(window, keys):
    """A query reads half of the sequence on average; in a window it reads all of it but at the beginning."""
    found = made(f"model.sliding_window={window}")
    (stage,) = found.layout.stages
    tokens, head = 4 * 2048, 6 * 50304 * 768
    block = 2 * block_parameters(found.config.model) + 4 * 768 * keys
    assert stage_flops(found.config, found.layout, stage) == pytest.approx(tokens * (3 * 12 * block + head))


def test_arithmetic_is_divided_among_tensor_context_and_pipeline():
    whole = made().time.executed
    assert made("parallel.tensor=2", world=2).time.executed * 2 == pytest.approx(whole)
    assert made("parallel.context=2", world=2).time.executed * 2 == pytest.approx(whole)
    halves = made("parallel.pipeline=2", "parallel.partition=[6, 6]", world=2)
    first, last = (stage_flops(halves.config, halves.layout, stage) for stage in halves.layout.stages)
    assert last - first == pytest.approx(6 * 50304 * 768 * 4 * 2048) and first + last == pytest.approx(whole)
    assert made("train.gradient_accumulation=3").time.executed == pytest.approx(3 * whole)


def test_elementwise_kernels_and_the_update_stream_memory():
    """Activations are touched three times at 0.8 of the bandwidth, also recomputed ones, and logits four times."""
    for options in ((), ("train.activation_checkpointing=full",), ("train.activation_checkpointing=selective",)):
        found = made(*options, "train.gradient_accumulation=2")
        act, memory = found.memories[0].activations, found.memories[0]
        touched = 3 * (act.uncheckpointed + 12 * act.recomputed) + 4 * act.logits
        assert found.time.elementwise == pytest.approx(2 * touched / (3.35e12 * 0.8))
        update = 2 * memory.optimizer + memory.gradients + memory.parameters
        assert found.time.update == pytest.approx(update / (3.35e12 * 0.8))


@pytest.mark.parametrize(("zero", "dtype", "share"), [(0, "fp32", 1), (1, "fp32", 4), (0, "bf16", 4), (2, "bf16", 1)])
def test_the_update_reads_the_share_of_a_replica(zero, dtype, share):
    """Stage 0 has no masters and reads all gradients; the effective stage of 16 bits is 1; stage 2 stores the share."""
    found = made(f"zero.stage={zero}", f"precision.dtype={dtype}", world=4)
    memory = found.memories[0]
    update = 2 * memory.optimizer + memory.gradients / share + memory.parameters
    assert found.time.update == pytest.approx(update / (3.35e12 * 0.8))


@pytest.mark.parametrize(("dtype", "peak"), [("fp32", 67e12), ("bf16", 989e12), ("fp16", 989e12)])
def test_products_run_at_a_fraction_of_the_peak_of_their_dtype(dtype, peak):
    time = made(f"precision.dtype={dtype}").time
    assert time.products == pytest.approx(time.executed / (peak * 0.55))


def test_messages_go_over_the_link_or_the_network_of_their_group():
    options = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "train.gradient_accumulation=4")
    for per_node in (1, 2, 4, 8, 16):
        device = replace(H100, per_node=per_node)
        found = made(*options, world=16, device=device)
        times = {"tensor": 0.0, "context": 0.0, "pipeline": 0.0, "data": 0.0}
        slowest = max(
            found.layout.stages,
            key=lambda stage: stage_time(found.config, found.layout, stage, found.memories[stage.number], device).total,
        )
        for row in traffic(found.config, found.layout, slowest):
            reach = {"tensor": 2, "context": 4, "data": 8, "pipeline": 16}[row.axis]
            times[row.axis] += row.sent / (450e9 if reach <= per_node else 50e9)
        assert found.time.reduction == pytest.approx(times.pop("data"))
        assert found.time.messages == pytest.approx(sum(times.values()))
