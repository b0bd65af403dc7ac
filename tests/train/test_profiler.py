"""Traces of a window of steps."""

from __future__ import annotations

import json
import os

import torch

from neox.config.schema import ProfileConfig
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
