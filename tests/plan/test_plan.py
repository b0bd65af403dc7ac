from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest

from neox.config.load import load_config
from neox.errors import ConfigError
from neox.plan.communication import traffic
from neox.plan.devices import find_device
from neox.plan.plan import Plan, as_json, describe, duration, headline, lines, make_plan
from neox.runtime.launch import MAX_PROCESSES
from tests.plan.test_sizes import SHIPPED, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_has_a_plan(name):
    config = shipped(name)
    plan = make_plan(config, 64, find_device("h100"))
    text = "\n".join(lines(plan))
    assert plan.fits == ("FITS:" in text.replace("DOES NOT FIT:", ""))
    assert plan.fits or (plan.change is not None and plan.change.estimate.peak <= 78e9)
    content = json.loads(json.dumps(as_json(plan)))
    estimate = content["estimate"] or content["change"]["estimate"]
    assert {
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "buffers",
        "checkpoint",
        "peak",
        "sent_per_step",
    } <= estimate["stages"][0].keys()
    activations = {"kept", "whole", "logits", "recomputed", "working", "boundary", "in_flight", "resident"}
    assert estimate["stages"][0]["activations"].keys() == activations
    assert estimate["time"]["total"] * config.train.train_iters == pytest.approx(estimate["total_seconds"])


def test_a_model_that_does_not_fit_gets_the_smallest_change_that_does():
    plan = make_plan(load_config("pythia/12B.yml"), 8, find_device("a100-40gb"))
    text = lines(plan)
    assert not plan.fits and any(line.startswith("DOES NOT FIT: 1") for line in text)
    assert any(line.startswith("smallest change that fits: --set ") for line in text)
    assert plan.change.estimate.layout.batch.global_batch_size == 1024


def test_an_invalid_config_is_planned_with_the_change_that_fixes_it():
    plan = make_plan(load_config("gpt3/175B.yml"), 1024, find_device("h100"))
    assert plan.estimate is None and "global batch size is not divisible" in plan.refused[0].line()
    assert plan.change is not None and "DOES NOT FIT: the config is invalid" in lines(plan)


def test_a_conflict_that_no_change_resolves_is_an_error():
    config = load_config("pythia/70M.yml", overrides=["model.num_kv_heads=3"])
    with pytest.raises(ConfigError, match="key/value heads do not divide the query heads"):
        make_plan(config, 2, find_device("h100"))
    with pytest.raises(ConfigError, match="--world-size"):
        make_plan(config, 0, find_device("h100"))


def test_a_device_that_is_too_small_is_reported():
    text = lines(make_plan(load_config("pythia/12B.yml"), 1, replace(find_device("h100"), memory=3e9)))
    assert any("use more or larger devices" in line for line in text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *(
            (0.0123, "12.3 ms"),
            (0.99, "990 ms"),
            (1, "1 s"),
            (1.5, "1.5 s"),
            (130, "2.17 min"),
            (8000, "2.22 h"),
            (1e6, "11.6 days"),
        ),
        *(
            (119, "119 s"),
            (120, "2 min"),
            (7140, "119 min"),
            (7200, "2 h"),
            (169200, "47 h"),
            (172800, "2 days"),
        ),  # from two of a unit on
    ],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


LAYOUT = [
    "train.micro_batch_size=4",
    "train.global_batch_size=null",
    "train.gradient_accumulation=4",
    "train.train_iters=1000",
    "train.activation_checkpointing=selective",
    "parallel.tensor=2",
    "parallel.pipeline=4",
    "parallel.sequence=true",
]


@pytest.fixture(scope="module")
def piped() -> Plan:
    """A plan of four stages, of which the two in the middle are the same."""
    return make_plan(load_config("pythia/160M.yml", overrides=LAYOUT), 16, find_device("h100"))


@functools.cache
def small(memory: float, *overrides: str, world_size: int = 8) -> Plan:
    batch = ["train.micro_batch_size=32", "train.global_batch_size=256"]
    config = load_config("pythia/160M.yml", overrides=[*batch, *overrides])
    return make_plan(config, world_size, replace(find_device("a100-40gb"), memory=memory))


def test_the_first_lines_of_a_plan(piped):
    assert lines(piped)[:4] == [
        "162,322,944 parameters, 12 layers | 16 x h100 (78 of 80 GB usable)",
        "tensor 2, pipeline 4, data 2, sequence parallel | ZeRO 1 | bf16 | checkpointing selective | "
        "batch 32 = 4 x 4 x 2, 2048 tokens",
        "",
        "one process, GB (10^9 bytes):",
    ]
    alone = make_plan(load_config("pythia/70M.yml", overrides=["precision.dtype=bf16"]), 32, find_device("h200"))
    assert headline(alone) == "70,426,624 parameters, 6 layers | 32 x h200 (139 of 141 GB usable)"
    assert lines(alone)[1] == "data 32 | ZeRO 1 | bf16 | checkpointing none | batch 1024 = 32 x 1 x 32, 2048 tokens"
    overrides = ["parallel.context=2", "zero.stage=3", "precision.dtype=fp32", "data.seq_length=1024"]
    cut = make_plan(load_config("pythia/70M.yml", overrides=overrides), 64, find_device("h200"))
    assert lines(cut)[1] == (
        "context 2, data 32 | ZeRO 3 | fp32 | checkpointing none | batch 1024 = 32 x 1 x 32, 1024 tokens"
    )


