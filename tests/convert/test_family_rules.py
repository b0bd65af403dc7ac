"""Conversion rules of single tensors: every rule is inverted by its join."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.family_rules import contiguous_qkv, join_qkv, same, separate_qkv, split_qkv, transposed


def config(**options) -> ModelConfig:
    return ModelConfig(**({"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 50} | options))


def test_qkv_rows_are_grouped_by_key_head():
    model = config(num_kv_heads=2, head_dim=4)
    packed = torch.arange(2 * 5 * 4)
    q, k, v = split_qkv(packed, model)
    assert q.view(6, 4)[:, 0].tolist() == [0, 4, 8, 20, 24, 28]
    assert k.view(2, 4)[:, 0].tolist() == [12, 32]
    assert v.view(2, 4)[:, 0].tolist() == [16, 36]
    assert torch.equal(join_qkv(q, k, v, model), packed)


@pytest.mark.parametrize("transpose", [False, True])
def test_one_tensor_has_all_queries_then_all_keys_then_all_values(transpose):
    model = config(num_kv_heads=2, head_dim=4)
    packed = torch.arange(2 * 5 * 4 * 3).view(40, 3)
    rule = contiguous_qkv("a", model, transpose=transpose)
    (stored,) = rule.split(packed)
    rows = stored.t() if transpose else stored
    assert torch.equal(rows, torch.cat(split_qkv(packed, model)))
    assert torch.equal(rule.join(stored), packed)
    bias = packed[:, 0]
    assert torch.equal(contiguous_qkv("a", model, transpose=False).split(bias)[0], rows[:, 0])
    names = ("p.q_proj.bias", "p.k_proj.bias", "p.v_proj.bias")
    assert separate_qkv("p", "bias", model).names == names


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_join_inverts_split(groups):
    model = config(num_kv_heads=groups)
    weight = torch.randn((6 + 2 * groups) * 8, 48)
    rules = [same("a"), transposed("a"), separate_qkv("p", "weight", model), contiguous_qkv("a", model, transpose=True)]
    for rule in rules:
        parts = rule.split(weight)
        assert len(parts) == len(rule.names)
        assert torch.equal(rule.join(*parts), weight)
    assert rules[1].split(weight)[0].shape == rules[3].split(weight)[0].shape == weight.t().shape
