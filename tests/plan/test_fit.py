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
