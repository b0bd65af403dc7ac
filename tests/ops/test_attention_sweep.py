"""Every mask of attention with every head_dim, dtype and length, against fp64, forward and backward: `make sweep`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import attention
from tests import reference
from tests.ops.attention_cases import CUDA, DTYPES, FLOOR, documents, gradients

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


GENERAL = ("alibi", "softcap", "all")


def backwards(mask: str, d: int) -> tuple[bool, ...]:
    """Values of `deterministic` that take kernels of their own: on a CPU there is one backward, on a GPU two where
    dq may be summed by atomics.
    """
    return (False, True) if CUDA and d <= 128 and mask not in GENERAL else (True,)


CASES = [
    (s, mask, d, deterministic)
    for s in LENGTHS
    for mask in MASKS
    for d in HEAD_DIMS
    for deterministic in backwards(mask, d)
]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "mask", "d", "deterministic"), CASES)
def test_every_mask(s, mask, d, deterministic, dtype):
    """Two query heads share a kv head; a backward in a fixed order gives the same bits twice."""
    options = MASKS[mask](s)
    run = partial(attention, backend="native", **options)
    # seeds far apart: near ones give tensors of some shapes the same numbers, and keys equal to queries leave a row one
    # key and dq a difference of equals
    shapes = {"q": (2, s, 2, d), "k": (2, s, 1, d), "v": (2, s, 1, d)}
    inputs = {
        name: reference.random(*shape, dtype=dtype, seed=10_000 * i) for i, (name, shape) in enumerate(shapes.items())
    }
    # one key: dq and dk are exactly 0, by the difference of two sums of d products
    floor = 1.0 if s == 1 else FLOOR if CUDA else 0.0
    torch.use_deterministic_algorithms(deterministic)
    try:
        reference.check_against(run, partial(reference.attention, **options), inputs, floor=floor)
        if deterministic and s == 129:
            first, again = gradients(run, *inputs.values()), gradients(run, *inputs.values())
            assert all(torch.equal(mine, other) for mine, other in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
