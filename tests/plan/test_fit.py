from __future__ import annotations

import time
from dataclasses import replace

import pytest

from neox.config.load import load_config
from neox.plan.devices import find_device
from neox.plan.fit import changed, changes, combinations, conflicts, divisors, estimate, options

A100 = find_device("a100-40gb")


def small(*overrides: str):
    return load_config(
        "pythia/160M.yml", overrides=["train.micro_batch_size=32", "train.global_batch_size=256", *overrides]
    )


def test_one_key_is_enough_where_it_is():
    config = small()
    there = estimate(config, 8, A100)
    full = estimate(changed(config, 8, {"train.activation_checkpointing": "full"})[0], 8, A100)
    assert full.peak < there.peak
    device = replace(A100, memory=(full.peak + there.peak) / 2 + A100.reserve)
    change, fastest = changes(config, 8, device)
    assert fastest.estimate.time.total <= change.estimate.time.total
    assert len(change.keys) == 1 and change.estimate.peak <= device.usable < there.peak


def test_the_change_is_the_fastest_of_its_size_and_nothing_smaller_fits():
    config = small()
    device = replace(A100, memory=4e9 + A100.reserve)
    change, fastest = changes(config, 8, device)
    choices = options(config, 8, device)
    fitting = {}
    for count in (1, 2, 3):
        for keys in combinations(choices, count):
            candidate, _ = changed(config, 8, keys)
            if not conflicts(candidate, 8, "cuda"):
                found = estimate(candidate, 8, device)
                if found.peak <= device.usable:
                    fitting.setdefault(count, []).append(found.time.total)
    assert len(change.keys) == min(fitting)
    assert change.estimate.time.total == min(fitting[len(change.keys)])
    assert fastest.estimate.time.total == min(min(times) for times in fitting.values())


def test_the_smallest_change_is_not_always_the_fastest():
    """A tensor group and a smaller micro-batch are enough here; sequence parallelism, a third key, makes steps
    faster.
    """
    change, fastest = changes(small(), 8, replace(A100, memory=2e9 + A100.reserve))
    assert (len(change.keys), len(fastest.keys)) == (2, 3)
    assert fastest.estimate.time.total < change.estimate.time.total


@pytest.mark.parametrize("n", [1, 2, 12, 36, 97, 1000])
def test_divisors(n):
    assert divisors(n) == [i for i in range(1, n + 1) if n % i == 0]


def test_a_huge_batch_takes_no_time():
    """Every smaller divisor is an option; a loop over all numbers below would take a minute."""
    before = time.process_time()
    choices = options(small("train.micro_batch_size=2000000014", "train.global_batch_size=null"), 1, A100)
    assert choices["train.micro_batch_size"] == [1000000007, 2, 1]
    assert time.process_time() - before < 5


def test_nothing_fits_in_no_memory():
    assert changes(small(), 8, replace(A100, memory=A100.reserve + 1)) == (None, None)


@pytest.mark.parametrize(
    "given",
    [
        ["train.micro_batch_size=8", "train.global_batch_size=null", "train.gradient_accumulation=2"],
        ["train.micro_batch_size=null", "train.global_batch_size=64", "train.gradient_accumulation=2"],
    ],
)
def test_the_global_batch_stays(given):
    config = load_config("pythia/160M.yml", overrides=given)
    assert options(config, 4, A100)["train.micro_batch_size"] == [4, 2, 1]
    other, keys = changed(config, 4, {"train.micro_batch_size": 2, "parallel.tensor": 2})
    assert keys == {"train.micro_batch_size": 2, "parallel.tensor": 2, "train.gradient_accumulation": 16}
    assert estimate(other, 4, A100).layout.batch.global_batch_size == 8 * 2 * 4


@pytest.mark.parametrize(
    ("overrides", "world", "what"),
    [
        (["parallel.tensor=5"], 5, "tensor parallelism does not divide the model"),
        (["parallel.pipeline=2", "zero.stage=2"], 2, "ZeRO stage is incompatible with pipeline parallelism"),
        (["train.global_batch_size=100"], 8, "global batch size is not divisible"),
        (["parallel.tensor=2"], 3, "world size does not match the parallel layout"),
    ],
)
def test_conflicts_are_found_without_data(overrides, world, what):
    assert what in [conflict.what for conflict in conflicts(small(*overrides), world, "cuda")]
    assert conflicts(small(), 8, "cuda") == []


