"""The order of the schedule, with threads as stages: every message must find its receiver, in every shape of
pipeline.
"""

from __future__ import annotations

import dataclasses
import queue
import threading

import pytest
import torch

from neox.engine import pipeline
from neox.engine.pipeline import OneForwardOneBackward, backward_root
from neox.parallel.mesh import Mesh

WAIT = 5.0  # seconds after which a message counts as never sent


class Wires:
    """Rendezvous between stages: a message is handed over when both sides are there, as a backend without buffers
    does it.
    """

    def __init__(self, stages: int):
        self.queues = {(a, b): queue.Queue() for a in range(stages) for b in range(stages)}

    def send_recv(self, mesh, outgoing, incoming):
        here = mesh.pp_rank
        taken = []
        for tensor, stage in outgoing:
            taken.append(threading.Event())
            self.queues[here, stage].put((tensor.detach().clone(), taken[-1]))
        for tensor, stage in incoming:
            message, event = self.queues[stage, here].get(timeout=WAIT)
            assert message.shape == tensor.shape
            tensor.copy_(message)
            event.set()
        assert all(event.wait(WAIT) for event in taken)


def play(stages: int, batches: list[torch.Tensor], monkeypatch) -> tuple[float, list[torch.Tensor], list[list[str]]]:
    """Each stage multiplies by its weight, the last sums: the loss, the weights' gradients, and what each stage did
    in turn.
    """
    wires = Wires(stages)
    monkeypatch.setattr(pipeline, "send_recv", wires.send_recv)
    weights = [torch.full((), 1.0 + i, requires_grad=True) for i in range(stages)]
    diaries = [[] for _ in range(stages)]
    losses = [0.0] * stages
    problems = []

    def stage(rank: int) -> None:
        mesh = dataclasses.replace(Mesh.single(), pp=stages, rank=rank)

        def forward(batch, received):
            diaries[rank].append("F")
            y = (batch if received is None else received) * weights[rank]
            return y.sum() if mesh.last_stage else y

        def backward(output, gradient, last):
            diaries[rank].append("B!" if last else "B")
            (output if gradient is None else backward_root(output, gradient)).backward()

        try:
            losses[rank] = float(
                OneForwardOneBackward(mesh, forward, backward, lambda batch: tuple(batch.shape), torch.float32).train(
                    batches
                )
            )
        except BaseException as error:  # a thread's failure must fail the test
            problems.append(error)

    threads = [threading.Thread(target=stage, args=(rank,)) for rank in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20 * WAIT)
    assert problems == []
    assert not any(thread.is_alive() for thread in threads)
    return losses[-1], [weight.grad for weight in weights], diaries


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_message_is_missed_and_gradients_are_those_of_one_stage(stages, count, monkeypatch):
    batches = [torch.arange(3.0) + i for i in range(count)]
    loss, gradients, diaries = play(stages, batches, monkeypatch)
    total = sum(float(batch.sum()) for batch in batches)
    product = float(torch.arange(1.0, stages + 1).prod())
    assert loss == pytest.approx(total * product)
    assert [float(g) for g in gradients] == pytest.approx([total * product / (1 + i) for i in range(stages)])
    for rank, diary in enumerate(diaries):
        assert diary.count("F") == count
        assert diary[-1] == "B!" and diary.count("B!") == 1
        most = max(diary[:i].count("F") - diary[:i].count("B") for i in range(len(diary) + 1))
        assert most == min(stages - rank, count)  # activations in flight: the bound of 1F1B
