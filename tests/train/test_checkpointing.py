"""Checkpoints of a run: by schedule, on a full disk, and at the end."""

import os
import resource
from pathlib import Path

import pytest
import torch

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import digest
from neox.errors import DiskError, NonFinite
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import after_step, train
from neox.train.setup import build
from tests.train.corpus import StopAfter, make_config, records

os.environ.setdefault("LOCAL_RANK", "0")


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def test_a_full_disk_at_save_time(corpus, tmp_path):
    quick = ("train.train_iters=4", "evaluate.interval=0", "checkpoint.save_interval=2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DiskError, match=r"error\[5\]"):
            train(make_config(corpus, tmp_path / "stop", *quick), Mesh.single(), StopSignals())
        train_on = make_config(corpus, tmp_path / "on", *quick, "checkpoint.on_save_error=continue")
        with pytest.raises(DiskError):
            # asked to stop: a checkpoint that cannot be written must not count as success
            train(train_on, Mesh.single(), StopAfter(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # the disk refuses in the background, while step 3 may be under way
    assert 2 <= len(records(tmp_path / "stop")) <= 4
    assert len(records(tmp_path / "on")) == 4
    assert "training continues without this checkpoint" in (tmp_path / "on" / "log.txt").read_text()
    assert not list((tmp_path / "stop" / "checkpoints").glob("step_*/manifest.json"))


def test_extra_checkpoints_the_initial_weights_among_them(corpus, tmp_path):
    train(
        make_config(
            corpus, tmp_path, "train.train_iters=5", "checkpoint.save_interval=0", "checkpoint.save_iters=[0, 1, 3]"
        ),
        Mesh.single(),
        StopSignals(),
    )
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))] == [
        f"step_{n:08}" for n in (0, 1, 3, 5)
    ]
    with Checkpoint(tmp_path / "checkpoints" / "step_00000000") as checkpoint:
        initial = GPT(make_config(corpus, tmp_path).model, Mesh.single("cpu"), seed=1234)
        for name, tensor in initial.logical_weights():
            assert torch.equal(checkpoint.tensor(name), tensor)


def test_resuming_a_finished_run_does_nothing(corpus, tmp_path):
    config = make_config(corpus, tmp_path, "train.train_iters=2", "evaluate.interval=0")
    train(config, Mesh.single(), StopSignals())
    before = digest(newest(tmp_path))
    train(config, Mesh.single(), StopSignals())
    assert [row["step"] for row in records(tmp_path)] == [1, 2]
    assert digest(newest(tmp_path)) == before


def test_roll_back_restores_the_weights_and_continues_with_new_data(corpus, tmp_path):
    with build(make_config(corpus, tmp_path, "train.train_iters=9", "evaluate.interval=0"), Mesh.single()) as training:
        after_step(training, training.engine.train_step(next(training.loader)), 1.0)
        training.checkpointer.save(training.loader.consumed, wait=True)
        saved = {(f.kind, f.name): f.data.clone() for f in training.engine.fragments()}
        after_step(training, training.engine.train_step(next(training.loader)), 1.0)
        found = training.checkpointer.roll_back(2)
        assert found.name == "step_00000001"
        assert (training.engine.step, training.state.tokens, training.loader.consumed) == (1, 256, 16)
        assert all(torch.equal(f.data, saved[f.kind, f.name]) for f in training.engine.fragments())


def test_a_rollback_needs_a_checkpoint_and_is_limited(corpus, tmp_path):
    config = make_config(corpus, tmp_path, "guard.max_skipped=1", "evaluate.interval=0")
    with build(config, Mesh.single()) as training:
        with pytest.raises(NonFinite, match="where=step 7; got=no checkpoint; want=a checkpoint of an earlier step;"):
            training.checkpointer.roll_back(7)
        training.checkpointer.save(training.loader.consumed, wait=True)
        training.checkpointer.rollbacks = 1
        limit = "no rollback left; where=step 9; got=1 rollbacks in this start; want=at most guard.max_skipped = 1;"
        with pytest.raises(NonFinite, match=limit):
            training.checkpointer.roll_back(9)


def test_a_save_that_is_pending_is_complete_after_the_run_was_closed(corpus, tmp_path):
    with build(make_config(corpus, tmp_path, "evaluate.interval=0"), Mesh.single()) as training:
        after_step(training, training.engine.train_step(next(training.loader)), 1.0)
        training.checkpointer.save(training.loader.consumed, wait=False)
    assert Checkpoint(newest(tmp_path)).step == 1
