"""Validation of values, their origins, and the vocabulary size of a tokenizer."""

from __future__ import annotations

import json

import pytest

from neox.config.load import load, load_config, loads
from neox.config.values import flatten
from neox.errors import ConfigError
from tests.config.refusals import MINIMAL, refusal


def test_every_value_has_an_origin(write):
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


def test_a_section_without_spaces_after_its_colons(write):
    write("bad.yml", "model:\n  num_layers:2\n  hidden_size:8\n")
    (line,) = refusal("bad.yml")
    assert "bad.yml:2 model" in line and line.endswith("do=put a space after the colon of each key below it")


@pytest.mark.parametrize("outer", ["model", "data"])  # data has a key of this name, which is a list
def test_a_section_that_is_indented_below_another(write, outer):
    write("bad.yml", f"{outer}:\n  train:\n    train_iters: 3\n")
    (line,) = [line for line in refusal("bad.yml") if f"bad.yml:3 {outer}.train" in line]
    assert line.endswith("do=train is a section: move it to the first column")


def test_all_problems_are_reported_at_once_with_their_locations(write):
    write(
        "bad.yml",
        "model:\n  vocab_size: 100\n  hiden_size: 3\n  num_layers: 1.0\ntrain:\n  lr: 3\n  seed: '4'\nnum_layers: "
        "3\nzero_optimisation: {stage: 1}\n",
    )
    write("broken.yml", "a: [")
    lines = refusal(
        "bad.yml", "broken.yml", "missing.yml", overrides=("train.sed=3", "optimizer.learning_rate=1", "oops")
    )
    expected = [
        ("not YAML", "broken.yml:1"),
        ("no such config file", "missing.yml"),
        ("cannot parse an override", "oops", "join key, = and value without spaces"),
        ("unknown key", "bad.yml:3 model.hiden_size", "did you mean model.hidden_size?"),
        ("bad value", "bad.yml:4 model.num_layers", "got=1.0", "want=integer, such as 1"),
        ("unknown key", "bad.yml:6 train.lr", "did you mean optimizer.lr?"),
        ("bad value", "bad.yml:7 train.seed", "got='4'", "want=integer"),
        ("unknown key", "bad.yml:8 num_layers", "did you mean model.num_layers?"),
        ("unknown key", "bad.yml:9 zero_optimisation", "did you mean deepspeed.zero_optimization?"),
        ("unknown key", "--set train.sed", "did you mean train.seed?"),
        ("unknown key", "--set optimizer.learning_rate", "did you mean optimizer.lr?"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    assert len(lines) == len(expected)
    assert all(line.startswith("error[2] ") for line in lines)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.num_layers=0", ["model.num_layers", "got=0", "greater than 0"]),
        ("model.num_layers=true", ["got=true", "integer"]),
        ("optimizer.lr='1e-4'", ["got='1e-4'", "number"]),
        ("optimizer.lr=.inf", ["got=inf", "finite"]),
        ("optimizer.lr=.nan", ["got=nan"]),
        ("data.document_mask=yes", ["got='yes'", "boolean"]),
        ("data.document_mask=1", ["got=1", "boolean"]),
        ("run.dir=3", ["got=3", "want=string; do=put the value in quotes: '3'"]),
        ("data.split=98", ["got=98", "do=put the value in quotes: '98'"]),
        *(
            (f"data.split='{split}'", ["--set data.split;", f"got='{split}'", "want=one to three shares such as 969"])
            for split in ("", "a,b", "0,0", "-1,1,1", "1,2,3,4", "1,nan,1", "inf,1,1", "1;2;3")
        ),
        ("zero.stage=true", ["got=true", "integer"]),
        ("zero.stage=4", ["got=4", "less than or equal to 3"]),
        ("optimizer.type=adam", ["got='adam'", "'adamw'"]),
        ("optimizer.betas=[0.9]", ["--set optimizer.betas;", "got=[0.9]", "want=list of 2 numbers"]),
        ("optimizer.betas=[0.9, 0.95, 1]", ["--set optimizer.betas;", "want=list of 2 numbers"]),
        ("optimizer.betas=[a]", ["optimizer.betas.0", "got='a'", "want=number"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "want=a list"]),
        ("optimizer.betas=0.9,0.95", ["optimizer.betas", "want=a list, such as [0.9,0.95]"]),
        ("checkpoint.resume=true", ["got=true", "want=string"]),
        ("data.train=[{path: a, wieght: 1}]", ["data.train.0.wieght", "did you mean data.train.weight?"]),
        ("data.train=[{weight: 1}]", ["key is missing", "data.train.0.path", "want=data.train.0.path"]),
        ("data.train=[{path: a, weight: -1}]", ["data.train.0.weight", "got=-1"]),
        ("train=3", ["train", "a section"]),
        ("model.rope_scaling=[1]", ["model.rope_scaling", "a section"]),
        ("model.num_kv_heads=1.5", ["model.num_kv_heads", "got=1.5"]),
        ("model.init=bogus", ["got='bogus'", "'small_init'"]),
        ("model.lora={rank: 2, targets: [x]}", ["model.lora.targets.0", "got='x'", "'mlp.up'"]),
        ("model.lora={rank: 2, targets: []}", ["model.lora.targets;", "got=[]", "want=a list of at least 1"]),
        (
            "parallel.partition=[1, a]",
            ["--set parallel.partition;", "got=[1, 'a']", "one of parameters, time or list of integer > 0"],
        ),
        ("parallel.partition=[1, -1]", ["--set parallel.partition;", "got=[1, -1]"]),
        ("tokenizer.special_ids={eos: [a]}", ["tokenizer.special_ids.eos;", "got=['a']"]),
    ],
)
def test_bad_values(override, parts):
    lines = refusal(overrides=("model.vocab_size=100", override))
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines


