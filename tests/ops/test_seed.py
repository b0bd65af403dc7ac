"""Seeds of the operators with dropout."""

from __future__ import annotations

import pytest
import torch

from neox.ops import attention, attention_qkv, bias_dropout_add
from neox.ops._seed import draw_seed
from tests import reference


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


@pytest.mark.parametrize(
    ("run", "draws"),
    [
        (lambda x: bias_dropout_add(x[0, 0], None, x[0, 0], 0.5, False), False),
        (lambda x: bias_dropout_add(x[0, 0], None, x[0, 0], 0.0, True), False),
        (lambda x: bias_dropout_add(x[0, 0], None, x[0, 0], 0.5, True), True),
        (lambda x: attention(x, x, x, backend="native"), False),
        (lambda x: attention(x, x, x, dropout_p=0.5, backend="native"), True),
        (lambda x: attention_qkv(x[:, :, None], backend="native"), False),
        (lambda x: attention_qkv(x[:, :, None], dropout_p=0.5, backend="native"), True),
    ],
)
def test_a_seed_is_drawn_for_dropout_only(run, draws):
    """Else a run would have other masks with and without an operator that drops nothing."""
    x = torch.rand(1, 3, 3, 8).to(reference.dtypes("attention")[0])
    before = torch.get_rng_state()
    run(x)
    assert torch.equal(torch.get_rng_state(), before) != draws
