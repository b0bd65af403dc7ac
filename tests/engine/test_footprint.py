"""The numbers that engine and plan share.

Their effects are tested with the engine (test_sharding.py, test_optimizer.py) and the plan.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from neox.config.schema import OptimizerConfig
from neox.engine.footprint import BUCKET, bucket_elements, optimizer_state_keys


@pytest.mark.parametrize(("parameters", "bucket"), [(10, 1024), (4097, 4098), (10**12, BUCKET)])
def test_buckets_follow_the_model_and_stay_even(parameters, bucket):
    assert bucket_elements(parameters) == bucket


def test_muon_keeps_one_tensor_of_matrices_in_blocks():
    muon = OptimizerConfig(type="muon")
    assert optimizer_state_keys(muon, "layers.0.mlp.up.weight", 2) == ("momentum_buffer",)
    assert (
        optimizer_state_keys(muon, "embedding.word.weight", 2)
        == optimizer_state_keys(OptimizerConfig(), "x", 2)
        == ("exp_avg", "exp_avg_sq")
    )


def test_the_plan_needs_no_torch():
    probe = (
        "import neox.cli.plan, sys; print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600)
    assert done.stdout == "[]\n", done.stderr
