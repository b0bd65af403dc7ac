"""Layering, origins, round trip of the lock, and what a wrong source or value gets."""

from __future__ import annotations

import json
import os

import pytest

from neox.config.load import dump, find, flatten, load, load_config, loads, tokenizer_vocab_size
from neox.config.schema import Config
from neox.errors import ConfigError

MINIMAL = "model: {vocab_size: 100}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the working folder of the test: write(name, text) -> name."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return _write


def refusal(*paths: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error that loading gives."""
    with pytest.raises(ConfigError) as caught:
        load(paths, overrides)
    return caught.value.line().splitlines()


def test_later_layers_win(write):
    write("base.yml", "optimizer: {lr: 1e-3, eps: 1e-6}\ntrain: {seed: 1, train_iters: 1}\n")
    write("a.yml", "include: base.yml\n" + MINIMAL + "train: {seed: 2, train_iters: 2}\n")
    write("b.yml", "train: {seed: 3}\n")
    config = load_config("a.yml", "b.yml", overrides=["train.seed=4"])
    assert (config.optimizer.eps, config.optimizer.lr, config.train.train_iters, config.train.seed) == (1e-6, 1e-3, 2, 4)
    assert load_config("a.yml", "b.yml").train.seed == 3
    assert load_config("b.yml", "a.yml").train.seed == 2


def test_every_value_knows_its_origin(write):
    write("base.yml", "optimizer:\n  lr: 1e-3\n")
    write("a.yml", "include: [base.yml]\n" + MINIMAL + "train:\n  seed: 2\n")
    loaded = load(["a.yml"], ["run.dir=x", "train.seed=9"])
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    assert set(origins) == {key for key, _ in flatten(loaded.config)}
    assert origins["optimizer.lr"] == "base.yml:2"
    assert origins["model.vocab_size"] == "a.yml:2"
    assert origins["run.dir"] == "--set"
    assert origins["optimizer.eps"] == "default"
    assert origins["model.head_dim"] == "derived"
    assert [(str(origin), value) for origin, value in loaded.origins["train.seed"].overridden] == [("a.yml:4", 2)]


def test_lists_are_replaced_and_mappings_merged(write):
    write("a.yml", MINIMAL + "data: {train: [a, b]}\ndeepspeed: {zero_optimization: {overlap_comm: true, reduce_scatter: false}}\n")
    config = load_config("a.yml", overrides=["data.train=[c]", "deepspeed.zero_optimization.reduce_scatter=true"])
    assert [source.path for source in config.data.train] == ["c"]
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True, "reduce_scatter": True}}


def test_null_wins_over_a_mapping_and_a_mapping_over_null(write):
    write("a.yml", "model: {vocab_size: 100, rope_scaling: {type: linear, factor: 2}}\n")
    write("b.yml", "model: {rope_scaling: null}\n")
    assert load_config("a.yml", "b.yml").model.rope_scaling is None
    assert load_config("b.yml", "a.yml").model.rope_scaling.factor == 2.0


def test_an_empty_section_says_nothing(write):
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
    config = load_config("a.yml", overrides=["optimizer.lr=1e-4", "optimizer.betas=[0.5, 0.6]", "data.document-mask=true", "data.train=[{path: a, weight: 2}]"])
    assert (config.optimizer.lr, config.optimizer.betas, config.data.document_mask, config.data.train[0].weight) == (1e-4, (0.5, 0.6), True, 2.0)


def test_names_are_looked_for_under_configs_and_without_suffix(write, tmp_path):
    write("configs/mine/tiny.yml", MINIMAL)
    for name in ("configs/mine/tiny.yml", "mine/tiny.yml", "mine/tiny"):
        assert find(name) == tmp_path / "configs/mine/tiny.yml"


def test_the_lock_loads_as_the_same_config(write):
    write(
        "a.yml",
        "model: {vocab_size: 100, rope_scaling: {type: yarn, factor: 3.5}}\ndata: {train: [{path: 'no', weight: 0.1}, '1e-4', '010', '', 'a: b # c']}\n"
        'run: {dir: "null"}\noptimizer: {lr: 1e-5, eps: 1.2345678901234567e-30}\ntokenizer: {eod_token: "\\u2028<|x|>\\t"}\n'
        "deepspeed: {zero_optimization: {overlap_comm: true}, wandb: {project: 'yes'}}\n",
    )
    config = load_config("a.yml")
    text = dump(config)
    assert loads(text) == config
    assert dump(loads(text)) == text
    assert config.data.train[1].path == "1e-4"


def test_a_section_without_spaces_after_its_colons(write):
    write("bad.yml", "model:\n  num_layers:2\n  hidden_size:8\n")
    (line,) = refusal("bad.yml")
    assert "bad.yml:2 model" in line and line.endswith("do=put a space after the colon of each key below it")


def test_the_lock_may_include_nothing():
    with pytest.raises(ConfigError, match="bad include; where=<text>:1 include"):
        loads("include: other.yml\n" + MINIMAL)


def test_all_problems_at_once_each_with_its_place(write):
    write(
        "bad.yml", "model:\n  vocab_size: 100\n  hiden_size: 3\n  num_layers: 1.0\ntrain:\n  lr: 3\n  seed: '4'\nnum_layers: 3\nzero_optimisation: {stage: 1}\n"
    )
    write("broken.yml", "a: [")
    lines = refusal("bad.yml", "broken.yml", "gone.yml", overrides=("train.sed=3", "oops"))
    expected = [
        ("not YAML", "broken.yml:1"),
        ("no such config file", "gone.yml"),
        ("cannot read an override", "oops", "join key, = and value to one word"),
        ("unknown key", "bad.yml:3 model.hiden_size", "did you mean model.hidden_size?"),
        ("bad value", "bad.yml:4 model.num_layers", "got=1.0", "want=integer, such as 1"),
        ("unknown key", "bad.yml:6 train.lr", "did you mean optimizer.lr?"),
        ("bad value", "bad.yml:7 train.seed", "got='4'", "want=integer"),
        ("unknown key", "bad.yml:8 num_layers", "did you mean model.num_layers?"),
        ("unknown key", "bad.yml:9 zero_optimisation", "did you mean deepspeed.zero_optimization?"),
        ("unknown key", "--set train.sed", "did you mean train.seed?"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    assert len(lines) == len(expected)
    assert all(line.startswith("error[2] ") for line in lines)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_layers=0", ["model.num_layers", "got=0", "greater than 0"]),
        ("model.num_layers=true", ["got=True", "integer"]),
        ("optimizer.lr='1e-4'", ["got='1e-4'", "number"]),
        ("optimizer.lr=.inf", ["got=inf", "finite"]),
        ("optimizer.lr=.nan", ["got=nan"]),
        ("data.document_mask=yes", ["got='yes'", "boolean"]),
        ("data.document_mask=1", ["got=1", "boolean"]),
        ("run.dir=3", ["got=3", "string; put it in quotes"]),
        ("zero.stage=true", ["got=True", "integer"]),
        ("zero.stage=4", ["got=4", "less than or equal to 3"]),
        ("optimizer.type=adam", ["got='adam'", "'adamw'"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "want=a list"]),
        ("data.train=[{path: a, wieght: 1}]", ["data.train.0.wieght", "did you mean data.train.weight?"]),
        ("data.train=[{weight: 1}]", ["key is missing", "data.train.0.path"]),
        ("data.train=[{path: a, weight: -1}]", ["data.train.0.weight", "got=-1"]),
        ("train=3", ["train", "a section"]),
        ("model.rope_scaling=[1]", ["model.rope_scaling", "a section"]),
        ("model.num_kv_heads=1.5", ["model.num_kv_heads", "got=1.5"]),
        ("model.init=bogus", ["got='bogus'", "'small_init'"]),
    ],
)
def test_bad_values(override, parts):
    lines = refusal(overrides=("model.vocab_size=100", override))
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines


def test_what_follows_from_a_bad_value_is_not_reported_as_well():
    assert len(refusal(overrides=("model.vocab_size=100", "model.hidden_size=true"))) == 1


def test_a_bad_derived_value_alone_is_reported():
    lines = refusal(overrides=("model.vocab_size=100", "model.hidden_size=4"))
    assert "model.head_dim" in lines[0] and "got=0" in lines[0]


def test_vocab_size_is_required():
    assert "model.vocab_size" in refusal()[0] and "tokenizer.file" in refusal()[0]


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
    assert "circle" in line and "b.yml:1" in line and "a.yml -> b.yml -> a.yml" in line


@pytest.mark.parametrize(
    ("name", "close"),
    [("1-3b", "1-3B.yml"), ("pythia/160m.yml", "pythia/160M.yml"), ("pytha/160M.yml", "pythia/160M.yml"), ("configs/2-7B.yml", "gpt3/2-7B.yml")],
)
def test_a_missing_file_names_the_nearest_preset(name, close, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {close}?" in refusal(name)[0]


def test_an_include_is_found_beside_its_file(write):
    write("deep/a.yml", "include: sub/b.yml\n")
    write("deep/sub/b.yml", "train: {seed: 77}\n")
    assert load_config("deep/a.yml", overrides=["model.vocab_size=1"]).train.seed == 77


def test_a_missing_include_names_who_asked(write):
    write("a.yml", "\ninclude: gone.yml\n")
    assert "where=a.yml:2; got=gone.yml" in refusal("a.yml", overrides=("model.vocab_size=1",))[0]


def tokenizer_json(vocab: object, added: list[dict]) -> str:
    return json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab}})


def test_vocab_size_comes_from_the_tokenizer(write):
    write("t.json", tokenizer_json({"a": 0, "b": 1}, [{"id": 5, "content": "<|endoftext|>"}]))
    loaded = load([], ["tokenizer.file=t.json"])
    assert loaded.config.model.vocab_size == 6
    assert str(loaded.origins["model.vocab_size"]) == "derived"
    assert load_config(overrides=["tokenizer.file=t.json", "model.vocab_size=9"]).model.vocab_size == 9


def test_vocab_size_of_the_neox_tokenizer(shared_data):
    assert tokenizer_vocab_size(str(shared_data / "tokenizers" / "gpt-neox-20b.json")) == 50277


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "t.json:"), ("[]", "no `model`"), ('{"model": {}}', "no `model.vocab`"), ('{"model": {"vocab": {"a": "b"}}}', "no numbers"), (None, "No such file")],
)
def test_a_bad_tokenizer_is_named_once(write, content, part):
    if content is not None:
        write("t.json", content)
    lines = refusal(overrides=("tokenizer.file=t.json",))
    assert len(lines) == 1 and "where=--set tokenizer.file" in lines[0] and part in lines[0], lines
    assert "do=name a `tokenizers` JSON file, or take tokenizer.file out" in lines[0]


def test_config_is_frozen():
    config = load_config(overrides=["model.vocab_size=1"])
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


def test_every_field_has_a_description():
    def visit(model, path):
        for name, field in model.model_fields.items():
            yield f"{path}{name}", field
            for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(inner, type) and hasattr(inner, "model_fields"):
                    yield from visit(inner, f"{path}{name}.")

    missing = [key for key, field in visit(Config, "") if not field.description and key not in Config.model_fields]
    assert missing == []
    assert all(field.annotation.__doc__ for field in Config.model_fields.values())


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
]


@pytest.mark.parametrize("content", SECRETS)
def test_a_file_that_is_no_config_is_not_printed(write, content):
    """`include:` may name any file by mistake; its lines, and the values of keys that no config has, stay out of the log."""
    write("secret", content)
    write("main.yml", "include: secret\n" + MINIMAL)
    lines = refusal("main.yml")
    assert any("where=secret" in line for line in lines), lines
    assert not any("secret" in line.replace("where=secret", "") for line in lines), lines


@pytest.mark.parametrize("name", ["caf\udce9", "\ud800"])
def test_texts_that_utf8_cannot_write(write, name):
    write("main.yml", MINIMAL)
    (line,) = refusal("main.yml", overrides=(f"run.dir=runs/{name}",))
    assert line.startswith("error[2] not a value; where=--set run.dir; got=runs/") and "want=characters that UTF-8 can write" in line
    line.encode()
    (line,) = refusal(name)
    assert line.startswith("error[2] no such config file") and line.encode()
    write("bad.yml", MINIMAL + 'run: {dir: "\\ud800"}\n')
    (line,) = refusal("bad.yml")
    assert "bad.yml:" in line and "run.dir" in line and "want=characters that UTF-8 can write" in line