def test_values_derived_from_an_invalid_one_are_not_reported():
    assert len(refusal(overrides=("model.vocab_size=100", "model.hidden_size=true"))) == 1


def test_an_invalid_derived_value_is_reported_if_it_is_the_only_problem():
    lines = refusal(overrides=("model.vocab_size=100", "model.hidden_size=4"))
    assert "model.head_dim" in lines[0] and "got=0" in lines[0]


def test_vocab_size_is_required():
    assert "model.vocab_size" in refusal()[0] and "tokenizer.file" in refusal()[0]


def tokenizer_json(vocab: object, added: list[dict]) -> str:
    return json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab}})


def test_vocab_size_comes_from_the_tokenizer(write):
    write("t.json", tokenizer_json({"a": 0, "b": 1}, [{"id": 5, "content": "<|endoftext|>"}]))
    loaded = load([], ["tokenizer.file=t.json"])
    assert loaded.config.model.vocab_size == 6
    assert str(loaded.origins["model.vocab_size"]) == "derived"
    assert load_config(overrides=["tokenizer.file=t.json", "model.vocab_size=9"]).model.vocab_size == 9


@pytest.mark.parametrize("value", ["3", "text", "[1]", "true"])
def test_a_section_that_is_a_value_is_refused_and_not_replaced_by_defaults(write, value):
    write("t.json", tokenizer_json({"a": 0, "b": 1}, []))
    write("a.yml", "tokenizer: {file: t.json}\nmodel: {num_layers: 3}\n")
    (line,) = refusal("a.yml", overrides=(f"model={value}",))
    assert line.startswith("error[2] bad value; where=--set model; got=") and "a section: keys below it" in line


def test_integers_have_bounds_within_which_all_arithmetic_is_exact():
    for override in (
        "train.train_iters=9007199254740993",
        "train.micro_batch_size=2147483648",
        "train.seed=9223372036854775808",
        "model.num_layers=10001",
        "precision.initial_scale_power=128",
        "guard.hang_timeout=1000000001",
    ):
        key, _, value = override.partition("=")
        (line,) = refusal(overrides=("model.vocab_size=100", override))
        assert f"where=--set {key}; got={value}; want=less than" in line, line
    assert load_config(overrides=["model.vocab_size=100", "train.seed=9223372036854775807"]).train.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "t.json:"),
        ("[]", "missing `model`"),
        ('{"model": {}}', "missing `model.vocab`"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": 5}', "`added_tokens` is not a list"),
        ('{"model": {"vocab": {"a": "b"}}}', "not numbers"),
        (None, "No such file"),
    ],
)
def test_an_unreadable_tokenizer_is_reported_once(write, content, part):
    if content is not None:
        write("t.json", content)
    lines = refusal(overrides=("tokenizer.file=t.json",))
    assert len(lines) == 1 and "where=--set tokenizer.file" in lines[0] and part in lines[0], lines
    assert "do=give a `tokenizers` JSON file, or remove tokenizer.file" in lines[0]


