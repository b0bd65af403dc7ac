"""A complete run in fp16: overflows in its records, the loss scale in its checkpoints, and a bitwise resume."""

from __future__ import annotations

import math

import pytest

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import folder_name
from neox.errors import StoppedBySignal
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.half_kernels import HalfKernels
from tests.train.corpus import StopAfter, curve, make_config, records

FP16 = (
    "precision.dtype=fp16",
    "precision.initial_scale_power=20",
    "precision.loss_scale_window=4",
    "train.micro_batch_size=4",
    "checkpoint.save_interval=9",
    "evaluate.interval=0",
)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_continues_with_its_loss_scale(corpus, tmp_path, stage):
    with HalfKernels():
        straight, resumed = tmp_path / "straight", tmp_path / "resumed"
        settings = (*FP16, f"zero.stage={stage}")
        train(make_config(corpus, straight, *settings), Mesh.single(), StopSignals())
        with pytest.raises(StoppedBySignal):
            train(make_config(corpus, resumed, *settings), Mesh.single(), StopAfter(11))
        stopped = len(records(resumed))
        train(make_config(corpus, resumed, *settings), Mesh.single(), StopSignals())
    assert 9 < stopped < 20
    assert curve(resumed) == curve(straight)
    rows = records(straight)
    overflows = [row["step"] for row in rows if row["grad_norm"] is None or math.isinf(row["grad_norm"])]
    assert overflows and overflows[0] == 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    for step in (9, 18):
        states = [Checkpoint(run / "checkpoints" / folder_name(step)).state for run in (straight, resumed)]
        assert states[0]["loss_scale"] == states[1]["loss_scale"]
        assert states[0]["updates"] == step - sum(one <= step for one in overflows)
        assert math.log2(states[0]["loss_scale"]["cur_scale"]).is_integer()
