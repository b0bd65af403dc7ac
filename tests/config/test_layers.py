"""Layers: order, merging, overrides, includes, and files that cannot be read."""

from __future__ import annotations

import os

import pytest

from neox.config.load import load_config, loads
from neox.errors import ConfigError
from tests.config.refusals import MINIMAL, refusal


def test_later_layers_win(write):
    write("base.yml", "optimizer: {lr: 1e-3, eps: 1e-6}\ntrain: {seed: 1, train_iters: 1}\n")
    write("a.yml", "include: base.yml\n" + MINIMAL + "train: {seed: 2, train_iters: 2}\n")
    write("b.yml", "train: {seed: 3}\n")
    config = load_config("a.yml", "b.yml", overrides=["train.seed=4"])
    assert (config.optimizer.eps, config.optimizer.lr, config.train.train_iters, config.train.seed) == (
        1e-6,
        1e-3,
        2,
        4,
    )
    assert load_config("a.yml", "b.yml").train.seed == 3
    assert load_config("b.yml", "a.yml").train.seed == 2


def test_lists_are_replaced_and_mappings_merged(write):
    write(
        "a.yml",
        MINIMAL
        + "data: {train: [a, b]}\ndeepspeed: {zero_optimization: {overlap_comm: true, reduce_scatter: false}}\n",
    )
    config = load_config("a.yml", overrides=["data.train=[c]", "deepspeed.zero_optimization.reduce_scatter=true"])
    assert [source.path for source in config.data.train] == ["c"]
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True, "reduce_scatter": True}}


def test_null_wins_over_a_mapping_and_a_mapping_over_null(write):
    write("a.yml", "model: {vocab_size: 100, rope_scaling: {type: linear, factor: 2}}\n")
    write("b.yml", "model: {rope_scaling: null}\n")
    assert load_config("a.yml", "b.yml").model.rope_scaling is None
    assert load_config("b.yml", "a.yml").model.rope_scaling.factor == 2.0


def test_an_empty_section_sets_nothing(write):
    write("a.yml", MINIMAL)
    write("b.yml", "model:\ntrain: {}\n")
    assert load_config("a.yml", "b.yml") == load_config("a.yml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.dir=$(touch canary); `x` | y > z: #", "$(touch canary); `x` | y > z: #"),
        ("run.dir=no", "no"),
        ('run.dir="1"', "1"),
        ("run.dir=a=b", "a=b"),
        ("run.dir=Ünïcode \N{SNOWMAN}", "Ünïcode \N{SNOWMAN}"),
        ("run.dir=*alias", "*alias"),
    ],
)
def test_overrides_are_literal(write, override, value):
    write("a.yml", MINIMAL)
    assert load_config("a.yml", overrides=[override]).run.dir == value


def test_overrides_are_typed(write):
    write("a.yml", MINIMAL)
    config = load_config(
        "a.yml",
        overrides=[
            "optimizer.lr=1e-4",
            "optimizer.betas=[0.5, 0.6]",
            "data.document-mask=true",
            "data.train=[{path: a, weight: 2}]",
        ],
    )
    assert (config.optimizer.lr, config.optimizer.betas, config.data.document_mask, config.data.train[0].weight) == (
        1e-4,
        (0.5, 0.6),
        True,
        2.0,
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model:\n  vocab_size: \xff\n", ["not UTF-8", "x.yml:2", "0xff at offset 21"]),
        ("model: {vocab_size: 1}".encode("utf-16"), ["not UTF-8", "x.yml:1"]),
        (b"# " + b"x" * (1 << 20), ["too large", "x.yml"]),
    ],
)
def test_damaged_files(write, content, parts):
    write("x.yml", content)
    lines = refusal("x.yml", overrides=("model.vocab_size=1",))
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines


def test_a_byte_order_mark_is_skipped(write):
    write("x.yml", b"\xef\xbb\xbfmodel: {vocab_size: 7}\n")
    assert load_config("x.yml").model.vocab_size == 7


def test_a_folder_or_fifo_is_refused_without_hanging(write, tmp_path):
    (tmp_path / "folder.yml").mkdir()
    os.mkfifo(tmp_path / "pipe.yml")
    for name in ("folder.yml", "pipe.yml"):
        assert "not a regular file" in refusal(name, overrides=("model.vocab_size=1",))[0]


