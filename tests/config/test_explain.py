"""show, explain and diff as functions."""

from __future__ import annotations

import pytest

from neox.config.explain import converted, diff, explain, show
from neox.config.load import load, loads
from neox.config.values import known_keys
from neox.errors import ConfigError

TINY = ["model.vocab_size=100", "data.train=[a, {path: b, weight: 2}]"]


def test_show_is_yaml_that_loads_as_the_same_config():
    loaded = load(
        [],
        [
            *TINY,
            "model.rope_scaling={type: linear, factor: 2}",
            "run.dir='1e-4'",
            "deepspeed.zero_optimization.overlap_comm=true",
        ],
    )
    assert loads(show(loaded)) == loaded.config


def test_show_names_the_origin_of_values_that_are_not_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text("model:\n  vocab_size: 100\n")
    lines = show(load(["a.yml"], ["train.seed=7"])).splitlines()
    named = {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines}
    assert (named["vocab_size"], named["seed"], named["head_dim"], named["norm_eps"]) == (
        "a.yml:2",
        "--set",
        "derived",
        "",
    )


def test_every_key_can_be_explained():
    for key in known_keys():
        found = explain(key)
        assert found.meaning and found.type, key
    assert set(explain("model").keys) >= {"model.num_layers", "model.rotary_pct"}


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("model.rotary_pct", "number > 0, <= 1", "1.0"),
        ("zero.stage", "integer >= 0, <= 3", "1"),
        ("model.norm", "one of layernorm, rmsnorm", "layernorm"),
        ("optimizer.betas", "list of 2 numbers", "[0.9, 0.95]"),
        ("model.sliding_window", "integer > 0 or null", "null"),
        ("data.document-mask", "boolean", "false"),
        ("model.vocab_size", "integer > 0", "derived (see the meaning)"),
        ("model.rope_scaling.factor", "number > 0", "required"),
    ],
)
def test_type_and_default(key, type_, default):
    found = explain(key)
    assert (found.type, found.default) == (type_, default)


def test_explain_with_a_config_gives_value_origin_and_history(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text("model: {vocab_size: 100}\ntrain:\n  seed: 3\n")
    found = explain("train.seed", load(["a.yml"], ["train.seed=7"]))
    assert (found.value, str(found.origin)) == (7, "--set")
    assert [(str(origin), value) for origin, value in found.origin.overridden] == [("a.yml:3", 3)]


@pytest.mark.parametrize(
    ("key", "close"),
    [("train.lr", "optimizer.lr"), ("model.num_layer", "model.num_layers"), ("zzz", "sections are model, data")],
)
def test_an_unknown_key_names_the_most_similar(key, close):
    with pytest.raises(ConfigError, match=close):
        explain(key)


def test_keys_of_a_source_and_of_deepspeed():
    assert (explain("data.train.weight").type, explain("data.train.weight").default) == ("number >= 0", "1.0")
    assert explain("data.test.path").default is None
    assert "deepspeed.zero_optimization.overlap_comm" in explain("deepspeed.zero_optimization").keys
    assert "precision.dtype" in explain("deepspeed.fp16").meaning


def test_diff_lists_differing_keys_in_order():
    left, right = (
        load([], [*TINY, "train.seed=1", "deepspeed.wall_clock_breakdown=true"]),
        load([], [*TINY, "train.seed=2", "model.num_layers=3"]),
    )
    rows = [(row.key, row.left, row.right) for row in diff(left, right)]
    assert rows == [
        ("model.num_layers", 12, 3),
        ("train.seed", 1, 2),
        ("deepspeed.wall_clock_breakdown", True, "(absent)"),
    ]
    assert diff(left, left) == []


def test_the_native_form_loads_to_the_same_config_and_holds_no_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load([], [*TINY, "optimizer.betas=[0.8, 0.9]", "deepspeed.zero_optimization.overlap_comm=true"])
    text = converted(loaded)
    assert loads(text) == loaded.config
    assert "norm_eps" not in text and "head_dim" not in text


def test_a_key_of_gpt_neox_is_explained():
    assert "model.parallel_residual" in explain("gpt-j-residual").meaning
    assert "tanh" in explain("bias_gelu_fusion").meaning and explain("bias_gelu_fusion").default == "false"
    assert explain("lr").meaning.endswith("; neox has optimizer.lr")
    assert explain("moe_num_experts").type.startswith("unsupported")
    assert explain("rope_fusion").meaning.startswith("key of GPT-NeoX: ignored: the kernels of neox")
