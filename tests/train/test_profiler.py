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


def run_steps(profiler: StepProfiler, steps: range) -> list:
    out = []
    for step in steps:
        profiler.before(step)
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
        out.append(profiler.after(step))
    return out


def test_only_the_window_is_recorded(tmp_path):
    profiler = StepProfiler(ProfileConfig(start=3, steps=2), tmp_path, Mesh.single())
    found = run_steps(profiler, range(1, 7))
    assert [path is not None for path in found] == [False, False, False, True, False, False]
    events = json.loads(found[3].read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_nothing_without_a_window(tmp_path):
    profiler = StepProfiler(ProfileConfig(), tmp_path, Mesh.single())
    assert run_steps(profiler, range(1, 5)) == [None] * 4 and profiler.close() is None
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_inside_the_window_leaves_its_trace(tmp_path):
    profiler = StepProfiler(ProfileConfig(start=2, steps=50, memory=True), tmp_path, Mesh.single())
    run_steps(profiler, range(1, 4))
    assert profiler.close() == tmp_path / "profile" / "rank0.json"


def test_in_a_run(tmp_path):
    make_corpus(tmp_path / "data")
    train(make_config(tmp_path / "data", tmp_path / "run", "train.train_iters=4", "profile.start=2", "profile.steps=2"), Mesh.single(), StopSignals())
    text = (tmp_path / "run" / "profile" / "rank0.json").read_text()
    assert "neox::" in text and "rank0.json" in (tmp_path / "run" / "log.txt").read_text()
