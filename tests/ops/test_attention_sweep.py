"""Every mask of attention with every head_dim, dtype and length, against fp64, forward and backward: `make sweep`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import attention
from tests import reference
from tests.ops.test_attention import DTYPES, documents, qkv_of

LENGTHS = (1, 17, 64, 129, 300, 819)
HEAD_DIMS = (32, 64, 80, 96, 128, 160, 192, 256)
SLOPES = torch.tensor([0.5, 0.1])
SOME = {"window": 40, "alibi_slopes": SLOPES, "softcap": 3.0, "scale": 0.2}

# name: options for a length of s
MASKS = {
    "causal": lambda s: {},
    "full": lambda s: {"causal": False},
    "window": lambda s: {"window": max(1, s // 3)},
    "documents": lambda s: {"segment_ids": documents(2, s, s // 4, s // 3)},
    "documents full": lambda s: {"causal": False, "segment_ids": documents(2, s, s // 2)},
    "window of documents": lambda s: {"window": max(1, s // 3), "segment_ids": documents(2, s, s // 2)},
    "alibi": lambda s: {"alibi_slopes": SLOPES},
    "softcap": lambda s: {"softcap": 2.0},
    "all": lambda s: SOME | {"segment_ids": documents(2, s, s // 2)},
}


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("s", LENGTHS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_mask(s, mask, d, dtype, deterministic):
    """Two query heads share a kv head; the backward with sums in any order, and in a fixed one."""
    options = MASKS[mask](s)
    torch.use_deterministic_algorithms(deterministic)
    try:
        reference.check_against(partial(attention, backend="native", **options), partial(reference.attention, **options), qkv_of(s, s, 2, 1, d, dtype))
    finally:
        torch.use_deterministic_algorithms(False)
