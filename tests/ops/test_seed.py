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


def test_is_on_the_cpu_whatever_the_default_device_and_fills_63_bits():
    with torch.device("meta"):
        seed = draw_seed()
    assert seed.device.type == "cpu"
    torch.manual_seed(0)
    drawn = torch.cat([draw_seed() for _ in range(64)])
    assert int(drawn.min()) >= 0 and int(drawn.max()) > 2**62
