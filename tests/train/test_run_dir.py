"""The folder of a run: a new run, and one whose checkpoints were removed."""

from __future__ import annotations

import contextlib

import pytest

from neox.config.schema import Config
from neox.errors import CheckpointError
from neox.train.progress import Progress
from neox.train.run_dir import WITNESS, RunDir, accept, claim, note_checkpoint, recorded_steps


def config_of(run, resume: str = "auto") -> Config:
    values = {"model": {"vocab_size": 10}, "run": {"dir": str(run)}, "checkpoint": {"resume": resume}}
    return Config.model_validate(values)


def test_the_folder_of_a_new_run_is_locked_and_empty_until_the_start_is_accepted(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    with contextlib.ExitStack() as stack:
        claim(config_of(tmp_path / "run"), run_dir, stack)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
        progress = Progress(None, None, 1, 1)
        progress.speaks = True
        progress.report("before")
        accept(config_of(tmp_path / "run"), run_dir, progress, stack)
        progress.report("after")
    assert (tmp_path / "run" / "log.txt").read_text() == "before\nafter\n"
    assert (tmp_path / "run" / "config.lock.yml").exists()


@pytest.mark.parametrize("records", ['{"step": 1}\n{"step": 2}\n{"step": 3, "lo', "", None])
@pytest.mark.parametrize("witness", [True, False])
@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a checkpoint"])
def test_when_checkpoints_are_missed(tmp_path, records, witness, left):
    run_dir = RunDir(tmp_path)
    if records is not None:
        (tmp_path / "metrics.jsonl").write_text(records)
    if witness:
        note_checkpoint(run_dir, run_dir.checkpoints / "step_00000002")
    if left != "nothing":
        run_dir.checkpoints.mkdir()
    if left == "a checkpoint":
        (run_dir.checkpoints / "step_00000002").mkdir()
    missed = left != "a checkpoint" and (witness or (left == "nothing" and bool(records)))
    for resume in ("auto", "must", "never"):
        with contextlib.ExitStack() as stack:
            refused = (
                pytest.raises(CheckpointError, match="the run's checkpoints are missing")
                if missed and resume != "never"
                else contextlib.nullcontext()
            )
            with refused:
                claim(config_of(tmp_path, resume), run_dir, stack)
    assert recorded_steps(tmp_path / "metrics.jsonl") == (2 if records else 0)
    assert (tmp_path / WITNESS).exists() == witness
