"""Checkpoints of a run: by schedule, on a full disk, and at the end."""

import os
import resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neox.checkpoint.background import Outcome
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import digest
from neox.config.values import dump, to_builtins
from neox.errors import DiskError, NonFinite
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train import checkpointing as module
from neox.train.checkpointing import Checkpointer, RunState
from neox.train.loop import after_step, train
from neox.train.run_dir import WITNESS, RunDir
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


class Parts:
    """Stands for engine, recorder, cursor and saver of a checkpointer, and notes what is asked of them.

    The saver has the outcomes that the test gives it.
    """

    def __init__(self, monkeypatch, folder: Path, *keys: str, **layout: int):
        self.calls, self.left, self.refuses = [], [], None
        self.step, self.fragments = 4, lambda: "fragments"
        self.mesh = Mesh(**layout)
        self.phases = SimpleNamespace(enter=lambda phase: self.calls.append(phase))
        monkeypatch.setattr(module, "Saver", self.make_saver)
        self.config = make_config(folder, folder, "zero.stage=1", *keys)
        self.run_dir, self.state = RunDir(folder), RunState(tokens=77)
        self.checkpointer = Checkpointer(
            self.config, self, self.state, self, self.run_dir, self, lineage="lineage", storage="storage"
        )
        self.saver = self.checkpointer.saver

    def make_saver(self, root, **options):
        self.options = {"root": root, **options}
        return SimpleNamespace(
            join=lambda *seconds: self.calls.append(("join", *seconds)), outcomes=self.outcomes, save=self.save
        )

    def outcomes(self):
        found, self.left = self.left, []
        return found

    def save(self, step, fragments, **options):
        self.calls.append(("save", step, fragments, options))
        if self.refuses is not None:
            raise self.refuses

    def check_files(self):
        self.calls.append("check_files")

    def report(self, line):
        self.calls.append(line)

    def state_dict(self):
        return {"step": self.step, "updates": 3}

    def to_json(self):
        return "cursor"


def test_what_a_saver_is_made_with(monkeypatch, tmp_path):
    keys = ("checkpoint.keep=3", "checkpoint.async=false")
    parts = Parts(monkeypatch, tmp_path, *keys, tp=2, pp=3, dp=5, cp=7, rank=11)
    expected = {"keep": 3, "background": False, "lineage": "lineage", "storage": "storage", "rank": 11}
    assert parts.options == {"root": tmp_path / "checkpoints", "world_size": 210, **expected}
    assert Parts(monkeypatch, tmp_path).options["background"] is True
    parts.checkpointer.close()
    assert parts.calls == [("join", 5.0)]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        (("checkpoint.save_interval=3",), [0, 3, 6]),
        (("checkpoint.save_interval=0",), []),
        (("checkpoint.save_interval=0", "checkpoint.save_iters=[0, 1, 5]"), [0, 1, 5]),
        (("checkpoint.save_interval=4", "checkpoint.save_iters=[1]"), [0, 1, 4]),
    ],
)
def test_after_which_steps_a_checkpoint_is_due(monkeypatch, tmp_path, keys, steps):
    checkpointer = Parts(monkeypatch, tmp_path, *keys).checkpointer
    assert [step for step in range(8) if checkpointer.is_due(step)] == steps
    assert all(isinstance(checkpointer.is_due(step), bool) for step in range(8))


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("pending", [None, {"step": 4}])
def test_what_is_saved_and_in_which_order(monkeypatch, tmp_path, wait, pending):
    parts = Parts(monkeypatch, tmp_path, tp=2, pp=3, dp=5, cp=7)
    parts.state.pending = pending
    parts.checkpointer.save(48, wait=wait)
    names = [call if isinstance(call, str) else call[0] for call in parts.calls]
    assert names == ["save", "check_files", "join", "save", *["join"] * wait, "saved"]
    (_, step, fragments, options) = parts.calls[3]
    assert (step, fragments) == (4, "fragments")
    assert options.pop("rng")["torch"].equal(torch.get_rng_state())
    assert options == {
        "state": {"step": 4, "updates": 3, "consumed": 48, "tokens": 77, "data": "cursor"}
        | ({} if pending is None else {"pending": pending}),
        "config_lock": dump(parts.config),
        "model_config": to_builtins(parts.config.model),
        "layout": {"tp": 2, "pp": 3, "dp": 5, "cp": 7, "zero": 1},
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_complete_checkpoint_is_reported_and_noted_by_the_first_process(monkeypatch, tmp_path, rank):
    parts = Parts(monkeypatch, tmp_path, dp=2, rank=rank)
    folders = [tmp_path / "checkpoints" / f"step_0000000{step}" for step in (2, 4)]
    parts.left = [Outcome(2, folders[0], None), Outcome(4, folders[1], None)]
    parts.checkpointer.collect_saves()
    assert parts.calls == [f"saved {folder}" for folder in folders]
    assert parts.checkpointer.saved_step == 4
    assert (tmp_path / WITNESS).exists() == (rank == 0)
    parts.checkpointer.collect_saves()
    assert len(parts.calls) == 2


DISK = DiskError("no room", where="x")


@pytest.mark.parametrize("where", ["begin", "background"])
@pytest.mark.parametrize(
    ("policy", "wait", "error", "ends"),
    [
        ("stop", False, DISK, True),
        ("continue", False, DISK, False),
        ("continue", True, DISK, True),  # the last checkpoint: its loss must not count as success
        ("continue", False, ValueError("a bug"), True),
    ],
)
def test_which_failures_of_a_save_end_the_run(monkeypatch, tmp_path, where, policy, wait, error, ends):
    if where == "begin" and error is not DISK:
        pytest.skip("no other error is caught there")
    parts = Parts(monkeypatch, tmp_path, f"checkpoint.on_save_error={policy}")
    parts.refuses = error if where == "begin" else None
    good = tmp_path / "checkpoints" / "step_00000003"
    parts.left = [] if where == "begin" else [Outcome(2, None, error), Outcome(3, good, None)]
    call = partial(parts.checkpointer.save, 48, wait=wait)
    if where == "background":
        call = partial(parts.checkpointer.collect_saves, wait=wait)
    if ends:
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error
        return
    call()
    assert "training continues without this checkpoint: error[5] no room; where=x" in parts.calls
    assert parts.checkpointer.saved_step == (3 if where == "background" else -1)


def test_a_run_may_roll_back_as_often_as_updates_may_be_skipped(monkeypatch, tmp_path):
    parts = Parts(monkeypatch, tmp_path, "guard.max_skipped=2", dp=2, rank=1)
    asked, restored = [], []

    class Found:
        def __init__(self, path):
            self.state = {"tokens": 55}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(module, "find", lambda *where, **who: (asked.append((where, who)), "newest")[1])
    monkeypatch.setattr(module, "Checkpoint", Found)
    parts.restore = restored.append
    parts.left = [Outcome(4, tmp_path / "checkpoints" / "step_00000004", None)]
    for _ in range(2):
        assert parts.checkpointer.roll_back(9) == "newest"
    assert len(restored) == 2 and parts.state.tokens == 55 and parts.checkpointer.saved_step == 4
    assert parts.calls[:2] == [("join",), f"saved {tmp_path / 'checkpoints' / 'step_00000004'}"]
    assert asked[0] == ((tmp_path / "checkpoints", "auto"), {"rank": 1, "world_size": 2})
    with pytest.raises(NonFinite, match="got=2 rollbacks in this start; want=at most guard.max_skipped = 2"):
        parts.checkpointer.roll_back(9)
    assert len(restored) == 2
