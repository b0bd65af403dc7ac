"""One-forward-one-backward over pipeline stages (PipeDream-flush, arXiv 2006.09503; arXiv 2104.04473, figure 4).

DeepSpeed's PipelineEngine is not used: it averages the losses of micro-batches, whereas ours are weighted by tokens; it
steps before the loss has been checked; it controls the data iterator and evaluation; and it reduces tied weights as
replicas, which clipping and checkpoints would see twice. Here every stage is an ordinary DeepSpeed engine over its
layers (ZeRO 0 and 1, fp32 accumulation, loss scaling as without a pipeline), and this file defines the order in which
it runs. With one stage it is a loop over micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from neox.data.samples.loader import Batch
from neox.model.gpt import GPT
from neox.parallel.embedding import TiedCopy
from neox.parallel.mesh import Mesh
from neox.parallel.p2p import send_recv


class _BackwardRoot(torch.autograd.Function):
    """A scalar whose backward pass gives `output` the gradient that the next stage sent.

    DeepSpeed's backward() starts from scalars only.

    The incoming gradient is not read: the gradient that was sent includes loss scale and token weights.
    """

    @staticmethod
    def forward(ctx, output, gradient):
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


class InFlight(NamedTuple):
    """A micro-batch between its forward and its backward pass: its input, its output, and the shape of both."""

    received: torch.Tensor | None
    output: torch.Tensor
    shape: tuple[int, ...]


class OneForwardOneBackward:
    """Runs the micro-batches of a step on one stage.

    Args:
        mesh: the layout of processes.
        forward: (batch, received) -> output: what the next stage receives, or the loss on the last stage.
        backward: (output, gradient of the output or None on the last stage, whether it is the last micro-batch) ->
            None.
        shape: batch -> shape of what stages receive.
        dtype: dtype of what stages receive.
    """

    def __init__(
        self,
        mesh: Mesh,
        forward: Callable[[Batch, torch.Tensor | None], torch.Tensor],
        backward: Callable[[torch.Tensor, torch.Tensor | None, bool], None],
        shape: Callable[[Batch], tuple[int, ...]],
        dtype: torch.dtype,
    ):
        self.mesh = mesh
        self.forward = forward
        self.backward = backward
        self.shape = shape
        self.dtype = dtype

    def train(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Forward and backward of every micro-batch.

        Returns the sum of the losses, zero on a stage that is not the last.
        """
        mesh, count = self.mesh, len(batches)
        ahead = min(mesh.pp - mesh.pp_rank - 1, count)  # micro-batches whose forward comes before the first backward
        loss = torch.zeros((), device=mesh.device)
        in_flight: deque[InFlight] = deque()
        for batch in batches[:ahead]:
            received, _ = self.exchange(batch=batch)
            output = self.forward(batch, received)
            in_flight.append(InFlight(received, output, self.shape(batch)))
            self.exchange(output=output)
        received = self.exchange(batch=batches[ahead])[0] if ahead < count else None
        for i in range(ahead, count):
            output = self.forward(batches[i], received)
            in_flight.append(InFlight(received, output, self.shape(batches[i])))
            if mesh.last_stage:
                loss.add_(output.detach())
            _, gradient = self.exchange(output=output, awaiting=in_flight[0].shape)
            dx = self.backward_oldest(in_flight, gradient, last=i - ahead == count - 1)
            received, _ = self.exchange(dx=dx, batch=batches[i + 1] if i + 1 < count else None)
        while in_flight:
            _, gradient = self.exchange(awaiting=in_flight[0].shape)
            self.exchange(dx=self.backward_oldest(in_flight, gradient, last=len(in_flight) == 1))
        return loss

    def backward_oldest(
        self, in_flight: deque[InFlight], gradient: torch.Tensor | None, *, last: bool
    ) -> torch.Tensor | None:
        """Backward of the oldest micro-batch in flight. Returns the gradient of its input; None on the first stage."""
        micro_batch = in_flight.popleft()
        self.backward(micro_batch.output, gradient, last)
        return None if micro_batch.received is None else micro_batch.received.grad

    def exchange(
        self,
        *,
        output: torch.Tensor | None = None,
        dx: torch.Tensor | None = None,
        batch: Batch | None = None,
        awaiting: tuple[int, ...] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Send to and receive from the neighbouring stages, in one batch of operations.

        Args:
            output: for the next stage.
            dx: gradient for the stage before.
            batch: the micro-batch whose input is expected from the stage before.
            awaiting: shape of the gradient expected from the next stage.

        Returns:
            the input of `batch`, and the gradient; None if not expected, or at this end of the pipeline.
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
    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Forward of every micro-batch. Returns the sum of the losses, fp64, zero on a stage that is not the last."""
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            received, _ = self.exchange(batch=batch)
            output = self.forward(batch, received)
            if self.mesh.last_stage:
                loss += output
            else:
                self.exchange(output=output)
        return loss


def backward_root(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar to call backward() on when the gradient of `output` came from the next stage."""
    return _BackwardRoot.apply(output, gradient)


class TiedExchange:
    """Synchronises the last stage's copy of a tied embedding with the first stage, which owns it.

    The gradient of the copy over all micro-batches is added to the owner's in the last backward pass of the step,
    before ZeRO reduces it. The updated weight is sent back. Without a weight and a copy, every method does nothing.

    Args:
        mesh: the layout of processes.
        weight: the parameter, on the first stage; None elsewhere.
        copy: the copy, on the last stage; None elsewhere.
    """

    def __init__(self, mesh: Mesh, weight: torch.nn.Parameter | None, copy: TiedCopy | None):
        self.mesh = mesh
        self.copy = copy
        self.weight = weight
        self.last_backward = False
        if weight is not None:
            weight.register_hook(self.add_gradient)

    def add_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Hook of the parameter: add the gradient of the copy."""
        if not self.last_backward:
            return gradient
        received = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        send_recv(self.mesh, [], [(received, self.mesh.pp - 1)])
        return gradient + received.to(gradient.dtype)

    def send_gradient(self) -> None:
        """Send the gradient of the copy; after the last backward pass of a step."""
        if self.copy is not None:
            send_recv(self.mesh, [(self.copy.take_gradient(), 0)], [])

    @torch.no_grad()
    def publish(self) -> None:
        """Send the weight to the copy."""
        if self.weight is not None:
            send_recv(self.mesh, [(self.weight, self.mesh.pp - 1)], [])
        elif self.copy is not None:
            arrived = torch.empty_like(self.copy.weight, requires_grad=False)
            send_recv(self.mesh, [], [(arrived, 0)])
            self.copy.weight.copy_(arrived)


def tie_embedding(model: GPT, mesh: Mesh, dtype: torch.dtype) -> TiedExchange:
    """The exchange of a tied embedding between the first and the last stage; does nothing elsewhere."""
    if mesh.pp == 1 or not model.config.head_is_tied:
        return TiedExchange(mesh, None, None)
    weight = None if model.embedding is None else model.embedding.word.weight
    if weight is None and model.tied is not None and model.tied.weight.dtype != dtype:
        model.tied.replace(model.tied.weight.to(dtype))
    return TiedExchange(mesh, weight, model.tied)
