"""What a training step reads back from the device. A GPU would stop the host there: a step may read its loss and its
norm, and nothing per micro-batch.

The model runs on meta tensors, which take the branches of a GPU and refuse to be read. The engine runs on a CPU, where
a read is an operator of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import neox
from neox.config.schema import ModelConfig
from neox.engine.evaluation import evaluate
from neox.errors import ConfigError
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.model.pipeline import token_losses
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import WaitTracker
from neox.phases import Phases
from neox.runtime.heartbeat import Heartbeat
from tests.engine.toy import make_config, make_engine, micro_batches
from tests.model.models import FORMS, SIZES, build

PACKAGE = Path(neox.__file__).parent
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for the device, by the function of ours that calls them."""

    def __init__(self, waits: WaitTracker | None = None) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.marked: Counter[str] = Counter()  # of those, the ones during which `waits` marks the process as waiting
        self.waits = WaitTracker() if waits is None else waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in READS:
            ours = [frame.name for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
            self.seen[ours[-1] if ours else "test"] += 1
            self.marked[ours[-1] if ours else "test"] += self.waits.waiting
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_read_nothing(form):
    model = build(form).to("meta").train()
    tokens = torch.zeros(2, 19, dtype=torch.int64, device="meta")
    packed = {} if form == "alibi" else {"segment_ids": tokens.int(), "position_ids": tokens}
    model(tokens, tokens.roll(-1, 1), **packed).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ids_that_were_checked_are_not_read_outside_training(monkeypatch):
    """The tensors are fake ones of a GPU: they take its branches, and refuse to be read. What else a forward reads
    would refuse as well.
    """
    monkeypatch.setattr(GPT, "initialize", lambda self: None)
    with FakeTensorMode(), torch.no_grad():
        model = GPT(
            ModelConfig(**(SIZES | FORMS["no-positions-softcap"])), Mesh.single("cuda"), dtype=torch.bfloat16
        ).eval()
        tokens = torch.zeros(2, 19, dtype=torch.int64, device="cuda")
        for call in (partial(model, tokens, tokens), partial(token_losses, model, tokens, tokens)):
            call(checked=True)
            with pytest.raises(DataDependentOutputException):
                call()


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4]]], ids=["one", "ragged"])
def test_generation_checks_the_prompts_once(prompts, monkeypatch):
    """The ids that it draws are indices of the vocabulary: the tokens are all that it reads."""
    model = build("neox")
    asked = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *inputs, **options: asked.append(options["checked"]) or forward(*inputs, **options)
    )
    generate(model, prompts, SamplingParams(max_new_tokens=3, temperature=0))
    assert asked == [True] * 3
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        generate(model, [[97]], SamplingParams(max_new_tokens=3))


def test_an_evaluation_counts_targets_where_the_loader_left_them_and_reads_once(monkeypatch):
    engine = make_engine(make_config(), Mesh.single(), 3)
    batches = micro_batches(0, engine.mesh, 3)
    copies = []
    monkeypatch.setattr(
        "neox.engine.evaluation.to_device",
        lambda batch, _: copies.append(replace(batch, targets=batch.targets.clone())) or copies[-1],
    )
    counted = []
    count = engine.objective.count
    monkeypatch.setattr(
        engine.objective, "count", lambda batch: counted.append(batch.targets.data_ptr()) or count(batch)
    )
    with HostReads() as reads:
        loss = evaluate(engine, batches)
    assert counted == [batch.targets.data_ptr() for batch in batches]
    assert len(copies) == 3
    assert reads.seen == {"count": 3}  # and one list, which on a CPU is no operator
    monkeypatch.undo()
    assert loss == evaluate(engine, batches)


def test_reads_are_seen():
    values = torch.ones(3)
    with HostReads() as reads:
        float(values.sum())
        values.nonzero()
    assert reads.seen == {"test": 2}
    with pytest.raises(RuntimeError, match="meta"):
        float(values.to("meta").sum())


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_reads_its_loss_and_its_norm(stage, accumulation):
    """count: of targets, on the CPU, where the loader leaves them. step_optimizer: DeepSpeed's, of the norm, which
    is on the host then. The loss is read as a list, which on a CPU is no operator.
    """
    engine = make_engine(make_config(zero={"stage": stage}), Mesh.single(), accumulation)
    batches = micro_batches(0, engine.mesh, accumulation)
    engine.train_step(batches)
    with HostReads() as reads:
        engine.train_step(batches)
    norm = {"clip_gradients": 1} if stage == 0 else {"clip_and_step": 1, "step_optimizer": 3}
    assert reads.seen == {"count": accumulation, **norm}


@pytest.mark.parametrize("stage", [0, 1])
def test_every_read_of_the_device_is_marked_as_waiting_for_others(stage):
    """A GPU's queue holds collectives, so a process that reads a result may wait for others: the watchdog must not
    report it as stuck.
    """
    heartbeat = Heartbeat()
    engine = make_engine(make_config(zero={"stage": stage}), Mesh.single(), phases=Phases(heartbeat))
    batches = micro_batches(0, engine.mesh, 1)
    engine.train_step(batches)
    with HostReads(heartbeat.waits) as reads:
        engine.train_step(batches)
        evaluate(engine, batches)
    on_the_cpu = Counter(count=reads.seen["count"])
    assert reads.marked == reads.seen - on_the_cpu
    assert not heartbeat.waits.waiting
