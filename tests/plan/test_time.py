from __future__ import annotations

from dataclasses import replace

import pytest

from neox.config.load import load_config
from neox.model.shapes import block_parameters
from neox.plan.devices import find_device
from neox.plan.fit import estimate
from neox.plan.time import bandwidth_of, stage_flops

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
