"""Layers: order, merging, overrides, includes, and files that cannot be read."""

from __future__ import annotations

import os

import pytest

from neox.config.layers import Layers
from neox.config.load import load, load_config, loads
from neox.config.parse import MAX_BYTES
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


def test_a_file_wins_over_its_includes_wherever_it_names_them(write):
    write("one.yml", "train: {seed: 1, train_iters: 1}\noptimizer: {lr: 0.1}\n")
    write("two.yml", "train: {train_iters: 2}\noptimizer: {lr: 0.2}\n")
    write("a.yml", MINIMAL + "optimizer: {lr: 0.3}\ninclude: [one.yml, two.yml]\n")
    config = load_config("a.yml")
    assert (config.train.seed, config.train.train_iters, config.optimizer.lr) == (1, 2, 0.3)


def test_two_files_may_include_the_same_one(write):
    write("common.yml", "train: {seed: 5, train_iters: 5}\n")
    write("one.yml", "include: common.yml\ntrain: {train_iters: 6}\n")
    write("two.yml", "include: common.yml\n")
    write("a.yml", MINIMAL + "include: [one.yml, two.yml]\n")
    config = load_config("a.yml")
    assert (config.train.seed, config.train.train_iters) == (5, 5)  # read again, and later


def test_a_file_that_includes_itself(write):
    write("a.yml", MINIMAL + "include: a\n")
    assert refusal("a.yml") == ["error[2] circular include; where=a.yml:2; got=a.yml -> a.yml"]


@pytest.mark.parametrize("more", [0, 1])
def test_a_config_has_at_most_64_files(write, more):
    names = [f"{number}.yml" for number in range(63 + more)]
    for name in names:
        write(name, "train: {seed: 3}\n")
    write("a.yml", f"{MINIMAL}include: [{', '.join(names)}]\n")
    if more:
        (line,) = refusal("a.yml")
        assert line == "error[2] too many files; where=a.yml:2; want=at most 64, includes counted"
    else:
        assert load_config("a.yml").train.seed == 3


@pytest.mark.parametrize("value", ["3", "[b.yml, 3]", "null", "{}"])
def test_an_include_that_names_no_files(write, value):
    write("b.yml", "")
    write("a.yml", f"{MINIMAL}include: {value}\n")
    (line,) = refusal("a.yml")
    assert line.startswith("error[2] bad include; where=a.yml:2 include; got=")
    assert line.endswith("; want=a file name or a list of file names")


def test_the_largest_file_that_is_read(write):
    start = MINIMAL.encode() + b"# "
    write("a.yml", start + b"x" * (MAX_BYTES - len(start)))
    assert load_config("a.yml").model.vocab_size == 100
    write("a.yml", start + b"x" * (MAX_BYTES + 1 - len(start)))
    (line,) = refusal("a.yml", overrides=("model.vocab_size=1",))
    assert line == "error[2] config file is too large; where=a.yml; want=at most 1048576 bytes"


def test_a_file_that_may_not_be_read_is_reported_with_the_reason(write, monkeypatch):
    write("a.yml", MINIMAL)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    (line,) = refusal("a.yml", overrides=("model.vocab_size=1",))
    assert line == "error[2] cannot read config file; where=a.yml; got=Permission denied"


@pytest.mark.parametrize("override", ["train.seed", "=3", "train..seed=3", "train. =3", ".seed=3", ""])
def test_an_override_without_a_key_or_a_value(override):
    (line,) = refusal(overrides=("model.vocab_size=1", override))
    assert line == (
        f"error[2] cannot parse an override; where=--set; got={' '.join(repr(override).split())}; "
        "want=section.key=value; do=join key, = and value without spaces: --set train.train_iters=1000"
    )


def test_spaces_around_the_parts_of_an_override_do_not_count():
    config = load_config(overrides=["model.vocab_size=1", " train . seed = 7 ", "data.seq-length=8", "run.dir='a b '"])
    assert (config.train.seed, config.data.seq_length, config.run.dir) == (7, 8, "a b ")


def test_hyphens_in_an_override_stay_below_deepspeed():
    layers = Layers()
    layers.add_override("deepspeed.a-b=1")
    layers.add_override("model.num-layers=2")
    assert {path: setting.value for path, setting in layers.settings.items()} == {
        ("deepspeed", "a-b"): 1,
        ("model", "num_layers"): 2,
    }


def test_the_history_of_a_value_is_newest_first(write):
    write("a.yml", MINIMAL + "train: {seed: 1}\n")
    write("b.yml", "\ntrain: {seed: 2}\n")
    origin = load(["a.yml", "b.yml"], ["train.seed=3", "train.seed=4"]).origins["train.seed"]
    assert str(origin) == "--set"
    assert [(str(old), value) for old, value in origin.overridden] == [("--set", 3), ("b.yml:2", 2), ("a.yml:2", 1)]
    assert all(old.overridden == () for old, _ in origin.overridden)


def test_a_mapping_replaces_the_keys_below_it_and_a_key_the_mapping_above_it(write):
    write("a.yml", MINIMAL + "deepspeed: {aio: {block_size: 1, queue_depth: 2}, aio2: {x: 1}, dump_state: true}\n")
    layers = load(["a.yml"], ["deepspeed.aio={use_gds: true}"])
    assert layers.config.deepspeed == {"aio": {"use_gds": True}, "aio2": {"x": 1}, "dump_state": True}
    layers = load(["a.yml"], ["deepspeed.aio=null", "deepspeed.aio.use_gds=true"])
    assert layers.config.deepspeed == {"aio": {"use_gds": True}, "aio2": {"x": 1}, "dump_state": True}


def test_a_list_or_text_of_an_override_may_end_in_a_comment():
    config = load_config(overrides=["model.vocab_size=1", "optimizer.betas=[0.5, 0.6] # faster", "run.dir='x' # y"])
    assert (config.optimizer.betas, config.run.dir) == ((0.5, 0.6), "x")


def test_a_long_value_of_an_override_is_cut_in_the_report():
    (line,) = refusal(overrides=("model.vocab_size=1", f"data.train=[{'x' * 200}"))
    assert f"got=[{'x' * 79}; want=" in line
    (line,) = refusal(overrides=("model.vocab_size=1", f"run.dir=\udce9{'x' * 200}"))
    assert "x" * 70 in line and "x" * 81 not in line
