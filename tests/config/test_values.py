"""Round trip of a config through YAML, and the keys of the schema."""

from __future__ import annotations

import pytest
import yaml

from neox.config.load import load_config, loads
from neox.config.schema import Config, DataSource, ModelConfig, RopeScaling
from neox.config.values import DERIVED, dump, flatten, inline, known_keys, nested_section, suggestions


def test_the_lock_file_loads_to_an_equal_config(write):
    write(
        "a.yml",
        "model: {vocab_size: 100, rope_scaling: {type: yarn, factor: 3.5}}\ndata: {train: [{path: 'no', weight: 0.1}, "
        "'1e-4', '010', '', 'a: b # c']}\n"
        'run: {dir: "null"}\noptimizer: {lr: 1e-5, eps: 1.2345678901234567e-30}\n'
        'tokenizer: {eod_token: "\\u2028<|x|>\\t"}\n'
        "deepspeed: {zero_optimization: {overlap_comm: true}, wandb: {project: 'yes'}}\n",
    )
    config = load_config("a.yml")
    text = dump(config)
    assert loads(text) == config
    assert dump(loads(text)) == text
    assert config.data.train[1].path == "1e-4"


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


@pytest.mark.parametrize("value", ["no", "1e-4", "", "a: b # c", ["x", {"path": "y"}], None, 1e-5, True, "x" * 300])
def test_inline_is_one_line_that_reads_back(value):
    text = inline(value)
    assert "\n" not in text
    assert loads(f"model: {{vocab_size: 1}}\ndeepspeed: {{key: {text}}}").deepspeed == {"key": value}


def test_the_keyword_async_is_a_key_like_any_other():
    config = load_config(overrides=["model.vocab_size=1", "checkpoint.async=false"])
    assert config.checkpoint.in_background is False
    assert dict(flatten(config))["checkpoint.async"] is False
    assert "checkpoint.async" in known_keys() and "checkpoint.in_background" not in known_keys()
    assert loads(dump(config)) == config


def test_leaves_are_listed_in_the_order_of_the_schema():
    config = load_config(
        overrides=[
            "model.vocab_size=1",
            "data.train=[a, {path: b, labels: c}]",
            "deepspeed={aio: {}, zero_optimization: {offload_param: {device: cpu}}, dump_state: true}",
        ]
    )
    leaves = flatten(config)
    keys = [key for key, _ in leaves]
    sections = [key.partition(".")[0] for key in keys]
    assert list(dict.fromkeys(sections)) == list(Config.attributes())
    assert [key for key in known_keys() if key in keys] == [key for key in keys if key in known_keys()]
    values = dict(leaves)
    assert len(values) == len(leaves)
    assert values["data.train"] == [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0, "labels": "c"}]
    assert {key: value for key, value in values.items() if key.startswith("deepspeed")} == {
        "deepspeed.aio": {},
        "deepspeed.zero_optimization.offload_param.device": "cpu",
        "deepspeed.dump_state": True,
    }
    assert (values["model.rope_scaling"], values["optimizer.betas"]) == (None, [0.9, 0.95])
    assert not any(key.startswith("deepspeed") for key, _ in flatten(load_config(overrides=["model.vocab_size=1"])))


def test_sections_that_are_given_are_flattened():
    config = load_config(
        overrides=["model.vocab_size=1", "logging.wandb={}", "model.lora={rank: 2, targets: [mlp.up]}"]
    )
    values = dict(flatten(config))
    assert "logging.wandb" not in values and values["logging.wandb.project"] == "neox"
    assert (values["model.lora.rank"], values["model.lora.targets"], values["logging.comet"]) == (2, ["mlp.up"], None)


def test_what_is_derived_is_known():
    assert DERIVED == ("model.num_kv_heads", "model.head_dim", "model.intermediate_size", "model.vocab_size")


@pytest.mark.parametrize(
    ("annotation", "section"),
    [
        (ModelConfig, ModelConfig),
        (RopeScaling | None, RopeScaling),
        (tuple[DataSource, ...], None),
        (int, None),
        (int | None, None),
        (dict[str, object], None),
    ],
)
def test_the_section_in_an_annotation(annotation, section):
    assert nested_section(annotation) is section


def test_suggestions_have_the_keys_of_sources_and_of_deepspeed():
    found = suggestions()
    assert {"model.num_layers", "data.test.weight", "data.validation.rejected_labels", "deepspeed.aio"} <= set(found)
    assert {"model.rope_scaling.factor", "data.train.path", "deepspeed.optimizer"} <= set(found)
    assert len(found) == len(set(found))


def test_a_lock_file_keeps_order_text_and_lists():
    config = load_config(overrides=["model.vocab_size=1", "run.dir=" + "ü " * 100, "data.train=[b, a]"])
    text = dump(config)
    assert list(yaml.safe_load(text)) == list(Config.attributes())
    assert "ü ü" in text and "- path: b\n    weight: 1.0\n  - path: a\n" in text
    assert "labels" not in text  # of a source without labels
    assert "rope_scaling: null" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (1e-5, "1.0e-05"),
        ("true", "'true'"),
        ("0o17", "'0o17'"),
        ("0x1F", "'0x1F'"),
        ("~", "'~'"),
        ("1e5", "'1e5'"),
        ("yes", "yes"),
        ("a b", "a b"),
        (["b", "a"], "[b, a]"),
        ({"b": 1, "a": [2]}, "{b: 1, a: [2]}"),
        ("ü", "ü"),
        (["x" * 200, "y" * 200], f"[{'x' * 200}, {'y' * 200}]"),
    ],
)
def test_values_on_one_line(value, text):
    assert inline(value) == text
    assert loads(f"model: {{vocab_size: 1}}\ndeepspeed: {{key: {text}}}").deepspeed == {"key": value}
