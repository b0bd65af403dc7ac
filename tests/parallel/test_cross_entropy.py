from __future__ import annotations

import pytest
import torch

from neox.parallel.cross_entropy import vocab_parallel_cross_entropy
from neox.parallel.mesh import Mesh


def test_loss_and_gradient_ignore_padding_and_masked_tokens():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 16, generator=generator, requires_grad=True)
    targets = torch.randint(13, (2, 7), generator=generator)
    targets[1, 2] = -100
    reference = hidden.detach().clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(
        reference[..., :13].flatten(0, 1).double(), targets.flatten(), reduction="none"
    )
    want.sum().backward()
    loss = vocab_parallel_cross_entropy(hidden * 1.0, targets, Mesh.single(), vocab_size=13)
    loss.sum().backward()
    assert (loss.dtype, loss.shape) == (torch.float32, (14,))
    assert torch.allclose(loss, want.float(), atol=1e-5)
    assert loss[9] == 0
    assert torch.allclose(hidden.grad, reference.grad, atol=1e-6)
    assert torch.equal(hidden.grad[..., 13:], torch.zeros(2, 7, 3))


@pytest.mark.parametrize("expected", [None, 0.5, 0.25])
def test_the_logits_are_overwritten_by_their_gradient(expected):
    """Their memory is the largest of a step. With the gradient that every loss will get, the forward does it."""
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([[1, 2, -100], [12, 0, 5]])
    want = torch.nn.functional.cross_entropy(hidden[..., :13].flatten(0, 1), targets.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(0.5 * want, hidden)
    logits = hidden * 1.0
    loss = vocab_parallel_cross_entropy(logits, targets, Mesh.single(), vocab_size=13, expected_dloss=expected)
    scale = None if expected is None else 0.5 / expected
    if scale is None:
        assert torch.equal(logits.detach(), hidden)
    else:
        torch.testing.assert_close(logits.detach() * scale, gradient, rtol=1e-5, atol=1e-6)
    (0.5 * loss.sum()).backward()
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.detach(), gradient, rtol=1e-5, atol=1e-6)