def test_the_options_of_a_run_are_what_needs_less_memory():
    """Pythia 160M has 12 layers; a node has 8 devices."""
    found = options(small("train.micro_batch_size=12", "train.global_batch_size=null"), 48, A100)
    assert found == {
        "train.activation_checkpointing": ["selective", "full"],
        "train.micro_batch_size": [6, 4, 3, 2, 1],
        "zero.stage": [2, 3],
        "parallel.sequence": [True],
        "parallel.tensor": [2, 3, 4, 6, 8],
        "parallel.pipeline": [2, 3, 4, 6, 8, 12],
    }


def test_the_options_grow_what_a_run_has():
    given = ["parallel.tensor=2", "parallel.pipeline=3", "parallel.sequence=true", "zero.stage=0"]
    more = ["train.activation_checkpointing=selective", "train.micro_batch_size=1", "train.global_batch_size=null"]
    assert options(small(*given, *more), 48, A100) == {
        "train.activation_checkpointing": ["full"],
        "train.micro_batch_size": [],
        "zero.stage": [1, 2, 3],
        "parallel.sequence": [],
        "parallel.tensor": [4, 6, 8],
        "parallel.pipeline": [6, 12],
    }
    last = options(small("train.activation_checkpointing=full", "zero.stage=3", "parallel.tensor=8"), 8, A100)
    assert [last[f"{key}"] for key in ("train.activation_checkpointing", "zero.stage", "parallel.tensor")] == [[]] * 3


@pytest.mark.parametrize(
    ("world", "per_node", "layers", "tensor", "pipeline"),
    [
        (1, 8, 64, [], []),
        (64, 8, 64, [2, 4, 8], [2, 4, 8, 16, 32]),  # at most 32 stages
        (64, 64, 64, [2, 4, 8, 16, 32, 64], [2, 4, 8, 16, 32]),
        (64, 8, 31, [2, 4, 8], [2, 4, 8, 16]),
        (64, 8, 32, [2, 4, 8], [2, 4, 8, 16, 32]),
        (6, 4, 64, [2, 3], [2, 3, 6]),
    ],
)
def test_groups_stay_in_a_node_and_stages_have_a_layer(world, per_node, layers, tensor, pipeline):
    found = options(small(f"model.num_layers={layers}"), world, replace(A100, per_node=per_node))
    assert (found["parallel.tensor"], found["parallel.pipeline"]) == (tensor, pipeline)


@pytest.mark.parametrize(
    ("given", "world", "micro"),
    [
        ({"micro_batch_size": 8, "global_batch_size": 64}, 4, [4, 2, 1]),
        ({"global_batch_size": 48}, 4, [6, 4, 3, 2, 1]),  # 12 by division
        ({"global_batch_size": 48, "gradient_accumulation": 3}, 4, [2, 1]),  # 4
        ({"global_batch_size": 50}, 4, []),  # not divisible: unknown
        ({}, 4, []),
    ],
)
def test_the_micro_batch_that_is_divided_may_be_derived(given, world, micro):
    none = {"micro_batch_size": "null", "global_batch_size": "null", "gradient_accumulation": "null"}
    config = load_config("pythia/160M.yml", overrides=[f"train.{key}={value}" for key, value in (none | given).items()])
    assert options(config, world, A100)["train.micro_batch_size"] == micro