def test_config_is_frozen():
    config = load_config(overrides=["model.vocab_size=1"])
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("train.train_iters=1e3", "train.train_iters; got=1000.0; want=integer, such as 1000"),
        ("train.train_iters=1e30", "train.train_iters; got=1e+30; want=integer"),
        ("train.train_iters=1.5", "train.train_iters; got=1.5; want=integer"),
        ("model.num_layers=true", "model.num_layers; got=true; want=integer"),
        ("run.dir=[a]", "run.dir; got=['a']; want=string"),
        ("optimizer.betas=[0.9, a, 1]", "optimizer.betas; got=[0.9, 'a', 1]; want=list of 2 numbers"),
        ("train=[a]", "train; got=['a']; want=a section: keys below it, indented"),
        ("model.rope_scaling=3", "model.rope_scaling; got=3; want=a section: keys below it, indented"),
        ("data.train=3", "data.train; got=3; want=a list"),
        ("data.train=[b, 3]", "data.train.1; got=3; want=a section: keys below it, indented"),
        ("optimizer.lr=.inf", "optimizer.lr; got=inf; want=a finite number"),
        ("checkpoint.save_iters=[1, -1]", "checkpoint.save_iters.1; got=-1; want=greater than or equal to 0"),
        ("model.vocab_size=null", "model.vocab_size; got=null; want=integer"),
    ],
)
def test_the_complete_report_of_a_bad_value(override, rest):
    assert refusal(overrides=("model.vocab_size=100", override)) == [f"error[2] bad value; where=--set {rest}"]


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("data={train: a, model: {a: 1}}", "data.model; got={'a': 1}; do=model is a section: move it to the first "),
        ("data={train: a, model: 1}", "data.model; got=1; do=did you mean model?"),
        ("zzz=1", "zzz; do=neox config explain"),
        ("data.train=[a, {path: a, path_: b}]", "data.train.1.path_; got='b'; do=did you mean data.train.path?"),
        ("run={dir: a, dri: b}", "run.dri; got='b'; do=did you mean run.dir?"),
    ],
)
def test_the_complete_report_of_an_unknown_key(override, rest):
    (line,) = refusal(overrides=("model.vocab_size=100", override))
    assert line.startswith(f"error[2] unknown key; where=--set {rest}")


def test_a_problem_inside_a_list_names_the_line_of_its_item(write):
    write(
        "a.yml",
        MINIMAL + "data:\n  train:\n  - a\n  - path: b\n    weight: -1\n  - path: c\n    x: 2\noptimizer: {lr: x}\n",
    )
    assert [line.split("; ")[1] for line in refusal("a.yml")] == [
        "where=a.yml:6 data.train.1.weight",
        "where=a.yml:8 data.train.2.x",
        "where=a.yml:9 optimizer.lr",
    ]


def test_without_a_model_only_the_vocabulary_size_is_missing(write):
    write("a.yml", "train: {seed: 3}\n")
    expected = (
        "error[2] key is missing; where=model.vocab_size; want=the number of token ids; "
        "do=set model.vocab_size or tokenizer.file"
    )
    assert refusal("a.yml") == [expected]
    assert refusal("a.yml", overrides=("model.num_layers=3",)) == [expected]


def test_a_key_that_is_missing_because_a_file_cannot_be_read_is_not_reported(write):
    write("a.yml", "model: {num_layers: [}\n")
    (line,) = refusal("a.yml")
    assert line.startswith("error[2] not YAML; where=a.yml:1")


def test_null_asks_for_the_derived_value(write):
    write("t.json", tokenizer_json({"a": 0, "b": 1}, []))
    write(
        "a.yml",
        "model: {vocab_size: null, head_dim: null, num_kv_heads: 4, rope_scaling: null}\ntokenizer: {file: t.json}\n",
    )
    loaded = load(["a.yml"])
    names = ("vocab_size", "head_dim", "num_kv_heads", "intermediate_size", "rope_scaling", "norm")
    assert [str(loaded.origins[f"model.{name}"]) for name in names] == [
        "derived",
        "derived",
        "a.yml:1",
        "derived",
        "a.yml:1",
        "default",
    ]
    assert loaded.config.model.vocab_size == 2


