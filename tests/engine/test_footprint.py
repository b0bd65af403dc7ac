"""The numbers that engine and plan share.

Their effects are tested with the engine (test_sharding.py, test_optimizer.py) and the plan.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from neox.config.schema import Config, OptimizerConfig
from neox.engine.footprint import BUCKET, bucket_elements, effective_stage, is_hidden_matrix, optimizer_state_keys


@pytest.mark.parametrize(
    ("parameters", "bucket"),
    [
        (0, 1024),
        (10, 1024),
        (1024, 1024),
        (1025, 1026),
        (4096, 4096),
        (4097, 4098),
        (199_999_999, 200_000_000),
        (200_000_001, 200_000_000),
        (10**12, BUCKET),
    ],
)
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


@pytest.mark.parametrize(
    ("name", "dimensions", "hidden"),
    [
        ("layers.0.mlp.up.weight", 2, True),
        ("layers.11.attention.qkv.weight", 2, True),
        ("layers.0.mlp.up.bias", 1, False),
        ("layers.0.experts.up", 3, False),
        ("embedding.word.weight", 2, False),
        ("head.weight", 2, False),
        ("xlayers.0.weight", 2, False),
    ],
)
def test_matrices_in_blocks_are_hidden(name, dimensions, hidden):
    assert is_hidden_matrix(name, dimensions) == hidden
    for kind, keys in {
        "adamw": ("exp_avg", "exp_avg_sq"),
        "lion": ("exp_avg",),
        "sgd": ("momentum_buffer",),
        "muon": ("momentum_buffer",) if hidden else ("exp_avg", "exp_avg_sq"),
    }.items():
        assert optimizer_state_keys(OptimizerConfig(type=kind), name, dimensions) == keys


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_16_bit_at_stage_0_runs_another_stage(dtype, stage):
    config = Config.model_validate(
        {"model": {"vocab_size": 8}, "precision": {"dtype": dtype}, "zero": {"stage": stage}}
    )
    assert effective_stage(config) == (1 if (stage, dtype != "fp32") == (0, True) else stage)
