"""Errors of attention, attention_qkv and their backward: one case per check."""

from __future__ import annotations

import pytest
import torch

from neox.ops import attention, attention_qkv
from tests import reference
from tests.ops.attention_cases import CUDA

native = torch.ops.neox


@pytest.mark.skipif(not CUDA, reason="the CPU's kernels take float32 and heads of any size")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.ones(1, 3, 2, 8),
            r"attention: q must be bfloat16 or float16 on a GPU; backend \"sdpa\" supports float32; got Float",
        ),
        (
            torch.ones(1, 3, 2, 257).bfloat16(),
            r"attention: q must have at most 256 channels per head on a GPU; got 257",
        ),
    ],
)
def test_what_the_cuda_kernels_refuse(inputs, message):
    with pytest.raises(ValueError, match=message):
        attention(inputs, inputs, inputs, backend="native")


def turned(*shape: int) -> torch.Tensor:
    return torch.ones(*shape[:2], shape[3], shape[2]).transpose(2, 3)


GOOD = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 5, 2, 8), "v": torch.ones(2, 5, 2, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4, 8, dtype=torch.float64)}, rf"attention: q {reference.FLOAT_RULE}; got Double"),
        ({"q": torch.ones(3, 4, 8)}, r"q must have 4 dimensions; got 3 in shape \[3, 4, 8\]"),
        ({"k": torch.ones(2, 5, 2, 8).bfloat16()}, r"k must have the dtype of q, Float; got BFloat16"),
        ({"k": torch.ones(5, 2, 8)}, r"k must have 4 dimensions; got 3"),
        ({"k": torch.ones(1, 5, 2, 8)}, r"k must have the batch size of q, 2; got \[1, 5, 2, 8\]"),
        ({"k": torch.ones(2, 5, 2, 9)}, r"k must have the head_dim of q, 8; got \[2, 5, 2, 9\]"),
        ({"k": torch.ones(2, 5, 3, 8)}, r"q must have a multiple of k's 3 heads; got 4"),
        ({"k": torch.ones(2, 5, 0, 8)}, r"q must have a multiple of k's 0 heads; got 4"),
        ({"v": torch.ones(2, 5, 2, 8).bfloat16()}, r"v must have the dtype of k, Float; got BFloat16"),
        ({"v": torch.ones(2, 6, 2, 8)}, r"v must have the shape of k, \[2, 5, 2, 8\]; got \[2, 6, 2, 8\]"),
        ({"q": turned(2, 3, 4, 8)}, r"q must have a contiguous last dimension; got stride 4"),
        ({"k": turned(2, 5, 2, 8)}, r"k must have a contiguous last dimension; got stride 2"),
        ({"v": turned(2, 5, 2, 8)}, r"v must have a contiguous last dimension; got stride 2"),
        (
            {name: tensor[..., :0] for name, tensor in GOOD.items()} | {"scale": 1.0},
            r"q must have at least one channel; got \[2, 3, 4, 0\]",
        ),
        ({"scale": float("nan")}, r"scale must be finite; got nan"),
        ({"window": 0}, r"window must be at least 1; got 0"),
        ({"window": 3, "causal": False}, r"window needs causal=True; got 3"),
        ({"window": 3, "causal": False, "backend": "sdpa"}, r"window needs causal=True; got 3"),
        ({"softcap": 0.0}, r"softcap must be positive; got 0.0"),
        ({"softcap": float("inf")}, r"softcap must be positive and finite; got inf"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
        ({"segment_ids": torch.zeros(2, 5)}, r"segment_ids must be Int \(int32\); got Float"),
        (
            {"segment_ids": torch.zeros(2, 3).int()},
            r"segment_ids must have one id per key, shape \[2, 5\]; got \[2, 3\]",
        ),
        (
            {"k": GOOD["k"][:, :2], "v": GOOD["v"][:, :2], "segment_ids": torch.zeros(2, 2).int()},
            r"segment_ids needs at least as many keys as queries, 3; got 2",
        ),
        (
            {"segment_ids": torch.zeros(1, 5).int()},
            r"segment_ids must have one id per key, shape \[2, 5\]; got \[1, 5\]",
        ),
        ({"segment_ids": torch.zeros(5).int()}, r"segment_ids must have one id per key, shape \[2, 5\]; got \[5\]"),
        ({"alibi_slopes": torch.ones(8)}, r"alibi_slopes must have shape \[4\]; got \[8\]"),
        ({"alibi_slopes": torch.ones(1, 4)}, r"alibi_slopes must have shape \[4\]; got \[1, 4\]"),
        ({"alibi_slopes": torch.ones(4).double()}, r"alibi_slopes must be Float; got Double"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes must have shape \[4\]; got \[2\]"),
        ({"alibi_slopes": torch.ones(4).requires_grad_()}, r"alibi_slopes has no gradient"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**({"backend": "native"} | GOOD | change))


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.ones(2, 3, 2, 4, 8).double(), rf"qkv {reference.FLOAT_RULE}; got Double"),
        (torch.ones(2, 3, 2, 4), r"qkv must have 5 dimensions; got 4"),
        (
            torch.ones(2, 3, 2, 2, 8),
            r"qkv must hold at least one query, one key and one value per group in dimension 3; got \[2, 3, 2, 2, 8\]",
        ),
        (torch.ones(2, 3, 2, 8, 4).transpose(3, 4), r"qkv must have a contiguous last dimension; got stride 4"),
    ],
)
def test_packed_errors(qkv, message):
    with pytest.raises(ValueError, match=message):
        attention_qkv(qkv, backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.ones(2, 3, 4, 8).bfloat16()}, r"dout must have the dtype of q, Float; got BFloat16"),
        ({"dout": torch.ones(2, 3, 2, 8)}, r"dout must have the shape of the output; got \[2, 3, 2, 8\]"),
        ({"out": torch.ones(2, 3, 4, 8).bfloat16()}, r"out must have the dtype of q, Float; got BFloat16"),
        ({"out": torch.ones(2, 3, 4, 7)}, r"out must be the output of the forward; got \[2, 3, 4, 7\]"),
        ({"lse": torch.ones(2, 3, 4)}, r"lse must be the lse of the forward; got \[2, 3, 4\]"),
        ({"lse": torch.ones(2, 4, 3).double()}, r"lse must be the lse of the forward; got \[2, 4, 3\]"),
        ({"dropout_p": 0.1}, r"seed is needed with dropout; got none"),
        ({"dropout_p": 1.0, "seed": torch.zeros(2).long()}, r"dropout_p must be in \[0, 1\); got 1"),
        ({"window": 3, "causal": False}, r"window needs causal=True; got 3"),
        ({"softcap": float("inf")}, r"softcap must be positive and finite; got inf"),
        ({"seed": torch.zeros(2)}, r"seed must be Long; got Float"),
        ({"seed": torch.zeros(3).long()}, r"seed must have shape \[2\]; got \[3\]"),
        ({"window": -1}, r"window must be at least 1; got -1"),
    ],
)
def test_backward_errors(change, message):
    inputs = {
        "dout": torch.ones(2, 3, 4, 8),
        **GOOD,
        "out": torch.ones(2, 3, 4, 8),
        "lse": torch.ones(2, 4, 3),
        "segment_ids": None,
        "alibi_slopes": None,
    }
    inputs |= {
        "seed": None,
        "causal": True,
        "scale": 1.0,
        "window": 0,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "deterministic": False,
    }
    with pytest.raises(ValueError, match=message):
        native.attention_backward(**(inputs | change))
