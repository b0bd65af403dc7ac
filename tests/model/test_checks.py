"""Inputs that a forward pass refuses."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.errors import ConfigError, DataError
from neox.model.checks import check_activation_checkpointing, check_ids, check_positions, with_supported_attention
from neox.model.kv_cache import KVCache
from tests.model.models import build, draw


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.tensor([[1, 97]]), r"token id outside the vocabulary.*got=97; want=0 \.\. 96"),
        (torch.tensor([[-1, 3]]), "got=-1"),
        (torch.zeros(1, 4, dtype=torch.int32), "wrong shape or dtype.*torch.int32"),
        (torch.zeros(4, dtype=torch.int64), "wrong shape or dtype"),
        (torch.zeros(1, 0, dtype=torch.int64), "wrong shape or dtype"),
    ],
)
def test_wrong_tokens(tokens, match):
    with pytest.raises(DataError, match=match):
        build("neox")(tokens)


@pytest.mark.parametrize("target", [97, -1])
def test_wrong_targets(target):
    with pytest.raises(DataError, match=f"target id outside the vocabulary.*got={target}"):
        build("neox")(draw(1, 3), torch.tensor([[1, target, -100]]))


def test_targets_of_another_shape():
    with pytest.raises(DataError, match="targets do not fit"):
        build("neox")(draw(1, 3), draw(1, 4))


@pytest.mark.parametrize("form", ["neox", "gpt2"])
def test_positions_beyond_the_table(form):
    model = build(form)
    model(draw(1, 32))
    with pytest.raises(
        DataError,
        match=r"longer than the model's positions; where=model\.max_position_embeddings; got=position 32; want=0 \.\. "
        r"31",
    ):
        model(draw(1, 33))
    with pytest.raises(DataError, match="got=position 40"):
        model(draw(1, 2), position_ids=torch.tensor([[0, 40]]))
    cache = KVCache(33)
    cache.length = 30
    with pytest.raises(DataError, match="got=position 32"):
        model(draw(1, 3), cache=cache)


@pytest.mark.parametrize("form", ["neox", "gpt2", "alibi"])
def test_the_number_of_positions_in_use(form):
    config = build(form).config
    assert check_positions(config, 0, 5, None) == 5 and check_positions(config, 7, 3, None) == 10
    assert check_positions(config, 0, 32, None) == 32
    assert check_positions(config, 0, 2, torch.tensor([[3, 9], [0, 1]])) == 10
    assert check_positions(config, 4, 2, torch.empty(1, 2, dtype=torch.int64, device="meta")) == 6  # not read


@pytest.mark.parametrize("form", ["neox", "gpt2"])
def test_a_position_below_zero_is_named(form):
    with pytest.raises(DataError, match=r"got=position -2; want=0 \.\. 31"):
        check_positions(build(form).config, 0, 2, torch.tensor([[-2, 40]]))


def test_values_on_another_device_are_read_if_asked_for():
    check_ids("token", torch.empty(1, 2, dtype=torch.int64, device="meta"), 5, True)
    with pytest.raises(DataError, match="got=7"):
        check_ids("token", torch.tensor([[7]]), 7, False)


def test_modes_of_activation_checkpointing():
    for mode in ("none", "selective", "full"):
        check_activation_checkpointing(mode)
    with pytest.raises(ConfigError, match="got=some; want=none, selective or full"):
        check_activation_checkpointing("some")


def test_alibi_has_no_maximum_length():
    assert build("alibi")(draw(1, 50)).shape == (1, 50, 97)


@pytest.mark.parametrize(
    ("backend", "softcap", "dtype", "device", "found"),
    [
        ("hopper", None, torch.bfloat16, "cuda", "hopper"),
        ("hopper", None, torch.float32, "cuda", "auto"),
        ("hopper", None, torch.bfloat16, "cpu", "auto"),
        ("native", None, torch.float32, "cuda", "auto"),
        ("native", None, torch.float16, "cuda", "native"),
        ("native", None, torch.float32, "cpu", "native"),
        ("sdpa", None, torch.float32, "cuda", "sdpa"),
        ("native", 30.0, torch.bfloat16, "cuda", "native"),
        ("auto", 30.0, torch.float32, "cpu", "auto"),
    ],
)
def test_inference_uses_the_kernels_of_the_training_where_they_run(backend, softcap, dtype, device, found):
    config = ModelConfig(vocab_size=97, head_dim=64, attention_backend=backend, attention_softcap=softcap)
    assert with_supported_attention(config, dtype, device).attention_backend == found


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_no_kernels_for_a_softcap_in_fp32_on_a_gpu(backend):
    config = ModelConfig(vocab_size=97, attention_backend=backend, attention_softcap=30.0)
    with pytest.raises(
        ConfigError, match=r"softcap in fp32 .* GPU; where=model.attention_softcap.*got=.*30.0.*want=bf16.*do=--dtype"
    ):
        with_supported_attention(config, torch.float32, "cuda")
