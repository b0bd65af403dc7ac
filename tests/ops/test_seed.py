"""Seeds of the operators with dropout."""

from __future__ import annotations

import torch

from neox.ops._seed import draw_seed


def test_follows_torchs_generator():
    torch.manual_seed(5)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(5)
    assert torch.equal(draw_seed(), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)
