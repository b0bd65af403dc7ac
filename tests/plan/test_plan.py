from __future__ import annotations

import json
from dataclasses import replace

import pytest

from neox.config.load import load_config
from neox.errors import ConfigError
from neox.plan.devices import find_device
from neox.plan.plan import as_json, duration, lines, make_plan
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
