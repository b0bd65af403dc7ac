"""Traces of a window of steps."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch

from neox.config.schema import ProfileConfig
from neox.errors import DiskError
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from neox.train.profiler import StepProfiler
from tests.train.corpus import make_config, make_corpus

os.environ.setdefault("LOCAL_RANK", "0")


def run_steps(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.enter("batch", step)
        profiler.enter("forward")
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        profiler.enter("record", step)


def test_only_the_window_is_recorded_with_its_phases(tmp_path):
    said = []
    profiler = StepProfiler(ProfileConfig(start=3, steps=2), tmp_path, Mesh.single(), said.append)
    run_steps(profiler, range(1, 4))
    assert said == []
    run_steps(profiler, range(4, 7))
    assert said == [f"profile in {tmp_path / 'profile' / 'rank0.json'}"]
    names = [event.get("name") for event in json.loads(profiler.path.read_text())["traceEvents"]]
    assert (names.count("aten::mm"), names.count("batch"), names.count("forward")) == (2, 2, 2)


def test_nothing_without_a_window(tmp_path):
    profiler = StepProfiler(ProfileConfig(), tmp_path, Mesh.single(), print)
    run_steps(profiler, range(1, 5))
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_inside_the_window_leaves_its_trace(tmp_path):
    profiler = StepProfiler(ProfileConfig(start=2, steps=50, memory=True), tmp_path, Mesh.single(), print)
    run_steps(profiler, range(1, 4))
    profiler.close()
    assert (tmp_path / "profile" / "rank0.json").exists()


def test_in_a_run(tmp_path):
    make_corpus(tmp_path / "data")
    train(
        make_config(tmp_path / "data", tmp_path / "run", "train.train_iters=4", "profile.start=2", "profile.steps=2"),
        Mesh.single(),
        StopSignals(),
    )
    text = (tmp_path / "run" / "profile" / "rank0.json").read_text()
    assert "neox::" in text and "rank0.json" in (tmp_path / "run" / "log.txt").read_text()


def test_stacks_are_recorded_if_wanted(tmp_path):
    for stacks in (False, True):
        profiler = StepProfiler(ProfileConfig(start=1, steps=1, stacks=stacks), tmp_path, Mesh.single(), print)
        run_steps(profiler, range(1, 2))
        assert ("test_profiler.py" in profiler.path.read_text()) is stacks


def test_a_start_inside_the_window_records_the_rest_of_it(tmp_path):
    """And a start after it records nothing; every process has a file of its own."""
    mesh, config = Mesh(dp=3, rank=2), ProfileConfig(start=3, steps=3)
    late = StepProfiler(config, tmp_path, mesh, pytest.fail)
    run_steps(late, range(6, 8))
    late.close()
    said = []
    profiler = StepProfiler(config, tmp_path, mesh, said.append)
    run_steps(profiler, range(4, 6))
    assert said == [f"profile in {tmp_path / 'profile' / 'rank2.json'}"]
    events = json.loads(profiler.path.read_text())["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products) == 2 and products[0]["args"]["Input Dims"][:2] == [[8, 8], [8, 8]]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank2.json"]


def test_allocations_are_recorded_if_wanted(tmp_path):
    for memory in (False, True):
        profiler = StepProfiler(ProfileConfig(start=1, steps=1, memory=memory), tmp_path, Mesh.single(), print)
        run_steps(profiler, range(1, 2))
        assert ('"[memory]"' in profiler.path.read_text()) is memory


def test_each_phase_is_a_range_that_ends_with_the_next(tmp_path):
    profiler = StepProfiler(ProfileConfig(start=1, steps=1), tmp_path, Mesh.single(), print)
    run_steps(profiler, range(1, 2))
    events = json.loads(profiler.path.read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    ranges = [event for event in ranges if event["name"] in ("batch", "forward", "record")]
    assert [event["name"] for event in ranges] == ["batch", "forward", "record"]
    (product,) = (event for event in events if event.get("name") == "aten::mm")
    (_, forward, record) = ranges
    assert forward["ts"] <= product["ts"] <= forward["ts"] + forward["dur"] <= record["ts"] + 1


@pytest.mark.parametrize("steps", [range(2, 6), range(2, 4)])
def test_on_a_gpu_the_window_is_marked_for_nsight(tmp_path, monkeypatch, steps):
    calls = []
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: calls.append("start"))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: calls.append("stop"))
    monkeypatch.setattr("torch.cuda.nvtx.range_push", calls.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: calls.append("pop"))
    profiler = StepProfiler(ProfileConfig(start=3, steps=2), tmp_path, Mesh.single("cuda"), print)
    run_steps(profiler, steps)
    profiler.close()
    inside = [each for step in (3, 4) if step in steps for each in (f"step {step}", "pop")]
    assert calls == ["start", *inside, "stop"]


@pytest.mark.parametrize(("steps", "before"), [(1, None), (100, None), (100, "{}")])
def test_a_trace_that_cannot_be_written_is_an_error_of_the_disk(tmp_path, steps, before):
    """torch does not raise it: a small trace is cut short, a large one missing, or that of an earlier start."""
    profiler = StepProfiler(ProfileConfig(start=1, steps=steps), tmp_path, Mesh.single(), pytest.fail)
    if before is not None:
        profiler.path.parent.mkdir()
        profiler.path.write_text(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"profile cannot be written; where=.*rank0.json; .*profile.start: 0"):
            run_steps(profiler, range(1, steps + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    profiler.close()  # once
