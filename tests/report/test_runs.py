"""Reading runs: numbers, incidents, differences, damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from neox.errors import DataError
from neox.report.runs import differences, read_plan, read_run
from tests.report.records import write_run


def test_numbers_and_incidents(tmp_path):
    record = read_run(write_run(tmp_path / "run"))
    assert len(record.rows) == 120 and record.series("validation_loss")[0] == (
        40.0,
        pytest.approx(4.0 - 40 / 120 + 0.1),
    )
    found = record.incidents()
    assert any("step 30: update skipped" in text for text in found)
    assert next(text for text in found if "times the median" in text).startswith("step 80: loss 9.33")
    assert "resumed from runs/x at step 60" in found and len(found) == 3
    summary = record.summary()
    assert (
        summary["steps"] == "120 of 120"
        and summary["best validation loss"].endswith("at step 120")
        and summary["tokens/s, median"] in ("1,060", "1,061")
    )
    assert len(record.series("grad_norm")) == 119


def test_steps_of_a_run_that_computes_no_norm_are_not_reported_as_skipped(tmp_path):
    folder = write_run(tmp_path / "run", spike=None)
    config = folder / "config.lock.yml"
    text = config.read_text()
    assert "deepspeed: {}\n" in text
    config.write_text(text.replace("deepspeed: {}\n", "deepspeed: {zero_optimization: {compute_grad_norm: false}}\n"))
    assert read_run(folder).incidents() == ["resumed from runs/x at step 60"]


@pytest.mark.parametrize(("step", "found"), [(50, False), (51, True), (52, True), (120, True)])
def test_the_first_judged_step_has_a_window_before_it(tmp_path, step, found):
    incidents = read_run(write_run(tmp_path / "run", spike=step, skipped=None)).incidents()
    assert any(text.startswith(f"step {step}: loss") for text in incidents) == found
    assert sum("times the median" in text for text in incidents) == found


def test_no_loss_is_a_spike_after_losses_of_zero(tmp_path):
    """A model that has learned its data by heart: a median of 0 measures nothing."""
    folder = write_run(tmp_path / "run", spike=None, skipped=None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "loss": 0.5 if row["step"] == 90 else 0.0}) + "\n" for row in rows)
    )
    assert not any("times the median" in text for text in read_run(folder).incidents())


def test_differences_of_configs(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", lr=2e-3, steps=60, spike=None))]
    assert dict(differences(runs)) == {"optimizer.lr": ["0.001", "0.002"], "train.train_iters": ["120", "60"]}


def test_a_line_being_written_is_left_out_a_damaged_one_is_named(tmp_path):
    metrics = write_run(tmp_path / "run") / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text + '{"step": 121, "lo')
    assert len(read_run(tmp_path / "run").rows) == 120
    metrics.write_text("{}\n" + text)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_run(tmp_path / "run")
    metrics.write_text("")
    with pytest.raises(DataError, match="no steps recorded"):
        read_run(tmp_path / "run")
    with pytest.raises(DataError, match="not the folder of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metrics.jsonl", b"\xff\xfe\x00\n" * 9, "metrics cannot be read"),
        ("metrics.jsonl", b"[" * 100_000 + b'\n{"step": 1, "loss": 1}\n', "metrics cannot be read"),
        ("metrics.jsonl", b'{"step": "1", "loss": 1}\n{"step": 2, "loss": 1}\n', "metrics cannot be read"),
        ("metrics.jsonl", b'{"step": NaN, "loss": 1}\n{"step": 2, "loss": 1}\n', "metrics cannot be read"),
        ("metrics.jsonl", b'{"step": 1, "loss": "1"}\n{"step": 2, "loss": 1}\n', "loss is '1'"),
        ("metrics.jsonl", b'{"step": 1, "loss": 1, "tokens": "x"}\n{"step": 2, "loss": 1}\n', "tokens is 'x'"),
        ("config.lock.yml", b"\xff\xfe\x00", "config of the run is damaged"),
        ("plan.json", b"\xff", "cannot read plan.json"),
        (
            "plan.json",
            b'{"memory_bytes": {"planned": "a", "measured": 1}, "step_seconds": {"planned": 1, "measured": 2}}',
            "'a' is not a number",
        ),
    ],
)
def test_records_that_are_garbage_are_named(tmp_path, name, content, problem):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_run(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.lock.yml"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="got=a FIFO, not a regular file"):
        read_run(folder)


def test_planned_and_measured_values_are_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    assert not any("planned" in key for key in read_run(folder).summary())
    content = {
        "memory_bytes": {"planned": 1.1e9, "measured": 1e9},
        "step_seconds": {"planned": None, "measured": 2.0},
        "rank": 0,
        "stage": 0,
    }
    (folder / "plan.json").write_text(json.dumps(content))
    summary = read_run(folder).summary()
    assert (
        summary["memory, planned and measured"] == "1.1 and 1 GB (+10 %)"
        and "time of a step, planned and measured" not in summary
    )
    (folder / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read plan.json"):
        read_run(folder)


def test_a_loss_that_was_not_finite_is_no_damage(tmp_path):
    metrics = write_run(tmp_path / "run") / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    row = json.loads(lines[-1])
    metrics.write_text("".join(lines[:-1]) + json.dumps({**row, "loss": None, "grad_norm": None}) + "\n")
    record = read_run(tmp_path / "run")
    assert len(record.rows) == 120 and len(record.series("loss")) == 119
    assert record.summary()["last loss"] == "not finite"


def test_every_fact_of_a_summary(tmp_path):
    record = read_run(write_run(tmp_path / "run", spike=None))
    assert record.summary() == {
        "steps": "120 of 120",
        "tokens": "30,720",
        "last loss": "3.0000",
        "last validation loss": "3.1000",
        "best validation loss": "3.1000 at step 120",
        "tokens/s, median": "1,060",
        "time of the steps": "0.02 h",
        "peak memory of a process": "1.50 GB",
        "model": "12 layers, hidden 768, 12 heads, vocabulary 100",
    }
    record.rows[39]["validation_loss"] = 1.0
    record.rows[-1].update(loss=None, targets=0)
    summary = record.summary()
    assert summary["best validation loss"] == "1.0000 at step 40" and summary["last loss"] == "no target"


@pytest.mark.parametrize(("factor", "found"), [(1.49, False), (1.51, True)])
def test_how_large_a_spike_is(tmp_path, factor, found):
    folder = write_run(tmp_path / "run", spike=None, skipped=None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changed = [{**row, "loss": 2.0 * factor if row["step"] == 100 else 2.0} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert any("times the median of the 50 steps before" in text for text in read_run(folder).incidents()) == found


@pytest.mark.parametrize(
    ("line", "incident"),
    [
        ("training continues without this checkpoint: x", True),
        ("training continues without this record: x", True),
        ("stopped by a signal", True),
        ("error[5] cannot write", True),
        ("optimizer.lr: 1 -> 2", True),
        ("weights of a checkpoint", True),
        ("step 3/120 | loss 4", False),
        ("done: step 120 of 120", False),
    ],
)
def test_lines_of_the_log_that_are_incidents(tmp_path, line, incident):
    folder = write_run(tmp_path / "run", spike=None, skipped=None)
    (folder / "log.txt").write_text(line + "\n")
    assert read_run(folder).incidents() == ([line] if incident else [])
    (folder / "log.txt").unlink()
    assert read_run(folder).incidents() == []


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change every row of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_incidents_come_by_kind_and_each_names_its_own_numbers(tmp_path):
    """The median is of the 50 losses before the step, whatever they are numbered."""
    folder = write_run(tmp_path / "run", steps=60, spike=None, skipped=None)

    def change(row):
        step = row["step"]
        loss = 20.0 if step == 9 else None if step == 20 else 7.5 if step == 60 else 2.0 if step % 2 else 4.0
        return {**row, "step": step + 1000, "loss": loss, "grad_norm": None if step in (20, 33) else 1.0}

    rewrite(folder, change)
    (folder / "log.txt").write_bytes(b"stopped \xff\n")
    assert read_run(folder).incidents() == [
        "step 1020: update skipped",
        "step 1033: update skipped",
        "step 1060: loss 7.5, 2.5 times the median of the 50 steps before",
        "stopped \ufffd",
    ]


@pytest.mark.parametrize(("last", "found"), [(3.0, False), (3.0001, True)])
def test_a_spike_is_above_one_and_a_half_times_the_median(tmp_path, last, found):
    folder = write_run(tmp_path / "run", steps=51, spike=None, skipped=None)
    rewrite(folder, lambda row: {**row, "loss": last if row["step"] == 51 else 2.0})
    assert any("times the median" in text for text in read_run(folder).incidents()) == found


def test_facts_of_a_run_that_stopped_early_and_measured_little(tmp_path):
    folder = write_run(tmp_path / "run", steps=1100, spike=None, skipped=None)
    keep = {"step": None, "loss": None, "step_time": None, "memory_gb": None, "validation_loss": None}

    def change(row):
        row = {name: value for name, value in row.items() if name in keep}
        return row | {"memory_gb": 9.0 if row["step"] == 2 else 1.0, "step_time": 1800.0 if row["step"] < 3 else 0.0}

    rewrite(folder, change)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1050]))
    found = read_run(folder).summary()
    assert (found["steps"], found["tokens"]) == ("1,050 of 1,100", "0")
    assert (found["time of the steps"], found["peak memory of a process"]) == ("1.00 h", "9.00 GB")
    assert "tokens/s, median" not in found
    rewrite(folder, lambda row: {"step": row["step"], "loss": 1.0})
    found = read_run(folder).summary()
    assert not {"last validation loss", "peak memory of a process"} & set(found)


def test_the_last_and_the_best_validation_loss(tmp_path):
    folder = write_run(tmp_path / "run", spike=None)
    losses = {40: 2.5, 80: 2.0, 120: 2.25}
    rewrite(folder, lambda row: {**row, "validation_loss": losses.get(row["step"])})
    found = read_run(folder).summary()
    assert found["last validation loss"] == "2.2500" and found["best validation loss"] == "2.0000 at step 80"
    assert read_run(folder).series("validation_loss") == [(40.0, 2.5), (80.0, 2.0), (120.0, 2.25)]


def test_planned_numbers_have_the_deviation_from_the_measured_ones(tmp_path):
    folder = write_run(tmp_path / "run")
    content = {
        "memory_bytes": {"planned": 1.5e9, "measured": None},
        "step_seconds": {"planned": 1.5, "measured": 2.0},
        "rank": 3,
    }
    (folder / "plan.json").write_text(json.dumps(content))
    assert read_plan(folder / "plan.json") == {name: content[name] for name in ("memory_bytes", "step_seconds")}
    found = read_run(folder).summary()
    assert found["time of a step, planned and measured"] == "1.5 and 2 s (-25 %)"
    assert "memory, planned and measured" not in found
    for wrong in (True, "1", [1]):
        content["step_seconds"]["measured"] = wrong
        (folder / "plan.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="is not a number"):
            read_run(folder)


@pytest.mark.parametrize(
    "line", [b"[1]", b"", b'{"loss": 1}', b'{"step": true, "loss": 1}', b'{"step": 1.5, "loss": 1}', b'{"step": 1}']
)
def test_a_line_that_is_no_step_is_named_by_its_number(tmp_path, line):
    folder = write_run(tmp_path / "run")
    rows = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*rows[:5], line, *rows[5:]]) + b"\n\n")
    with pytest.raises(DataError, match=r"metrics cannot be read; where=.*metrics\.jsonl:6; got="):
        read_run(folder)
    (folder / "metrics.jsonl").write_bytes(b"\n".join(rows[:5]) + b"\n" + line + b"\n\n")
    assert [row["step"] for row in read_run(folder).rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_records_have_a_limit_of_their_own(tmp_path, monkeypatch, name):
    """Larger than that of other files, and that of configs."""
    folder = write_run(tmp_path / "run", steps=2)
    size = max((folder / each).stat().st_size for each in ("metrics.jsonl", "log.txt"))
    monkeypatch.setattr("neox.report.runs.LARGEST_RECORD", size)
    assert len(read_run(folder).rows) == 2
    with open(folder / name, "ab") as file:
        file.write(b"\n" * size)
    with pytest.raises(DataError, match=rf"where=.*{name}; got=larger than {size}"):
        read_run(folder)


def test_a_key_that_one_config_lacks_is_a_difference(tmp_path):
    runs = [read_run(write_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1.0), ("b", 1.0), ("c", 2.0))]
    config = tmp_path / "b" / "config.lock.yml"
    config.write_text(config.read_text().replace("deepspeed: {}", "deepspeed: {prescale_gradients: true}"))
    runs[1] = read_run(tmp_path / "b")
    assert dict(differences(runs)) == {
        "optimizer.lr": ["1.0", "1.0", "2.0"],
        "deepspeed.prescale_gradients": ["", "True", ""],
    }
    assert runs[1].name == str(tmp_path / "b") and differences(runs[:1]) == []
