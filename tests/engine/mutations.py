"""Injected errors in reductions, each one that is easily forgotten; the comparison of layouts must detect every one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

MUTATIONS = {
    "column input gradient not summed over the tensor group": ("neox.parallel.linear.start_all_reduce", "unreduced"),
    "norm gradients not summed under sequence parallelism": ("neox.parallel.gradients._Sum.__call__", "same_gradient"),
    "tied embedding gradient not added": ("neox.engine.pipeline.TiedExchange.add_gradient", "same_gradient"),
    "tied embedding not published": ("neox.engine.pipeline.TiedExchange.publish", "nothing"),
    "norm of one stage only": ("neox.engine.mpu.MeshMPU.get_model_parallel_group", "no_group"),
    "loss weighted by micro-batches": ("neox.engine.objective.TokenLoss.count", "one"),
}


def unreduced(x, group):
    from neox.parallel.collectives import Pending

    return Pending(None, x, None)


def same_gradient(self, gradient):
    if hasattr(self, "last_backward") and self.last_backward:  # receive the message, ignore its content
        import torch

        from neox.parallel.p2p import send_recv

        send_recv(self.mesh, [], [(torch.empty(gradient.shape), self.mesh.pp - 1)])
    return gradient


def nothing(self):
    return None


def no_group(self):
    return None


def one(self, batch):
    return 1


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Inject the error of this name while the context is open; none for an empty name."""
    if not name:
        yield
        return
    target, replacement = MUTATIONS[name]
    with mock.patch(target, globals()[replacement]):
        yield
