"""The plan of a run and its measurements."""

from __future__ import annotations

import json
import sys

import pytest

from neox.train.plan_check import Comparison
from tests.distributed import run_command
from tests.train.corpus import make_corpus


def test_planned_and_measured_are_reported():
    lines = Comparison(3, 1, (1.1e9, 1.0e9), 1.3e9, (2.0, 2.5)).lines()
    assert lines == [
        "memory: 1.100 GB planned, 1.000 GB measured (+10.0 %), 1.300 GB resident, on rank 3, stage 1",
        "step: 2 s planned, 2.5 s measured, median (-20.0 %)",
    ]
    assert Comparison(0, 0, (1.0, None), 0.0, (None, 1.0)).lines() == []


@pytest.mark.distributed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
@pytest.mark.parametrize(
    "extra",
    [{}, {"train.train_iters": 7, "checkpoint.save_interval": 6}, {"zero.stage": 3}, {"model.lora": "{rank: 4}"}],
    ids=["plain", "saved later", "stage 3", "adapters"],
)
def test_planned_memory_is_within_a_tenth_of_a_real_run(tmp_path, extra):
    """Even if the copies of the first checkpoint come after the steps during which memory is polled, and with the
    imports of stage 3.
    """
    make_corpus(tmp_path)
    settings = {
        "model.num_layers": 4,
        "model.hidden_size": 128,
        "model.num_attention_heads": 4,
        "model.vocab_size": 16000,
        "model.max_position_embeddings": 128,
        "data.train": f"[{tmp_path / 'train'}]",
        "data.seq_length": 128,
        "precision.dtype": "fp32",
        "train.micro_batch_size": 16,
        "train.train_iters": 3,
        "run.dir": tmp_path / "run",
        **extra,
    }
    config = tmp_path / "config.yml"
    config.write_text("logging: {interval: 1}\n")
    command = ["train", "--conf", config, "--set", *(f"{key}={value}" for key, value in settings.items())]
    result = run_command(1, tmp_path, command)
    assert "GB planned" in result.output and "s planned" in result.output
    content = (tmp_path / "run" / "plan.json").read_text()
    found = json.loads(content)
    assert found["memory_bytes"]["planned"] == pytest.approx(found["memory_bytes"]["measured"], rel=0.1)
    assert found["step_seconds"]["measured"] > 0
    if not extra:  # started again at its end it makes no step, and measures nothing
        again = run_command(1, tmp_path, command)
        assert "done: step 3 of 3" in again.output and "GB planned" not in again.output
        assert (tmp_path / "run" / "plan.json").read_text() == content
