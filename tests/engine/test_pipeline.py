"""The order of the schedule, with threads as stages: every message must find its receiver, in every shape of
pipeline.
"""

from __future__ import annotations

import dataclasses
import queue
import threading

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.engine import pipeline
from neox.engine.pipeline import OneForwardOneBackward, TiedExchange, backward_root, tie_embedding
from neox.model.gpt import GPT
from neox.parallel.embedding import TiedCopy
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


def together(*works) -> None:
    """Run a function per stage, each in a thread; the failure of any fails the test."""
    problems = []

    def run(work):
        try:
            work()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20 * WAIT)
    assert problems == [] and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_an_evaluation_passes_every_micro_batch_through_all_stages(stages, count, monkeypatch):
    """In fp64: of 2^24 + 1 losses of one, an fp32 sum would lose the last."""
    monkeypatch.setattr(pipeline, "send_recv", Wires(stages).send_recv)
    batches = [torch.full((1, 2 + i), 2.0**24 if i == 0 else 1.0) for i in range(count)]  # of several lengths
    losses, modes = [None] * stages, []

    def stage(rank: int) -> None:
        mesh = dataclasses.replace(Mesh.single(), pp=stages, rank=rank)

        def forward(batch, received):
            modes.append(torch.is_grad_enabled())
            assert (received is None) == (rank == 0)
            y = batch if received is None else received
            return y.sum() / y.numel() if mesh.last_stage else y

        runner = OneForwardOneBackward(mesh, forward, None, lambda batch: tuple(batch.shape), torch.float32)
        losses[rank] = runner.evaluate(batches)

    together(*(lambda rank=rank: stage(rank) for rank in range(stages)))
    assert all(loss.dtype == torch.float64 for loss in losses)
    assert [float(loss) for loss in losses] == [0.0] * (stages - 1) + [2.0**24 + count - 1 if count else 0.0]
    assert modes == [False] * stages * count


def test_a_tied_weight_gets_the_gradient_of_its_copy_once_a_step_and_is_sent_back(monkeypatch):
    monkeypatch.setattr(pipeline, "send_recv", Wires(3).send_recv)
    first, last = (dataclasses.replace(Mesh.single(), pp=3, rank=rank) for rank in (0, 2))
    weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
    owner = TiedExchange(first, weight, None)
    copy = TiedCopy(3, 3, 2, Mesh.single(), dtype=torch.bfloat16)
    other = TiedExchange(last, None, copy)
    together(owner.publish, other.publish)
    assert copy.weight.dtype == torch.bfloat16 and torch.equal(copy.weight.float(), weight)
    assert copy.weight.requires_grad and copy.weight.is_leaf

    def first_stage() -> None:
        for micro_batch in range(2):
            owner.last_backward = micro_batch == 1
            (weight * (micro_batch + 1)).sum().backward()

    def last_stage() -> None:
        for factor in (10.0, 20.0):
            (copy.weight * factor).sum().backward()
        other.send_gradient()

    together(first_stage, last_stage)
    assert torch.equal(weight.grad, torch.full((3, 2), 1.0 + 2.0 + 10.0 + 20.0))
    together(lambda: owner.add_gradient(torch.zeros(3, 2)), other.send_gradient)  # the next sum starts from zero


def test_an_exchange_without_weight_and_copy_does_nothing():
    nothing = TiedExchange(dataclasses.replace(Mesh.single(), pp=3, rank=1), None, None)
    nothing.send_gradient(), nothing.publish()  # a message would wait for ever, or fail without a group


@pytest.mark.parametrize(
    ("tied", "pp", "rank", "weight", "copy"),
    [
        (True, 1, 0, False, False),
        (False, 2, 0, False, False),
        (False, 2, 1, False, False),
        (True, 2, 0, True, False),
        (True, 2, 1, False, True),
        (True, 3, 1, False, False),
    ],
)
def test_which_stage_holds_what_of_a_tied_embedding(tied, pp, rank, weight, copy):
    config = ModelConfig(
        num_layers=3,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=12,
        max_position_embeddings=8,
        tie_embeddings=tied,
    )
    model = GPT(config, dataclasses.replace(Mesh.single(), pp=pp, rank=rank))
    before = None if model.tied is None else model.tied.weight.detach().clone()
    exchange = tie_embedding(model, model.mesh, torch.bfloat16)
    assert (exchange.weight is not None, exchange.copy is not None) == (weight, copy)
    if weight:
        assert exchange.weight is model.embedding.word.weight and exchange.weight.dtype == torch.float32
    if copy:
        assert exchange.copy is model.tied and torch.equal(model.tied.weight, before.bfloat16())
        assert model.tied.weight.dtype == torch.bfloat16
