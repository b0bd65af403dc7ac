"""One-forward-one-backward over pipeline stages (PipeDream-flush, arXiv 2006.09503; schedule of arXiv 2104.04473, figure 4).

Why not DeepSpeed's PipelineEngine: it averages the losses of micro-batches where ours are weighted by tokens, it steps before anyone has
looked whether the loss is finite, it owns the data iterator and evaluation, and it reduces tied weights as replicas that clipping and
checkpoints would see twice. Here every stage is an ordinary DeepSpeed engine over its own layers (ZeRO 0 and 1, fp32 accumulation,
loss scaling as without a pipeline), and this file is the order in which it runs. One stage is the plain loop over micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neox.parallel.embedding import TiedCopy
from neox.parallel.mesh import Mesh
from neox.parallel.p2p import send_recv


class _Handover(torch.autograd.Function):
    """A scalar whose backward gives a tensor the gradient that the next stage sent: DeepSpeed's backward() starts from scalars only.

    The incoming gradient is not read: loss scale and token weights are in what was sent.
    """

    @staticmethod
    def forward(ctx, output, gradient):
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


class OneForwardOneBackward:
    """Runs the micro-batches of a step on one stage.

    Args:
        mesh: place of this process.
        forward: (batch, received) -> output: what the next stage receives, or the loss on the last.
        backward: (output, gradient of the output or None on the last stage, whether it is the last micro-batch) -> None.
        shape: batch -> shape of what stages receive.
        dtype: of what stages receive.
    """

    def __init__(self, mesh: Mesh, forward: Callable, backward: Callable, shape: Callable[[Any], tuple[int, ...]], dtype: torch.dtype):
        self.mesh = mesh
        self.forward_step = forward
        self.backward_step = backward
        self.shape = shape
        self.dtype = dtype

    def train(self, batches: Sequence[Any]) -> torch.Tensor:
        """Forward and backward of every micro-batch; returns the sum of the losses (zero on a stage that is not the last)."""
        mesh, count = self.mesh, len(batches)
        ahead = min(mesh.pp - mesh.pp_rank - 1, count)
        loss = torch.zeros((), device=mesh.device)
        flying: deque[tuple[torch.Tensor | None, torch.Tensor, tuple[int, ...]]] = deque()
        done = 0

        def forward(batch: Any, received: torch.Tensor | None) -> torch.Tensor:
            output = self.forward_step(batch, received)
            flying.append((received, output, self.shape(batch)))
            if mesh.last_stage:
                loss.add_(output.detach())
            return output

        def backward(gradient: torch.Tensor | None) -> torch.Tensor | None:
            nonlocal done
            received, output, _ = flying.popleft()
            done += 1
            self.backward_step(output, gradient, done == count)
            return None if received is None else received.grad

        for batch in batches[:ahead]:
            received, _ = self.exchange(batch=batch)
            self.exchange(output=forward(batch, received))
        received = self.exchange(batch=batches[ahead])[0] if ahead < count else None
        for i in range(ahead, count):
            output = forward(batches[i], received)
            _, gradient = self.exchange(output=output, awaiting=flying[0][2])
            dx = backward(gradient)
            received, _ = self.exchange(dx=dx, batch=batches[i + 1] if i + 1 < count else None)
        while flying:
            _, gradient = self.exchange(awaiting=flying[0][2])
            self.exchange(dx=backward(gradient))
        return loss

    def exchange(
        self, *, output: torch.Tensor | None = None, dx: torch.Tensor | None = None, batch: Any = None, awaiting: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One exchange with the neighbours.

        Args:
            output: for the next stage.
            dx: gradient for the stage before.
            batch: whose input is awaited from the stage before.
            awaiting: shape of the gradient awaited from the next stage.

        Returns:
            the input of `batch`, and the gradient; None for what is not awaited or does not exist at this end of the pipeline.
        """
        mesh, stage = self.mesh, self.mesh.pp_rank
        received = gradient = None
        outgoing, incoming = [], []
        if output is not None and not mesh.last_stage:
            outgoing.append((output, stage + 1))
        if dx is not None and not mesh.first_stage:
            outgoing.append((dx, stage - 1))
        if batch is not None and not mesh.first_stage:
            received = torch.empty(self.shape(batch), dtype=self.dtype, device=mesh.device)
            incoming.append((received, stage - 1))
        if awaiting is not None and not mesh.last_stage:
            gradient = torch.empty(awaiting, dtype=self.dtype, device=mesh.device)
            incoming.append((gradient, stage + 1))
        if outgoing or incoming:
            send_recv(mesh, outgoing, incoming)
        return None if received is None else received.requires_grad_(), gradient

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any]) -> torch.Tensor:
        """Forward of every micro-batch; returns the sum of the losses, fp64 (zero on a stage that is not the last)."""
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            received, _ = self.exchange(batch=batch)
            output = self.forward_step(batch, received)
            if self.mesh.last_stage:
                loss += output
            else:
                self.exchange(output=output)
        return loss


def hand_over(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar to call backward() on where the gradient of `output` came from the next stage."""
    return _Handover.apply(output, gradient)


class TiedExchange:
    """Keeps the last stage's copy of a tied embedding in step with the first stage, which owns it.

    The copy's gradient over all micro-batches is added to the owner's in the owner's last backward of the step, before ZeRO reduces it; the
    updated weight goes back. On stages between the two, and without a pipeline, nothing happens.

    Args:
        mesh: place of this process.
        weight: the owner's parameter on the first stage; None elsewhere.
        copy: on the last stage; None elsewhere.
    """

    def __init__(self, mesh: Mesh, weight: torch.nn.Parameter | None, copy: TiedCopy | None):
        self.mesh = mesh
        self.copy = copy
        self.weight = weight
        self.last_backward = False
        if weight is not None:
            weight.register_hook(self.add_gradient)

    def add_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Hook of the owner's parameter."""
        if not self.last_backward:
            return gradient
        theirs = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        send_recv(self.mesh, [], [(theirs, self.mesh.pp - 1)])
        return gradient + theirs.to(gradient.dtype)

    def send_gradient(self) -> None:
        """The last stage, after its last backward of a step."""
        if self.copy is not None:
            send_recv(self.mesh, [(self.copy.take_gradient(), 0)], [])

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the owner's weight to the copy."""
        if self.weight is not None:
            send_recv(self.mesh, [(self.weight, self.mesh.pp - 1)], [])
        elif self.copy is not None:
            arrived = torch.empty_like(self.copy.weight, requires_grad=False)
            send_recv(self.mesh, [], [(arrived, 0)])
            self.copy.weight.copy_(arrived)
