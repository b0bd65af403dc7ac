"""Round trip of a config through YAML, and the keys of the schema."""

from __future__ import annotations

import pytest

from neox.config.load import load_config, loads
from neox.config.schema import Config
from neox.config.values import dump, flatten, inline, known_keys


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