def test_circular_includes(write):
    write("a.yml", "include: b.yml\n")
    write("b.yml", "include: [a.yml]\n")
    line = refusal("a.yml", overrides=("model.vocab_size=1",))[0]
    assert "circular include" in line and "b.yml:1" in line and "a.yml -> b.yml -> a.yml" in line


def test_an_include_is_searched_next_to_the_including_file(write):
    write("deep/a.yml", "include: sub/b.yml\n")
    write("deep/sub/b.yml", "train: {seed: 77}\n")
    assert load_config("deep/a.yml", overrides=["model.vocab_size=1"]).train.seed == 77


def test_a_missing_include_names_the_including_line(write):
    write("a.yml", "\ninclude: missing.yml\n")
    assert "where=a.yml:2; got=missing.yml" in refusal("a.yml", overrides=("model.vocab_size=1",))[0]


def test_a_lock_file_must_not_include_files():
    with pytest.raises(ConfigError, match="bad include; where=<text>:1 include"):
        loads("include: other.yml\n" + MINIMAL)


SECRETS = [
    "hunter2-secret",
    "- hunter2-secret\n- more",
    "password: hunter2-secret",
    "token:\n  value: hunter2-secret",
    "'hunter2-secret",
    "a: *hunter2-secret",
    "a: [hunter2-secret",
    "hunter2-secret\nb: 1\n",
    "machine example.org login me password hunter2-secret\n: x",
    "%hunter2-secret\n",
    "hunter2-secret@:\t- x",
    "model: !hunter2-secret",
    "model: !hunter2-secret [a]",
    "model: {vocab_size: !hunter2-secret 1}",
    "!hunter2-secret {a: b}",
]


@pytest.mark.parametrize("content", SECRETS)
def test_the_content_of_a_file_that_is_not_a_config_is_not_printed(write, content):
    """`include:` may name any file by mistake; its lines, and the values of keys that no config has, stay out of the
    log.
    """
    write("secret", content)
    write("main.yml", "include: secret\n" + MINIMAL)
    lines = refusal("main.yml")
    assert any("where=secret" in line for line in lines), lines
    assert not any("secret" in line.replace("where=secret", "") for line in lines), lines


@pytest.mark.parametrize("name", ["caf\udce9", "\ud800"])
def test_text_that_utf8_cannot_encode(write, name):
    write("main.yml", MINIMAL)
    (line,) = refusal("main.yml", overrides=(f"run.dir=runs/{name}",))
    assert (
        line.startswith("error[2] not a value; where=--set run.dir; got=runs/")
        and "want=characters that UTF-8 can encode" in line
    )
    line.encode()
    (line,) = refusal(name)
    assert line.startswith("error[2] no such config file") and line.encode()
    write("bad.yml", MINIMAL + 'run: {dir: "\\ud800"}\n')
    (line,) = refusal("bad.yml")
    assert "bad.yml:" in line and "run.dir" in line and "want=characters that UTF-8 can encode" in line


@pytest.mark.parametrize("value", ["[a, {b]", "[a", "[a]]", "{a: 1", "'a", '"a', "[a], [b]", "{a: 1}, 2", "[a: b: c]"])
def test_a_malformed_list_of_an_override_is_one_problem(value):
    """PyYAML's own words would name lines and blocks, which an override does not have."""
    (line,) = refusal(overrides=("model.vocab_size=1", f"data.train={value}"))
    assert line.startswith(f"error[2] not a value; where=--set data.train; got={value}; want=one value, such as ")
    assert "match every bracket and quote" in line


def test_a_tag_or_a_key_given_twice_in_an_override():
    (line,) = refusal(overrides=("model.vocab_size=1", "data.train=[!x a]"))
    assert line.startswith("error[2] YAML tag is not allowed; where=--set data.train; want=")
    (line,) = refusal(overrides=("model.vocab_size=1", "deepspeed={a: 1, a: 2}"))
    assert line.startswith("error[2] key given twice; where=--set deepspeed; ")