@pytest.mark.parametrize(
    ("given", "keys", "accumulation"),
    [
        # micro-batch, accumulation, global batch on 8 devices; the change; the accumulation that it needs
        ((4, None, None), {"train.micro_batch_size": 2}, 2),
        ((4, 3, None), {"train.micro_batch_size": 1}, 12),
        ((4, 3, 96), {"train.micro_batch_size": 2}, 6),
        ((4, None, None), {"parallel.tensor": 2}, 2),
        ((4, 2, None), {"parallel.tensor": 2, "parallel.pipeline": 2}, 8),
        ((4, None, None), {"train.micro_batch_size": 2, "parallel.tensor": 4}, 8),
        ((4, None, None), {"zero.stage": 2}, None),  # nothing to change
        ((4, 3, None), {"zero.stage": 2}, None),
        ((4, None, 256), {"train.micro_batch_size": 2}, None),  # follows from the other two
        ((None, None, 256), {"parallel.tensor": 2}, None),
        ((4, None, None), {"train.micro_batch_size": 3}, None),  # not divisible
    ],
)
def test_the_accumulation_follows_a_change(given, keys, accumulation):
    names = ("micro_batch_size", "gradient_accumulation", "global_batch_size")
    overrides = [f"train.{name}={value or 'null'}" for name, value in zip(names, given, strict=True)]
    config = load_config("pythia/160M.yml", overrides=overrides)
    before = keys.copy()
    out, found = changed(config, 8, keys)
    assert found == keys | ({"train.gradient_accumulation": accumulation} if accumulation else {}) and keys == before
    for key, value in found.items():
        section, name = key.split(".")
        assert getattr(getattr(out, section), name) == value
    untouched = out.model_copy(update={name: getattr(config, name) for name in ("train", "parallel", "zero")})
    assert untouched == config
    if accumulation:
        assert (
            estimate(out, 8, A100).layout.batch.global_batch_size
            == estimate(config, 8, A100).layout.batch.global_batch_size
        )


def test_combinations_take_every_value_of_every_choice():
    choices = {"a": [1, 2], "b": [], "c": [3], "d": [4, 5]}
    assert list(combinations(choices, 1)) == [{"a": 1}, {"a": 2}, {"c": 3}, {"d": 4}, {"d": 5}]
    assert list(combinations(choices, 2)) == [
        {"a": 1, "c": 3},
        {"a": 2, "c": 3},
        *({"a": a, "d": d} for a in (1, 2) for d in (4, 5)),
        {"c": 3, "d": 4},
        {"c": 3, "d": 5},
    ]
    assert list(combinations(choices, 4)) == []


def test_the_peak_is_that_of_the_fullest_stage():
    found = estimate(small("parallel.pipeline=4", "train.micro_batch_size=8"), 8, A100)
    peaks = [memory.peak for memory in found.memories]
    assert found.peak == max(peaks) and len(set(peaks)) > 1 and len(peaks) == 4


def test_a_change_must_fit_and_break_no_rule():
    """One device, of which no layout is possible: checkpointing, the micro-batch and ZeRO remain."""
    config = small("train.global_batch_size=32")
    there = estimate(config, 1, A100)
    for key, value in (("train.micro_batch_size", 16), ("train.activation_checkpointing", "full")):
        peak = estimate(changed(config, 1, {key: value})[0], 1, A100).peak
        exact = replace(A100, memory=peak + A100.reserve)
        found = changes(config, 1, exact)[0]
        assert found is not None and len(found.keys) <= 2 and found.estimate.peak <= peak < there.peak
        assert conflicts(changed(config, 1, found.keys)[0], 1, "cuda") == []


def test_conflicts_depend_on_the_kind_of_the_device():
    fp16 = small("precision.dtype=fp16")
    assert conflicts(fp16, 8, "cuda") == [] and [found.what for found in conflicts(fp16, 8, "cpu")] == [
        "fp16 needs a GPU"
    ]


def test_four_keys_are_changed_if_three_are_not_enough():
    config = small("train.micro_batch_size=2", "train.global_batch_size=16")
    lowest = {}
    for count in (3, 4):
        for keys in combinations(options(config, 2, A100), count):
            candidate, _ = changed(config, 2, keys)
            if not conflicts(candidate, 2, "cuda"):
                peak = estimate(candidate, 2, A100).peak
                lowest[count] = min(lowest.get(count, peak), peak)
    assert lowest[4] < lowest[3]
    change, fastest = changes(config, 2, replace(A100, memory=lowest[4] + A100.reserve))
    assert len(set(change.keys) - {"train.gradient_accumulation"}) == 4 and fastest is change
    assert change.estimate.peak == lowest[4]
