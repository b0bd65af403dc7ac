"""The model section: derived keys, properties, immutability."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from neox.config.schema import Config, LoraConfig, ModelConfig


def model(**values) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 100, **values})


def test_derived_keys_are_filled_in():
    derived = model(hidden_size=96, num_attention_heads=6)
    assert (derived.num_kv_heads, derived.head_dim, derived.intermediate_size) == (6, 16, 384)
    given = model(hidden_size=96, num_attention_heads=6, num_kv_heads=2, head_dim=32, intermediate_size=100)
    assert (given.num_kv_heads, given.head_dim, given.intermediate_size) == (2, 32, 100)


@pytest.mark.parametrize(
    ("head_dim", "share", "channels"), [(64, 0.25, 16), (64, 1.0, 64), (80, 0.25, 20), (96, 0.25, 24), (10, 0.5, 4)]
)
def test_rotary_dim_is_even_and_rounded_down(head_dim, share, channels):
    assert model(head_dim=head_dim, rotary_pct=share).rotary_dim == channels
    assert model(head_dim=head_dim, rotary_pct=share, position_embedding="learned").rotary_dim == 0


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"),
    [(100, 1, 128), (128, 1, 128), (129, 1, 256), (50257, 1, 50304), (50257, 2, 50432), (1, 8, 1024)],
)
def test_padded_vocab_size(vocab, tp, rows):
    assert model(vocab_size=vocab).padded_vocab_size(tp) == rows


@pytest.mark.parametrize(
    ("activation", "gated"), [("gelu", False), ("silu", False), ("swiglu", True), ("geglu", True), ("reglu", True)]
)
def test_gated(activation, gated):
    assert model(activation=activation).gated is gated


def test_unknown_keys_and_assignments_are_refused():
    with pytest.raises(ValidationError, match="extra"):
        model(hiden_size=3)
    config = Config(model=model())
    with pytest.raises(ValidationError, match="frozen"):
        config.model.hidden_size = 3


def test_a_tensor_parallel_group_must_divide_heads_and_mlp():
    uneven = model(hidden_size=96, num_attention_heads=6, num_kv_heads=2, intermediate_size=100)
    assert uneven.undivided(1) == uneven.undivided(2) == []
    assert uneven.undivided(3) == ["num_kv_heads", "intermediate_size"]
    assert uneven.undivided(4) == ["num_attention_heads", "num_kv_heads"]


def test_lora_adapts_every_matrix_of_a_block_by_default():
    assert LoraConfig(rank=2).targets == ("attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down")


@pytest.mark.parametrize(
    ("given", "derived"),  # key/value heads, channels, width of the MLP
    [
        ({}, (12, 64, 3072)),
        ({"num_attention_heads": 8}, (8, 96, 3072)),
        ({"hidden_size": 100}, (12, 8, 400)),  # rounded down; a rule reports it
        ({"num_kv_heads": 1, "head_dim": None, "intermediate_size": None}, (1, 64, 3072)),
        ({"num_kv_heads": None, "head_dim": 5}, (12, 5, 3072)),
    ],
)
def test_what_follows_from_the_width_and_the_heads(given, derived):
    found = model(**given)
    assert (found.num_kv_heads, found.head_dim, found.intermediate_size) == derived


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"num_attention_heads": 0}, {"num_attention_heads", "num_kv_heads", "head_dim"}),
        ({"num_attention_heads": -1}, {"num_attention_heads", "num_kv_heads", "head_dim"}),
        ({"num_attention_heads": "8"}, {"num_attention_heads", "num_kv_heads", "head_dim"}),
        ({"hidden_size": 1.5}, {"hidden_size", "head_dim", "intermediate_size"}),
        ({"hidden_size": None}, {"hidden_size", "head_dim", "intermediate_size"}),
    ],
)
def test_wrong_values_are_reported_and_not_computed_with(given, wrong):
    with pytest.raises(ValidationError) as caught:
        model(**given)
    assert {error["loc"][0] for error in caught.value.errors()} == wrong


def test_the_given_mapping_is_not_changed():
    content = {"vocab_size": 8}
    ModelConfig.model_validate(content)
    assert content == {"vocab_size": 8}
    with pytest.raises(ValidationError, match="dictionary"):
        ModelConfig.model_validate([1])


@pytest.mark.parametrize(
    ("tied", "output", "is_tied"),
    [(True, "tokens", True), (False, "tokens", False), (True, "score", False), (False, "score", False)],
)
def test_the_head_of_a_reward_model_is_not_tied(tied, output, is_tied):
    assert model(tie_embeddings=tied, output=output).head_is_tied is is_tied


@pytest.mark.parametrize(
    ("vocab", "multiple", "tp", "rows"), [(100, 1, 1, 100), (100, 1, 3, 102), (100, 10, 1, 100), (101, 10, 2, 120)]
)
def test_rows_are_a_multiple_for_every_member(vocab, multiple, tp, rows):
    assert model(vocab_size=vocab, vocab_multiple=multiple).padded_vocab_size(tp) == rows
