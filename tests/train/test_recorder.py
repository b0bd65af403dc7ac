"""The record of a step, and what a run reports."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest

from neox.config.schema import Config
from neox.config.validate import BatchSizes, batch_sizes
from neox.engine.engine import StepResult
from neox.errors import DiskError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.metrics import memory_gb
from neox.train.plan_check import Comparison, PlanCheck
from neox.train.progress import Progress
from neox.train.recorder import Recorder, describe_layout
from neox.train.run_dir import RunDir

RESULT = StepResult(step=1, loss=2.5, grad_norm=0.5, lr=0.1, tokens=60, skipped=False, stop=False)


def make_recorder(folder: Path, terminal: io.StringIO, objective: str = "pretrain", **layout: int) -> Recorder:
    model = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 32,
    }
    config = Config.model_validate(
        {
            "model": model,
            "data": {"seq_length": 16},
            "train": {"micro_batch_size": 4, "train_iters": 9, "objective": objective},
            "run": {"dir": str(folder)},
        }
    )
    mesh = dataclasses.replace(Mesh.single(), **layout)
    progress = Progress(terminal, None, 9, 1)
    return Recorder(
        config, batch_sizes(config, 1), mesh, RunDir(folder), progress, PlanCheck(config, mesh), GPT(config.model, mesh)
    )


def test_a_record_goes_to_metrics_and_to_the_terminal(tmp_path):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    recorder.open(0)
    record = recorder.make_record(RESULT, 0.5, tokens=64, samples=4)
    recorder.write(record)
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record
    assert (record["loss"], record["targets"], record["tokens"], record["samples"], record["tokens_per_s"]) == (
        2.5,
        60,
        64,
        4,
        128.0,
    )
    assert "step 1/9 | loss 2.5000" in terminal.getvalue()


def test_a_skipped_update_has_no_norm_and_is_reported(tmp_path):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    result = dataclasses.replace(RESULT, loss=float("nan"), skipped=True, problem="the loss is not finite")
    record = recorder.make_record(result, 0.5, tokens=64, samples=4)
    assert record["loss"] is None and record["grad_norm"] is None
    assert terminal.getvalue() == "step 1: the loss is not finite, the update is skipped\n"


def test_a_norm_that_was_not_computed_is_null(tmp_path):
    result = dataclasses.replace(RESULT, grad_norm=float("nan"))
    record = make_recorder(tmp_path, io.StringIO()).make_record(result, 0.5, tokens=64, samples=4)
    assert record["grad_norm"] is None


def test_a_problem_without_a_skipped_update(tmp_path):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    record = recorder.make_record(dataclasses.replace(RESULT, problem="a spike"), 0.5, tokens=64, samples=4)
    assert (record["loss"], record["grad_norm"]) == (2.5, 0.5)
    assert terminal.getvalue() == "step 1: a spike\n"


@pytest.mark.parametrize(("objective", "tokens"), [("pretrain", 64), ("sft", 64), ("dpo", 128), ("reward", 128)])
def test_a_pair_is_two_sequences(tmp_path, objective, tokens):
    recorder = make_recorder(tmp_path, io.StringIO(), objective)
    assert recorder.tokens_per_step == tokens
    assert recorder.flops_per_step == recorder.flops_per_step / tokens * recorder.tokens_per_step > 0
    assert recorder.make_record(RESULT, 0.5, tokens=0, samples=0)["tokens_per_s"] == 2 * tokens


def test_flops_are_per_process_and_utilisation_is_of_the_fastest_step(tmp_path):
    recorder = make_recorder(tmp_path, io.StringIO(), dp=2)
    recorder.peak = 1.0
    fast, slow = (recorder.make_record(RESULT, seconds, tokens=0, samples=0) for seconds in (0.25, 1.0))
    assert fast["tflops"] == pytest.approx(recorder.flops_per_step / 0.25 / 2 / 1e12)
    assert (fast["mfu"], slow["mfu"]) == (1.0, pytest.approx(0.25))


def test_only_the_first_process_writes_files(tmp_path):
    recorder = make_recorder(tmp_path, io.StringIO(), rank=1)
    recorder.open(0)
    recorder.write(recorder.make_record(RESULT, 0.5, tokens=64, samples=4))
    recorder.reopen(0)
    recorder.check_files()
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_first_step_of_a_start_is_printed_and_the_second_at_its_interval(tmp_path):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    recorder.progress.interval = 100
    for step in (4, 5):
        recorder.write(recorder.make_record(dataclasses.replace(RESULT, step=step), 0.5, tokens=64, samples=4))
    assert [line.split()[1] for line in terminal.getvalue().splitlines()] == ["4/9"]


def test_records_that_are_moved_aside_are_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    recorder.open(1)
    recorder.close()
    moved = f"moved to {tmp_path / 'metrics.dropped.jsonl'}"
    assert terminal.getvalue() == f"2 records of steps after 1, which no checkpoint holds, {moved}\n"


def test_the_end_of_a_run_that_was_complete_already(tmp_path):
    terminal = io.StringIO()
    make_recorder(tmp_path, terminal).report_end(9)
    assert terminal.getvalue() == ("done: step 9 of 9; nothing was left to do, raise train.train_iters to continue\n")


def test_a_rollback_moves_later_records_aside(tmp_path):
    recorder = make_recorder(tmp_path, io.StringIO())
    recorder.open(0)
    for step in (1, 2, 3):
        recorder.write(recorder.make_record(dataclasses.replace(RESULT, step=step), 0.5, tokens=64, samples=4))
    recorder.reopen(1)
    recorder.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_replaced_folder_is_an_error(tmp_path):
    recorder = make_recorder(tmp_path, io.StringIO())
    recorder.open(0)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "other")
    with pytest.raises(DiskError):
        recorder.check_files()
    recorder.close()


def test_the_layout_as_text():
    assert describe_layout(Mesh.single()) == ""
    assert describe_layout(dataclasses.replace(Mesh.single(), dp=4)) == ""
    assert describe_layout(dataclasses.replace(Mesh.single(), pp=2, cp=3)) == " (pipeline 2, context 3, data 1)"
    assert (
        describe_layout(dataclasses.replace(Mesh.single(), tp=2, dp=4, sequence=True))
        == " (tensor 2, data 4, sequence parallel)"
    )


def test_every_number_of_a_record(tmp_path):
    recorder = make_recorder(tmp_path, io.StringIO(), dp=2)
    recorder.peak = 1e15
    record = recorder.make_record(dataclasses.replace(RESULT, step=7), 0.5, tokens=448, samples=28)
    model = GPT(recorder.config.model, Mesh.single())
    flops = model.flops_per_token(16) * 64  # of the sequences of this run, not of the longest that the model takes
    assert flops != model.flops_per_token(32) * 64
    memory = record.pop("memory_gb")
    assert record == {
        "step": 7,
        "loss": 2.5,
        "targets": 60,
        "lr": 0.1,
        "grad_norm": 0.5,
        "tokens": 448,
        "samples": 28,
        "tokens_per_s": 128.0,
        "tflops": pytest.approx(flops / 0.5 / 2 / 1e12),
        "mfu": pytest.approx(flops / 0.5 / 2 / 1e15),
        "step_time": 0.5,
    }
    assert memory == pytest.approx(memory_gb(recorder.mesh.device), rel=0.1)
    assert recorder.plan.steps == recorder.steps == 1


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({}, "1 process on cpu"),
        ({"dp": 2}, "2 processes on cpu"),
        ({"tp": 2, "dp": 3}, "6 processes on cpu (tensor 2, data 3)"),
    ],
)
def test_the_start_names_model_layout_and_batch(tmp_path, layout, text):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    recorder.mesh = dataclasses.replace(Mesh.single(), **layout)
    recorder.sizes = BatchSizes(micro_batch_size=4, gradient_accumulation=3, global_batch_size=24, dp=2)
    recorder.report_start()
    weights = GPT(recorder.config.model, Mesh.single()).logical_weights()
    parameters = sum(tensor.numel() for _, tensor in weights)
    stage, dtype = recorder.config.zero.stage, recorder.config.precision.dtype
    assert terminal.getvalue() == (
        f"{parameters:,} parameters | {text} | ZeRO {stage} | {dtype} | batch 24 = 4 x 3 x 2\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_end_compares_the_plan_and_the_first_process_stores_it(tmp_path, monkeypatch, rank):
    terminal, peaks = io.StringIO(), []
    recorder = make_recorder(tmp_path, terminal)
    recorder.mesh = dataclasses.replace(recorder.mesh, rank=rank)
    found = Comparison(3, 1, (1.1e9, 1.0e9), 1.3e9, (2.0, 2.5))
    monkeypatch.setattr(recorder.plan, "compare", lambda peak: (peaks.append(peak), found)[1])
    recorder.make_record(RESULT, 0.5, tokens=64, samples=4)
    recorder.report_end(9)
    assert peaks == [recorder.peak]
    assert terminal.getvalue().splitlines() == [*found.lines(), "done: step 9 of 9"]
    assert (tmp_path / "plan.json").exists() == (rank == 0)


def test_trackers_get_every_record_and_are_closed(tmp_path, monkeypatch):
    got = []

    class Tracked:
        def __init__(self, config, folder, report):
            got.append((config.run.dir, folder))

        log = got.append

        def close(self):
            got.append("closed")

    monkeypatch.setattr("neox.train.recorder.Trackers", Tracked)
    recorder = make_recorder(tmp_path, io.StringIO())
    recorder.open(0)
    record = recorder.make_record(RESULT, 0.5, tokens=64, samples=4)
    recorder.write(record)
    recorder.close()
    assert got == [(str(tmp_path), tmp_path), record, "closed"]
    assert recorder.metrics.file.closed


@pytest.mark.parametrize("lossy", [False, True])
def test_a_record_that_the_disk_refuses_ends_the_run_unless_it_is_lossy(tmp_path, lossy):
    terminal = io.StringIO()
    recorder = make_recorder(tmp_path, terminal)
    recorder.progress.lossy = lossy
    recorder.open(0)
    recorder.metrics.file.close()
    recorder.metrics.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, the recorder closes it
    record = recorder.make_record(RESULT, 0.5, tokens=64, samples=4)
    with contextlib.nullcontext() if lossy else pytest.raises(DiskError):
        recorder.write(record)
    recorder.close()
    assert ("training continues without this record" in terminal.getvalue()) == lossy
