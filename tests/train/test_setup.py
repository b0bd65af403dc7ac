"""Set-up of a run, and a custom loop on top of it."""

import os

import pytest

from neox.errors import CheckpointError, DataError, DiskError
from neox.parallel.mesh import Mesh
from neox.phases import Observer, Phases
from neox.runtime.signals import StopSignals
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
