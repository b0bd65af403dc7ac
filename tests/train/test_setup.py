"""Set-up of a run, and a custom loop on top of it."""

import os
import sys
from types import SimpleNamespace

import pytest

from neox.config.validate import BatchSizes
from neox.errors import CheckpointError, DataError, DiskError
from neox.parallel.mesh import Mesh
from neox.phases import Observer, Phases
from neox.runtime.signals import StopSignals
from neox.train import setup as module
from neox.train.loop import train
from neox.train.setup import build
from tests.train.corpus import make_config, records

os.environ.setdefault("LOCAL_RANK", "0")


def test_a_run_folder_that_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"error\[5\]"):
        train(make_config(corpus, tmp_path / "file" / "run"), Mesh.single(), StopSignals())


def test_evaluation_without_validation_data(corpus, tmp_path):
    with pytest.raises(DataError, match=r"error\[3\] no validation data"):
        train(make_config(corpus, tmp_path, "data.validation=[]"), Mesh.single(), StopSignals())


def test_a_second_job_in_the_same_folder_is_refused(corpus, tmp_path):
    config = make_config(corpus, tmp_path, "train.train_iters=2", "evaluate.interval=0")
    with build(config, Mesh.single()), pytest.raises(CheckpointError, match=r"error\[4\]") as problem:
        train(config, Mesh.single())
    assert str(os.getpid()) in str(problem.value)


class Diary(Observer):
    """Writes down phases."""

    def __init__(self):
        self.phases = []

    def enter(self, phase, step=None):
        self.phases.append(phase)


def test_a_custom_loop(corpus, tmp_path):
    diary = Diary()
    losses = []
    with build(make_config(corpus, tmp_path, "evaluate.interval=0"), Mesh.single(), phases=Phases(diary)) as training:
        for _ in range(3):
            losses.append(training.engine.train_step(next(training.loader)).loss)
        training.checkpointer.save(training.loader.consumed, wait=True)
    assert losses[2] < losses[0]
    assert records(tmp_path) == []  # nothing was recorded: that is the part of the loop
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000003"]
    assert diary.phases[:4] == ["data", "build", "restore", "step"] and diary.phases[-2:] == ["save", "saved"]
    train(make_config(corpus, tmp_path, "train.train_iters=4", "evaluate.interval=0"), Mesh.single())
    assert [row["step"] for row in records(tmp_path)] == [4]


def test_what_the_loaders_of_a_run_are_made_with(corpus, tmp_path, monkeypatch):
    """Training continues at its sample and reads ahead; an evaluation begins with the first sample."""
    monkeypatch.setattr(module, "Loader", lambda dataset, **options: (dataset, options))
    config = make_config(corpus, tmp_path, "data.prefetch=3")
    sizes = BatchSizes(micro_batch_size=2, gradient_accumulation=4, global_batch_size=24, dp=3)
    parts = {"train": "training data", "validation": "validation data"}
    inputs = SimpleNamespace(data=SimpleNamespace(parts=parts), sizes=sizes)
    shape = {"micro_batch_size": 2, "gradient_accumulation": 4, "dp_rank": 1, "dp_size": 3, "vocab_size": 120}
    mesh = Mesh(tp=2, dp=3, rank=3)
    assert module.make_loader(config, mesh, inputs, "train", 48, 3) == (
        "training data",
        {**shape, "start": 48, "prefetch": 3},
    )
    assert module.make_loader(config, mesh, inputs, "validation") == (
        "validation data",
        {**shape, "start": 0, "prefetch": 0},
    )