def test_the_table_of_memory_has_a_row_for_each_kind_of_stage(piped):
    table = [line.split() for line in describe(piped.estimate, piped.device)[3:7]]
    first, *rows = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    stages, memories = piped.estimate.layout.stages, piped.estimate.memories
    assert [row["stage"] for row in (first, *rows)] == ["0", "1-2", "3"]
    assert {stages[i].blocks for i in (1, 2)} == {5} and stages[0].blocks == stages[3].blocks == 1
    for row, index in zip((first, *rows), (0, 1, 3), strict=True):
        stage, memory = stages[index], memories[index]
        act = memory.activations
        values = {
            "weights": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "buffers": memory.buffers,
            "activations": act.saved * act.in_flight,
            "uncheckpointed": act.uncheckpointed * act.in_flight,
            "logits": act.logits,
            "peak": max(memory.phases.values()),
            "checkpoint": memory.checkpoint,
        }
        assert {name: row[name] for name in values} == {name: f"{value / 1e9:.3f}" for name, value in values.items()}
        assert memory.phases[row["at"]] == max(memory.phases.values())
        assert (row["blocks"], row["parameters"]) == (str(stage.blocks), f"{stage.parameters:,}")
    text = describe(piped.estimate, piped.device)
    assert len({len(line) for line in text[3:7]}) == 1  # right-aligned
    host = max(memory.host for memory in memories)
    assert text[7] == f"host memory in addition: {host / 1e9:.3f} GB per process" and host > 0
    alone = small(100e9, "precision.dtype=fp32", "checkpoint.async=false")
    assert not any("host memory" in line for line in lines(alone))


def test_the_lines_of_time(piped):
    time, tokens = piped.estimate.time, 32 * 2048
    text = describe(piped.estimate, piped.device)
    layout = piped.estimate.layout
    most = max(sum(row.sent for row in traffic(piped.config, layout, stage)) for stage in layout.stages)
    assert text[9] == (
        f"step: {time.flops:.4g} FLOP, {time.flops / tokens:.4g} per token; a process sends {most / 1e9:.4g} GB"
    )
    parts = ", ".join(
        f"{name} {duration(seconds)}"
        for name, seconds in (
            ("products", time.products),
            ("elementwise", time.elementwise),
            ("messages", time.messages),
            ("bubble", time.bubble),
            ("reduction", time.reduction),
            ("update", time.update),
        )
    )
    share = 100 * time.flops / (time.total * 16 * 989e12)
    speed = f"{tokens / time.total:,.0f} tokens/s, MFU {share:.0f} %"
    assert text[10] == f"estimated time: {duration(time.total)} per step ({parts}); {speed}"
    assert text[11] == f"1,000 steps: {duration(1000 * time.total)}, {1000 * time.flops:.3g} FLOP"
    assert len(text) == 12
    (line,) = [line for line in lines(small(100e9, world_size=1)) if line.startswith("estimated")]
    assert not any(name in line for name in ("messages", "bubble", "reduction"))  # a part that takes no time
    fp32 = small(100e9, "precision.dtype=fp32")
    share = 100 * fp32.estimate.time.flops / (fp32.estimate.time.total * 8 * 19.5e12)
    assert any(line.endswith(f"MFU {share:.0f} %") for line in lines(fp32))


def test_the_verdict_of_a_run_that_fits(piped):
    assert lines(piped)[-5:] == [
        "",
        f"FITS: {piped.estimate.peak / 1e9:.2f} of 78.00 GB",
        "",
        f"device: {piped.device.source}",
        "Sizes of tensors are computed, times are a first-order estimate (docs/plan.md).",
    ]
    assert (piped.change, piped.fastest, piped.refused, piped.fits) == (None, None, (), True)


def test_memory_that_is_used_up_is_enough():
    peak = small(100e9).estimate.peak
    assert small(peak + 2e9).fits and small(peak + 2e9).change is None
    tight = small(peak + 2e9 - 1)
    assert not tight.fits and tight.change is not None


def test_the_verdict_of_a_run_that_does_not_fit():
    plan = small(4e9)
    text = lines(plan)
    start = text.index(f"DOES NOT FIT: {plan.estimate.peak / 1e9:.2f} GB needed, 2.00 GB usable")
    changes = [
        " ".join(f"{key}={json.dumps(value)}" for key, value in change.keys.items())
        + f" ({change.estimate.peak / 1e9:.2f} GB, {duration(change.estimate.time.total)} per step)"
        for change in (plan.change, plan.fastest)
    ]
    assert "parallel.sequence=true" in changes[1]
    assert text[start - 1 : start + 5] == [
        "",
        f"DOES NOT FIT: {plan.estimate.peak / 1e9:.2f} GB needed, 2.00 GB usable",
        f"smallest change that fits: --set {changes[0]}",
        f"fastest change that fits: --set {changes[1]}",
        "with the smallest:",
        "",
    ]
    after = describe(plan.change.estimate, plan.device)
    assert text[start + 5 : start + 5 + len(after)] == after
    assert text[1 : start - 1] == describe(plan.estimate, plan.device)
    content = as_json(plan)
    assert content["change"]["keys"] == plan.change.keys and content["fastest"]["keys"] == plan.fastest.keys
    assert content["change"]["estimate"]["peak"] == plan.change.estimate.peak
    assert content["fastest"]["estimate"]["peak"] == plan.fastest.estimate.peak
    assert (content["fits"], content["estimate"]["peak"]) == (False, plan.estimate.peak)


