"""The folder of a run: a new run, and one whose checkpoints were removed."""

from __future__ import annotations

import contextlib
import os

import pytest

from neox.config.schema import Config
from neox.config.values import dump
from neox.errors import CheckpointError, DiskError
from neox.train.progress import Progress
from neox.train.run_dir import WITNESS, RunDir, accept, claim, note_checkpoint, open_log, recorded_steps


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
    assert (tmp_path / "run" / "config.lock.yml").read_text() == dump(config_of(tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []  # exists for a resume, which reads it


@pytest.mark.parametrize("there", [[], ["notes.txt"], ["checkpoints/"], ["checkpoints/notes.txt"]])
def test_a_refused_start_leaves_what_was_there(tmp_path, there):
    run = tmp_path / "run"
    for name in there:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).mkdir() if name.endswith("/") else (run / name).write_text("mine")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
        claim(config_of(run), RunDir(run), stack)
        raise ZeroDivisionError  # such as data that is missing
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_later_start_removes_leftovers_and_appends_to_the_log(tmp_path):
    run_dir = RunDir(tmp_path)
    left = run_dir.checkpoints / "step_00000003"
    left.mkdir(parents=True)
    (left / f"shard_{'0' * 16}_00000_0000.safetensors").write_text("left by a crash")
    (tmp_path / "log.txt").write_text("earlier\n")
    with contextlib.ExitStack() as stack:
        claim(config_of(tmp_path), run_dir, stack)
        assert left.exists()
        progress = Progress(None, None, 1, 1)
        accept(config_of(tmp_path), run_dir, progress, stack)
        progress.report("now")
        with pytest.raises(CheckpointError), contextlib.ExitStack() as second:
            claim(config_of(tmp_path), run_dir, second)
    assert not left.exists()
    assert progress.log.closed and (tmp_path / "log.txt").read_text() == "earlier\nnow\n"
    with contextlib.ExitStack() as stack:
        claim(config_of(tmp_path), run_dir, stack)


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(DiskError, match=rf"the log cannot be written; where={tmp_path}/log.txt; got=Is a directory"):
        open_log(RunDir(tmp_path), Progress(None, None, 1, 1))


def test_fifos_in_place_of_log_and_records_are_not_waited_for(tmp_path):
    for name in ("log.txt", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DiskError, match="the log cannot be written; where=.*log.txt; got=a FIFO"):
        open_log(RunDir(tmp_path), Progress(None, None, 1, 1))
    assert recorded_steps(tmp_path / "metrics.jsonl") == 0


def test_the_first_checkpoint_alone_is_noted(tmp_path):
    for step in (2, 4):
        note_checkpoint(RunDir(tmp_path), tmp_path / f"step_{step:08d}")
    assert (tmp_path / WITNESS).read_text().startswith("step_00000002 was saved here.")


@pytest.mark.parametrize(
    ("text", "step"),
    [("", 0), ('{"step": 3}\n[1]\n7\n{"loss": 1}\n{"step": null}\n', 3), ("{}\n", 0), ('{"step": 1e999}\n', 0)],
)
def test_lines_without_a_step_are_passed_over(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert recorded_steps(tmp_path / "metrics.jsonl") == step


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


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_checkpoints_of_gpt_neox_are_not_passed_over(tmp_path, inside):
    (tmp_path / inside / "global_step10" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / inside / "global_step5").write_text("a file")
    with contextlib.ExitStack() as stack:
        claim(config_of(tmp_path, "never"), RunDir(tmp_path), stack)
    for resume in ("auto", "must"):
        with (
            pytest.raises(CheckpointError, match="checkpoints of GPT-NeoX") as problem,
            contextlib.ExitStack() as stack,
        ):
            claim(config_of(tmp_path, resume), RunDir(tmp_path), stack)
        assert (problem.value.where, problem.value.got) == (tmp_path / inside, "global_step10")
    (tmp_path / "checkpoints" / "step_00000000").mkdir(parents=True)  # of a run that started at step 0 next to them
    with contextlib.ExitStack() as stack:
        claim(config_of(tmp_path), RunDir(tmp_path), stack)


@pytest.mark.parametrize(
    ("metrics", "left", "got"),
    [
        ('{"step": 3}\n', None, "metrics.jsonl has steps to 3, no such folder"),
        ('{"step": 3}\n', "lock", "metrics.jsonl has steps to 3, an empty folder"),
        ("", "lock", "an empty folder"),
        ("", None, "no such folder"),
    ],
)
def test_what_is_left_of_a_run_whose_checkpoints_are_missing_is_named(tmp_path, metrics, left, got):
    """A file other than a checkpoint, such as the lock of the start before, does not count."""
    run_dir = RunDir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    note_checkpoint(run_dir, run_dir.checkpoints / "step_00000002")
    if left is not None:
        run_dir.checkpoints.mkdir()
        (run_dir.checkpoints / left).write_text("")
    with pytest.raises(CheckpointError) as problem, contextlib.ExitStack() as stack:
        claim(config_of(tmp_path), run_dir, stack)
    assert (problem.value.where, problem.value.got) == (run_dir.checkpoints, got)
    assert "checkpoint.resume=never" in problem.value.do
