"""Batch sizes, and the form of a report. The rules themselves are tested in rules/."""

from __future__ import annotations

import pytest

from neox.config.layers import Origin
from neox.config.load import load, load_config
from neox.config.rules import Conflict
from neox.config.validate import BatchSizes, batch_sizes, check_sources, location, problem, validate, value_of
from neox.errors import ConfigError

BASE = ["model.vocab_size=100", "data.train=[corpus]", "train.micro_batch_size=1"]


def config_of(*overrides: str):
    return load_config(overrides=[*BASE, *overrides])


def lines_of(config, world_size=1, device="cpu", origins=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size, device, origins)
    return caught.value.line().splitlines()


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("accumulation", [None, 4])
@pytest.mark.parametrize("total", [None, 24])
def test_any_one_of_the_batch_sizes_may_be_omitted(micro, accumulation, total):
    given = {"micro_batch_size": micro, "gradient_accumulation": accumulation, "global_batch_size": total}
    overrides = ["model.vocab_size=100", *(f"train.{key}={value}" for key, value in given.items() if value)]
    config = load_config(overrides=overrides)
    if micro is None and total is None:
        with pytest.raises(ConfigError, match="batch size is not given"):
            batch_sizes(config, 2)
        return
    sizes = batch_sizes(config, 2)
    assert sizes.global_batch_size == sizes.micro_batch_size * sizes.gradient_accumulation * sizes.dp
    for key, value in given.items():
        assert value is None or dict(vars(sizes))[key] == value
    expected = {(None, None): (12, 1), (3, None): (3, 4 if total else 1), (None, 4): (3, 4), (3, 4): (3, 4)}[
        (micro, accumulation)
    ]
    assert (sizes.micro_batch_size, sizes.gradient_accumulation) == expected


def test_batch_sizes_are_checked():
    config = config_of("train.gradient_accumulation=2", "train.global_batch_size=5")
    with pytest.raises(ConfigError) as caught:
        batch_sizes(config, 2)
    line = caught.value.line()
    for part in (
        "train.micro_batch_size = 1",
        "train.gradient_accumulation = 2",
        "train.global_batch_size = 5",
        "data-parallel size = 2",
        "global_batch_size: 4",
    ):
        assert part in line
    with pytest.raises(ConfigError, match="a multiple of 2"):
        batch_sizes(config_of("train.global_batch_size=5"), 2)


def test_the_data_parallel_size_is_what_tensor_and_pipeline_leave():
    assert batch_sizes(config_of("parallel.tensor=2", "parallel.pipeline=2"), 8) == BatchSizes(1, 1, 2, 2)


def test_a_valid_config_passes():
    validate(config_of(), 1, "cpu")
    validate(config_of("precision.dtype=fp16"), 8, "cuda")


def test_everything_is_reported_at_once():
    config = config_of(
        "model.num_attention_heads=10",
        "schedule.warmup_iters=2000",
        "precision.dtype=fp16",
        "train.global_batch_size=3",
        "deepspeed.fp16.enabled=true",
    )
    lines = lines_of(config, world_size=2)
    assert len(lines) == 5
    assert all(line.startswith("error[2] ") for line in lines)


def test_a_report_names_files_lines_values_and_the_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text(
        "model:\n  vocab_size: 9\n  num_attention_heads: 7\ndata: {train: [x]}\ntrain: {micro_batch_size: 1}\n"
    )
    loaded = load(["a.yml"], ["model.hidden_size=100"])
    assert lines_of(loaded.config, origins=loaded.origins) == [
        "error[2] heads do not divide the hidden size; where=--set model.hidden_size, a.yml:3 "
        "model.num_attention_heads; "
        "got=model.hidden_size = 100, model.num_attention_heads = 7; want=hidden_size a multiple of "
        "num_attention_heads; do=change one, or set model.head_dim"
    ]


@pytest.mark.parametrize(("world_size", "device"), [(0, "cpu"), (1, "tpu")])
def test_invalid_arguments_are_a_bug_of_the_caller(world_size, device):
    with pytest.raises(ValueError, match="world_size"):
        validate(config_of(), world_size, device)


@pytest.mark.parametrize(
    ("micro", "accumulation", "total", "sizes"),
    [
        (3, None, None, (3, 1, 12, 4)),
        (3, 5, None, (3, 5, 60, 4)),
        (3, 5, 60, (3, 5, 60, 4)),
        (3, None, 60, (3, 5, 60, 4)),
        (None, 5, 60, (3, 5, 60, 4)),
        (None, None, 60, (15, 1, 60, 4)),
    ],
)
def test_batch_sizes_over_the_replicas(micro, accumulation, total, sizes):
    """Eight processes in groups of two read four batches."""
    given = {"micro_batch_size": micro, "gradient_accumulation": accumulation, "global_batch_size": total}
    overrides = [f"train.{key}={value or 'null'}" for key, value in given.items()]
    assert batch_sizes(config_of(*overrides, "parallel.tensor=2"), 8) == BatchSizes(*sizes)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.train=[]"], "no training data"),
        (["data.path=x"], "data is given twice"),
        (["data.path=x", "data.train=[]", "data.text=[y]"], "data is given twice"),
        ([], None),
        (["data.path=x", "data.train=[]"], None),
        (["data.text=[y]", "data.train=[]"], None),
        (["data.validation=[v]", "evaluate.interval=5", "model.head_dim=7"], None),  # nothing else is checked
    ],
)
def test_the_sources_alone_are_checked(overrides, what):
    config = config_of(*overrides)
    if what is None:
        check_sources(config)
    else:
        with pytest.raises(ConfigError) as caught:
            check_sources(config)
        assert caught.value.what == what and "data." in caught.value.where


def test_the_location_of_a_key():
    origins = {
        "a.b": Origin("x.yml", 3),
        "a.c": Origin("default"),
        "d.e.f": Origin("--set"),
        "g.h": Origin("derived"),
        "a.bc": Origin("y.yml", 9),
    }
    locations = {key: location(key, origins) for key in ("a.b", "a.c", "d.e", "d", "g.h", "a.bc", "z", "d.e.f.g")}
    assert locations == {
        "a.b": "x.yml:3 a.b",
        "a.c": "a.c",
        "d.e": "--set d.e",
        "d": "--set d",
        "g.h": "g.h",
        "a.bc": "y.yml:9 a.bc",
        "z": "z",
        "d.e.f.g": "d.e.f.g",
    }


def test_the_value_of_a_section_is_what_is_below_it():
    values = {"a.b": 1, "a.c.d": 2, "ab.e": 3, "f": None}
    assert value_of("a.b", values) == 1 and value_of("f", values) is None
    assert value_of("a", values) == {"b": 1, "c.d": 2} and value_of("zz", values) == {}


def test_a_conflict_becomes_an_error_with_locations_values_and_facts():
    conflict = Conflict("what", ("a.b", "a.c"), "rule", "do", (("world size", 3), ("x", "y")))
    error = problem(conflict, {"a.b": True, "a.c": "t" * 99}, {"a.c": Origin("x.yml", 2)})
    assert error.line() == (
        f"error[2] what; where=a.b, x.yml:2 a.c; got=a.b = true, a.c = '{'t' * 76}..., world size = 3, x = y; "
        "want=rule; do=do"
    )
    assert problem(Conflict("what", (), "rule"), {}, {}).where is None