def test_the_fastest_change_is_named_only_if_it_is_another():
    peak = small(100e9).estimate.peak
    plan = small(peak + 2e9 - 1)
    assert plan.change is not None and plan.fastest is None
    text = lines(plan)
    assert not any(line.startswith("fastest") for line in text) and "with the smallest:" in text
    assert as_json(plan)["fastest"] is None


def test_an_invalid_config_lists_its_problems():
    plan = small(100e9, "train.global_batch_size=100")
    text = lines(plan)
    start = text.index("DOES NOT FIT: the config is invalid")
    assert text[1:start] == [""] and text[start + 1] == f"  {plan.refused[0].line()}"
    assert text[start + 1].startswith("  error[2] global batch size is not divisible; where=train.micro_batch_size, ")
    assert "train.global_batch_size = 100, data-parallel size = 8" in text[start + 1]
    assert text[start + 2].startswith("smallest change that fits: --set train.")
    content = as_json(plan)
    assert content["estimate"] is None and content["refused"] == [plan.refused[0].line()] and not content["fits"]


@pytest.mark.parametrize("world_size", [0, -1, MAX_PROCESSES + 1])
def test_a_number_of_devices_that_no_run_has(world_size):
    with pytest.raises(ConfigError) as caught:
        small(100e9, world_size=world_size)
    assert caught.value.line() == (
        f"error[2] wrong number of devices; where=--world-size; got={world_size}; want=1 to 1048576"
    )


def test_the_largest_number_of_devices():
    overrides = ["train.global_batch_size=null"]
    assert small(100e9, *overrides, world_size=MAX_PROCESSES).estimate.layout.dp == MAX_PROCESSES
    assert small(100e9, *overrides, world_size=1).estimate.layout.dp == 1


def test_the_json_of_a_plan_has_the_values_of_the_estimate(piped):
    content, found = as_json(piped), piped.estimate
    assert (content["parameters"], content["world_size"], content["fits"]) == (162_322_944, 16, True)
    assert content["device"]["name"] == "h100" and content["refused"] == []
    assert (content["change"], content["fastest"]) == (None, None)
    estimate = content["estimate"]
    assert estimate["layout"] == {"tensor": 2, "pipeline": 4, "context": 1, "data": 2, "sequence": True}
    assert estimate["batch"] == {"micro_batch_size": 4, "gradient_accumulation": 4, "global_batch_size": 32, "dp": 2}
    assert [row["stage"] for row in estimate["stages"]] == [0, 1, 2, 3]
    assert [row["blocks"] for row in estimate["stages"]] == [[0, 1], [1, 6], [6, 11], [11, 12]]
    for row, stage, memory in zip(estimate["stages"], found.layout.stages, found.memories, strict=True):
        same = ("optimizer", "gradients", "buffers", "host", "checkpoint", "phases", "peak", "moment")
        assert {name: row[name] for name in same} == {name: getattr(memory, name) for name in same}
        act = row["activations"]
        assert (act["kept"], act["whole"], act["resident"]) == (
            memory.activations.saved,
            memory.activations.uncheckpointed,
            memory.activations.saved * memory.activations.in_flight,
        )
        sent = dict.fromkeys(("tensor", "context", "pipeline", "data"), 0.0)
        for each in traffic(piped.config, found.layout, stage):
            sent[each.axis] += each.sent
        assert row["sent_per_step"] == sent and sent["context"] == 0 < min(sent["tensor"], sent["data"])
    assert estimate["peak"] == found.peak == max(row["peak"] for row in estimate["stages"])
    assert estimate["time"] == vars(found.time)
    assert estimate["flops_per_token"] == pytest.approx(found.time.flops / (32 * 2048))
    assert estimate["total_seconds"] == pytest.approx(1000 * found.time.total)
    assert estimate["total_flops"] == pytest.approx(1000 * found.time.flops)


def test_the_flops_per_token_of_pairs_count_both_answers():
    plan = small(200e9, "train.objective=dpo")
    text = lines(plan)
    tokens = 256 * 2 * 2048
    assert as_json(plan)["estimate"]["flops_per_token"] == pytest.approx(plan.estimate.time.flops / tokens)
    assert any(f"{tokens / plan.estimate.time.total:,.0f} tokens/s" in line for line in text)
    assert any(f"FLOP, {plan.estimate.time.flops / tokens:.4g} per token" in line for line in text)