def test_a_tokenizer_that_is_no_name_of_a_file_is_reported_as_a_value():
    lines = refusal(overrides=("tokenizer.file=3",))
    assert lines[0].startswith("error[2] ") and "where=--set tokenizer.file; got=3; want=string" in "".join(lines)


def test_the_reason_why_a_tokenizer_cannot_be_read(write):
    (line,) = refusal(overrides=("tokenizer.file=none.json",))
    assert line == (
        "error[2] cannot read the vocabulary size from the tokenizer; where=--set tokenizer.file; "
        "got=none.json: No such file or directory; "
        "do=give a `tokenizers` JSON file, or remove tokenizer.file and set model.vocab_size"
    )


def test_values_of_a_mapping_below_deepspeed_have_its_origin(write):
    write("a.yml", MINIMAL + "deepspeed:\n  aio: {block_size: 1}\n")
    loaded = load(["a.yml"], ["deepspeed.zero_optimization={overlap_comm: true, offload_param: {device: cpu}}"])
    origins = {key: str(origin) for key, origin in loaded.origins.items() if key.startswith("deepspeed.")}
    assert origins == {
        "deepspeed.aio.block_size": "a.yml:3",
        "deepspeed.zero_optimization.overlap_comm": "--set",
        "deepspeed.zero_optimization.offload_param.device": "--set",
    }


def test_rows_of_an_embedding_and_notes_of_gpt_neox_files(write):
    write("a.yml", "num_layers: 2\nhidden_size: 8\nnum_attention_heads: 2\nmax_position_embeddings: 2048\n")
    loaded = load(["a.yml"], embedding_rows=640)
    assert loaded.config.model.vocab_size == 640
    assert "model.vocab_size: 640, the embedding rows of the checkpoint" in loaded.notes
    assert load(["a.yml"]).config.model.vocab_size == 50304
    assert load([], ["model.vocab_size=3"], embedding_rows=640).config.model.vocab_size == 3


def test_a_document_is_named_as_its_caller_names_it():
    assert loads(MINIMAL).model.vocab_size == 100
    for options, name in (({}, "<text>"), ({"source": "lock.yml"}, "lock.yml")):
        with pytest.raises(ConfigError) as caught:
            loads(MINIMAL + "train: {seed: x}\n", **options)
        assert caught.value.where == f"{name}:2 train.seed"


def test_the_values_of_a_mapping_have_its_origin():
    model = "model={vocab_size: 9, head_dim: null, rope_scaling: {type: linear, factor: 2}}"
    loaded = load([], [model, "train={seed: 5}", "checkpoint={async: false}"])
    given = {key for key, origin in loaded.origins.items() if str(origin) == "--set"}
    assert given == {
        "model.vocab_size",
        "model.rope_scaling.type",
        "model.rope_scaling.factor",
        "train.seed",
        "checkpoint.async",
    }
    assert str(loaded.origins["model.head_dim"]) == str(loaded.origins["model.num_kv_heads"]) == "derived"
    assert str(loaded.origins["model.rope_scaling.beta_fast"]) == str(loaded.origins["train.train_iters"]) == "default"


def test_one_key_of_a_mapping_that_set_gave_is_changed():
    scaling = "model.rope_scaling={type: linear, factor: 2}"
    found = load([], ["model.vocab_size=9", scaling, "model.rope_scaling.factor=4"]).config.model.rope_scaling
    assert (found.type, found.factor) == ("linear", 4.0)
    found = load([], ["model.vocab_size=9", "model.rope_scaling.beta_fast=9", scaling]).config.model.rope_scaling
    assert (found.factor, found.beta_fast) == (2.0, 32.0)  # the complete mapping replaces what was set below it
    given = load([], ["model.vocab_size=9", "deepspeed={a: {b: {c: 1}}}", "deepspeed.a.b.d=2"])
    assert given.config.deepspeed == {"a": {"b": {"c": 1, "d": 2}}}