@pytest.mark.parametrize(
    ("keys", "samples"),
    [
        ((), {"train": 160, "validation": 3 * 2 * 8}),  # after steps 10 and 20, and one more
        (("evaluate.interval=7",), {"train": 160, "validation": 3 * 2 * 8}),
        (("evaluate.interval=30", "evaluate.iters=5"), {"train": 160, "validation": 40}),
        (("evaluate.interval=0",), {"train": 160, "validation": 0}),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_how_many_samples_a_run_needs_and_who_reads_them_first(corpus, tmp_path, monkeypatch, keys, samples, rank):
    calls = []
    monkeypatch.setattr("torch.distributed.barrier", lambda: calls.append("barrier"))

    def open_data(config, wanted, saved):
        calls.append((wanted, saved))
        return SimpleNamespace(parts={"train": [], "validation": []})

    monkeypatch.setattr(module, "RunDatasets", open_data)
    monkeypatch.setattr(module, "notes", lambda parts: ["a note"])
    config = make_config(corpus, tmp_path, "checkpoint.accept_data_change=true", *keys)
    sizes = BatchSizes(micro_batch_size=2, gradient_accumulation=2, global_batch_size=8, dp=2)
    resumed, said = SimpleNamespace(saved_data=lambda accept: ("cursor", accept)), []
    progress = SimpleNamespace(report=said.append)
    module.open_datasets(config, sizes, Mesh(dp=2, rank=rank), resumed, progress)
    opened = (samples, ("cursor", True))
    assert calls == ([opened, "barrier"] if rank == 0 else ["barrier", opened])
    calls.clear()
    module.open_datasets(config, sizes, Mesh.single(), None, progress)
    assert calls == [(samples, None)] and said == ["a note"] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_only_the_first_process_prints_and_a_run_may_lose_lines_as_it_may_lose_checkpoints(tmp_path, rank, policy):
    keys = (
        f"checkpoint.on_save_error={policy}",
        "logging.interval=5",
        'deepspeed={"zero_optimization": {"compute_grad_norm": false}}',
    )
    config = make_config(tmp_path, tmp_path, *keys[: 3 - rank])
    progress = module.make_progress(config, Mesh(dp=2, rank=rank))
    assert (progress.terminal is sys.stdout) == (rank == 0) and (progress.terminal is None) == (rank == 1)
    assert (progress.total_steps, progress.interval, progress.lossy) == (20, 5, policy == "continue")
    assert progress.log is None and progress.grad_norm == (rank == 1)


def test_a_model_is_made_as_the_config_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GPT", lambda *arguments, **options: (arguments, options))
    keys = ("train.seed=5", "train.activation_checkpointing=full", "parallel.partition=[1, 1]", "parallel.pipeline=2")
    config, mesh = make_config(tmp_path, tmp_path, *keys), Mesh(pp=2)
    arguments, options = module.make_model(config, mesh)
    assert arguments == (config.model, mesh)
    assert options == {"seed": 5, "activation_checkpointing": "full", "partition": config.parallel.partition}


def test_streams_are_restored_or_seeded_from_scratch_at_their_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "seed_default_generators", lambda *call: calls.append(call))
    monkeypatch.setattr(module, "restore_generators", lambda *call: calls.append(call))
    config, mesh = make_config(tmp_path, tmp_path, "train.seed=5"), Mesh.single()
    module.set_generators(None, config, mesh, 7)
    module.set_generators({"torch": "state"}, config, mesh, 7)
    assert calls == [(12, mesh), ({"torch": "state"}, mesh.device)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_folder_changes_after_every_process_has_restored(tmp_path, monkeypatch, rank):
    order = []
    monkeypatch.setattr("torch.distributed.barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(module, "accept", lambda *call: order.append(call))
    inputs = SimpleNamespace(resumed="resumed", data=SimpleNamespace(lines=["a line"]), run_dir="dir", progress="lines")
    restoring = SimpleNamespace(restore=lambda *call: (order.append(call), "states")[1])
    assert module.restore("config", Mesh(dp=2, rank=rank), inputs, restoring, "stack") == "states"
    accepted = [("config", "dir", "lines", "stack")] if rank == 0 else []
    assert order == [("resumed", ["a line"]), "barrier", *accepted]
