"""The schema: derived values, properties, strict types, immutability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from neox.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ZeroConfig


def model(**values) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 100, **values})


def test_what_follows_from_other_keys_is_filled_in():
    derived = model(hidden_size=96, num_attention_heads=6)
    assert (derived.num_kv_heads, derived.head_dim, derived.intermediate_size) == (6, 16, 384)
    given = model(hidden_size=96, num_attention_heads=6, num_kv_heads=2, head_dim=32, intermediate_size=100)
    assert (given.num_kv_heads, given.head_dim, given.intermediate_size) == (2, 32, 100)


@pytest.mark.parametrize(("head_dim", "share", "channels"), [(64, 0.25, 16), (64, 1.0, 64), (80, 0.25, 20), (96, 0.25, 24), (10, 0.5, 4)])
def test_rotary_dim_is_even_and_rounded_down(head_dim, share, channels):
    assert model(head_dim=head_dim, rotary_pct=share).rotary_dim == channels
    assert model(head_dim=head_dim, rotary_pct=share, position_embedding="learned").rotary_dim == 0


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(100, 1, 128), (128, 1, 128), (129, 1, 256), (50257, 1, 50304), (50257, 2, 50432), (1, 8, 1024)])
def test_padded_vocab_size(vocab, tp, rows):
    assert model(vocab_size=vocab).padded_vocab_size(tp) == rows


@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", False), ("swiglu", True), ("geglu", True), ("reglu", True)])
def test_gated(activation, gated):
    assert model(activation=activation).gated is gated


def test_sources_may_be_bare_prefixes():
    data = DataConfig.model_validate({"train": "a", "validation": ["b", {"path": "c", "weight": 2}]})
    assert [(source.path, source.weight) for source in (*data.train, *data.validation)] == [("a", 1.0), ("b", 1.0), ("c", 2.0)]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ZeroConfig, {"stage": True}),
        (ZeroConfig, {"stage": 1.0}),
        (ZeroConfig, {"stage": "1"}),
        (OptimizerConfig, {"lr": "1e-4"}),
        (OptimizerConfig, {"lr": True}),
        (OptimizerConfig, {"betas": [0.9, True]}),
    ],
)
def test_values_of_another_type_are_refused(section, values):
    with pytest.raises(ValidationError):
        section.model_validate(values)


INF, NAN, TINY = float("inf"), float("nan"), 1e-30
COUNT, FROM_0 = ([1, 10**6], [0, -1]), ([0, 1], [-1])
ABOVE_0 = ([TINY, 1.0], [0.0, -TINY, INF, NAN])
FROM_0_FLOAT = ([0.0, TINY], [-TINY, INF, NAN])
BELOW_1 = ([0.0, 0.999], [-TINY, 1.0, INF, NAN])
SHARE = ([0.0, 1.0], [-TINY, 1.001, NAN])
BOUNDS = {  # key -> values that are accepted, values just outside
    "model": {
        **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "intermediate_size"), COUNT),
        **dict.fromkeys(("max_position_embeddings", "vocab_size", "vocab_multiple", "sliding_window"), COUNT),
        **dict.fromkeys(("norm_eps", "rope_theta", "attention_softcap", "init_std"), ABOVE_0),
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), BELOW_1),
        "rotary_pct": ([TINY, 1.0], [0.0, 1.001, NAN]),
    },
    "model.rope_scaling": {
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), ABOVE_0),
        "original_max_position_embeddings": COUNT,
    },
    "model.lora": {"rank": COUNT, "alpha": ABOVE_0},
    "data": {"seq_length": COUNT, "prefetch": FROM_0},
    "data.train": {"weight": FROM_0_FLOAT},
    "data.fim": dict.fromkeys(("rate", "spm_rate", "fragment_rate"), SHARE),
    "optimizer": {
        **dict.fromkeys(("lr", "eps"), ABOVE_0),
        **dict.fromkeys(("weight_decay", "gradient_clipping"), FROM_0_FLOAT),
        "momentum": BELOW_1,
        "betas": ([(0.0, 0.0), (0.999, 0.999)], [(1.0, 0.9), (0.9, 1.0), (-TINY, 0.9), (0.9, -TINY), (0.9,), (0.9, 0.9, 0.9)]),
        "row_bias_lr_multiplier": ([1, 1024], [0, 1025]),
    },
    "schedule": {"warmup_iters": FROM_0_FLOAT, "decay_iters": COUNT, "cooldown_iters": FROM_0, "min_lr": FROM_0_FLOAT},
    "precision": {"initial_scale_power": FROM_0, "loss_scale_window": COUNT, "min_loss_scale": ABOVE_0},
    "parallel": {**dict.fromkeys(("tensor", "pipeline", "context"), COUNT), "partition": ([(1, 2)], [(0, 1), (1, -1)])},
    "zero": {"stage": ([0, 3], [-1, 4])},
    "train": {
        **dict.fromkeys(("train_iters", "micro_batch_size", "gradient_accumulation", "global_batch_size"), COUNT),
        "seed": FROM_0,
        "dpo_beta": ABOVE_0,
    },
    "checkpoint": {"save_interval": FROM_0, "keep": FROM_0, "save_iters": ([(0, 5)], [(5, -1)])},
    "evaluate": {"interval": FROM_0, "iters": COUNT},
    "logging": {"interval": COUNT},
    "profile": {"start": FROM_0, "steps": COUNT},
    "guard": {
        **dict.fromkeys(("max_skipped", "spike_window"), COUNT),
        "spike_factor": ([1.001], [1.0, INF, NAN]),
        "drift_interval": FROM_0,
        "hang_timeout": FROM_0_FLOAT,
    },
}
NEEDED = {
    "model": {"vocab_size": 8, "num_kv_heads": 1, "head_dim": 4, "intermediate_size": 8},
    "model.rope_scaling": {"type": "linear", "factor": 2.0},
    "model.lora": {"rank": 1},
    "data.train": {"path": "a"},
}
FREE = {"tokenizer.special_ids": {"bos", "eos", "pad", "stop"}}  # ids that a model's files name: whatever they are


def parts(kind: object) -> list[object]:
    """A type and all that it is made of."""
    return [kind, *(inner for part in get_args(kind) for inner in parts(part))]


def sections(section: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a config by its dotted name."""
    yield name, section
    for key, field in section.model_fields.items():
        for kind in parts(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and key not in ("validation", "test"):
                yield from sections(kind, f"{name}.{key}".lstrip("."))


SECTIONS = dict(sections(Config))


def test_every_number_has_its_bounds_in_the_table():
    numbers = {
        name: {key for key, field in section.model_fields.items() if {int, float} & {kind for kind in parts(field.annotation) if isinstance(kind, type)}}
        for name, section in SECTIONS.items()
    }
    assert {name: keys for name, keys in numbers.items() if keys} == {name: set(keys) for name, keys in BOUNDS.items()} | FREE


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in BOUNDS.items() for key in keys])
def test_bounds_of_numbers(name, key):
    accepted, refused = BOUNDS[name][key]
    for value in accepted:
        assert getattr(SECTIONS[name].model_validate({**NEEDED.get(name, {}), key: value}), key) == value
    for value in refused:
        with pytest.raises(ValidationError) as raised:
            SECTIONS[name].model_validate({**NEEDED.get(name, {}), key: value})
        assert {problem["loc"][0] for problem in raised.value.errors()} == {key}


def test_unknown_keys_are_refused_and_nothing_is_assigned():
    with pytest.raises(ValidationError, match="extra"):
        model(hiden_size=3)
    config = Config(model=model())
    with pytest.raises(ValidationError, match="frozen"):
        config.model.hidden_size = 3
