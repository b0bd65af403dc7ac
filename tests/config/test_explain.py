"""show, explain and diff as functions."""

from __future__ import annotations

import pytest

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS
from neox.config.explain import ABSENT, Difference, converted, diff, explain, show
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
    assert explain("lr").meaning.endswith("; see optimizer.lr")
    assert explain("moe_num_experts").meaning.startswith("GPT-NeoX key, not supported: ")
    assert explain("rope_fusion").meaning.startswith("GPT-NeoX key, ignored: the kernels of neox")


def test_the_explanation_of_a_section_lists_the_keys_just_below_it():
    found = explain("model.rope_scaling")
    assert found.type == "mapping (RopeScaling) or null" and found.default == "null"
    assert set(found.keys) == {key for key in known_keys() if key.startswith("model.rope_scaling.")}
    assert "model.rope_scaling.factor" not in explain("model").keys and "model.rope_scaling" in explain("model").keys
    run = explain("run")
    assert (run.key, run.meaning, run.type, run.default, run.keys) == (
        "run",
        "Output folder of a run.",
        "section",
        None,
        ("run.dir",),
    )


def test_deepspeed_lists_what_may_be_set_there():
    found = explain("deepspeed")
    assert set(found.keys) == {f"deepspeed.{key}" for key in set(DEEPSPEED_KEYS) - set(OWNED_KEYS)}
    assert (found.type, found.default) == ("section", None) and "passed through" in found.meaning


@pytest.mark.parametrize(
    ("key", "meaning", "type_", "default", "below"),
    [
        (
            "data.validation.labels",
            "in each item of the list: prefix of a dataset of labels",
            "string or null",
            "null",
            (),
        ),
        ("data.train.path", "in each item of the list: prefix of PREFIX.bin and PREFIX.idx", "string", None, ()),
        (
            "deepspeed.optimizer",
            "set by optimizer; use that key",
            "whatever DeepSpeed accepts",
            None,
            (),
        ),
        (
            "deepspeed.csv_monitor",
            "key of DeepSpeed's own config, passed through unchanged",
            "whatever DeepSpeed accepts",
            None,
            (
                "deepspeed.csv_monitor.enabled",
                "deepspeed.csv_monitor.output_path",
                "deepspeed.csv_monitor.job_name",
            ),
        ),
        (
            "deepspeed.dump_state",
            "key of DeepSpeed's own config, passed through unchanged",
            "whatever DeepSpeed accepts",
            None,
            (),
        ),
        ("deepspeed.bf16", "set by precision.dtype; use that key", "whatever DeepSpeed accepts", None, ()),
        (
            "weight_decay",
            "GPT-NeoX key, sets optimizer.weight_decay: same",
            "as in GPT-NeoX",
            "0.1",
            (),
        ),
        ("num_layers", "GPT-NeoX key, the same as model.num_layers", "as in GPT-NeoX", None, ()),
        (
            "train_epochs",
            "GPT-NeoX key, not supported: set train_iters, the length in steps",
            "as in GPT-NeoX",
            None,
            (),
        ),
        ("log_dir", "GPT-NeoX key, ignored: log.txt is in run.dir", "as in GPT-NeoX", None, ()),
        (
            "use_bias_in_attn_linear",
            "GPT-NeoX key, sets model.qkv_bias, model.attention_out_bias: same value for both",
            "as in GPT-NeoX",
            "true",
            (),
        ),
    ],
)
def test_explanations_of_keys_outside_of_the_schema(key, meaning, type_, default, below):
    found = explain(key)
    assert (found.key, found.type, found.default, found.keys) == (key, type_, default, below)
    assert found.meaning.startswith(meaning) and (key.startswith("data.") or found.meaning == meaning)
    assert (found.value, found.origin) == (None, None)


def test_an_unknown_key_is_refused_with_the_sections():
    with pytest.raises(ConfigError) as caught:
        explain("qqq")
    assert caught.value.line().startswith("error[2] unknown key; got=qqq; do=sections are model, data, tokenizer, ")


def test_a_value_of_a_config_may_be_false_or_null():
    loaded = load([], [*TINY, "logging.tensorboard=false"])
    found = explain("logging.tensorboard", loaded)
    assert (found.value, str(found.origin), found.default) == (False, "--set", "true")
    found = explain("model.sliding_window", loaded)
    assert (found.value, str(found.origin)) == (None, "default")


def test_the_text_of_a_config(write):
    write("a.yml", "num_layers: 2\nhidden_size: 8\nnum_attention_heads: 2\nmax_position_embeddings: 2048\n")
    loaded = load(["a.yml"], ["deepspeed={zero_optimization: {overlap_comm: true}, aio: {use_gds: true}}"])
    lines = show(loaded).splitlines()
    assert loaded.notes and lines[: len(loaded.notes)] == [f"# note: {note}" for note in loaded.notes]
    assert lines[len(loaded.notes)] == "model:"
    text = [line.partition("#")[0].rstrip() for line in lines]
    assert text[-6:] == [
        "  dir: runs/default",
        "deepspeed:",
        "  zero_optimization:",
        "    overlap_comm: true",
        "  aio:",
        "    use_gds: true",
    ]
    assert text.count("model:") == text.count("deepspeed:") == 1
    commented = [line.index("  # ") for line in lines if "  # " in line]
    assert min(commented) <= 60  # comments stand in one column, except after long lines
    assert len(set(commented[:5])) == 1
    native = converted(loaded)
    assert native.splitlines()[: len(loaded.notes)] == [f"# {note}" for note in loaded.notes]
    assert native.splitlines()[len(loaded.notes)] == ""
    assert loads(native) == loaded.config == loads(show(loaded))


def test_the_native_form_keeps_what_repeats_a_default_and_omits_what_is_derived(write):
    write("a.yml", "model: {vocab_size: 9, hidden_size: 96}\ntrain: {seed: 1234}\n")
    assert converted(load(["a.yml"])) == "model:\n  hidden_size: 96\n  vocab_size: 9\n\ntrain:\n  seed: 1234\n"


def test_differences_have_the_origins_of_both_sides(write):
    write("a.yml", "model: {vocab_size: 9}\ntrain:\n  seed: 5\ndeepspeed: {dump_state: false}\n")
    rows = diff(load(["a.yml"]), load([], ["model.vocab_size=9", "run.dir=x"]))
    assert rows == [
        Difference("train.seed", 5, 1234, "a.yml:3", "default"),
        Difference("run.dir", "runs/default", "x", "default", "--set"),
        Difference("deepspeed.dump_state", False, ABSENT, "a.yml:4", ABSENT),
    ]
    swapped = diff(load([], ["model.vocab_size=9", "run.dir=x"]), load(["a.yml"]))
    assert swapped[-1] == Difference("deepspeed.dump_state", ABSENT, False, ABSENT, "a.yml:4")
    assert [row.key for row in swapped] == [row.key for row in rows]


def test_the_native_form_has_the_keys_of_a_mapping_that_an_override_gives():
    loaded = load([], ["model.vocab_size=9", "model.rope_scaling={type: linear, factor: 2}", "train={seed: 5}"])
    assert converted(loaded) == (
        "model:\n  vocab_size: 9\n  rope_scaling:\n    type: linear\n    factor: 2.0\n\ntrain:\n  seed: 5\n"
    )
    assert loads(converted(loaded)) == loaded.config
