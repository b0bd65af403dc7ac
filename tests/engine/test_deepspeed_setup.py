"""The config that DeepSpeed gets."""

import pytest
import torch
import torch.distributed as dist

from neox.config.deepspeed_keys import OWNED_KEYS
from neox.config.validate import BatchSizes
from neox.engine.deepspeed_setup import CPUWithoutOps, deepspeed_config, merge
from neox.engine.footprint import BUCKET, effective_stage
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import MIN_GROUP_TIMEOUT
from tests.engine.toy import make_config, make_engine


def settings(**sections):
    return deepspeed_config(make_config(**sections), BatchSizes(2, 4, 24, 3), 3, 1000)


def test_batch_precision_and_clipping():
    got = settings(zero={"stage": 2}, precision={"dtype": "bf16"})
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (
        24,
        2,
        4,
    )
    assert got["bf16"]["enabled"] and got["data_types"] == {"grad_accum_dtype": "fp32"}
    assert got["gradient_clipping"] == 0.1
    assert "fp16" not in got
    assert settings(zero={"stage": 0})["gradient_clipping"] == 0.0


def test_fp16_scales_dynamically():
    got = settings(precision={"dtype": "fp16", "initial_scale_power": 12, "loss_scale_window": 7})
    assert got["fp16"]["loss_scale"] == 0
    assert (got["fp16"]["initial_scale_power"], got["fp16"]["loss_scale_window"]) == (12, 7)
    assert not got["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("dtype", "stage", "runs"), [("fp32", 0, 0), ("bf16", 0, 1), ("fp16", 0, 1), ("bf16", 3, 3), ("fp32", 2, 2)]
)
def test_the_stage_that_runs(dtype, stage, runs):
    assert effective_stage(make_config(zero={"stage": stage}, precision={"dtype": dtype})) == runs


def test_buckets_follow_the_model_and_stay_even():
    assert settings()["zero_optimization"]["reduce_bucket_size"] == 1024
    huge = deepspeed_config(make_config(), BatchSizes(1, 1, 1, 1), 1, 10**12)["zero_optimization"]
    assert huge["reduce_bucket_size"] == huge["allgather_bucket_size"] == BUCKET
    assert (
        deepspeed_config(make_config(), BatchSizes(1, 1, 1, 1), 1, 4097)["zero_optimization"]["allgather_bucket_size"]
        % 2
        == 0
    )


@pytest.mark.parametrize("hang_timeout", [1200.0, MIN_GROUP_TIMEOUT])
def test_groups_that_deepspeed_creates_outlast_the_watchdog(hang_timeout):
    """They have torch's timeout, 10 minutes for NCCL, whatever the other groups have."""
    make_engine(make_config(zero={"stage": 1}, guard={"hang_timeout": hang_timeout}), Mesh.single())
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) > 1  # that of this process, and DeepSpeed's
    for group in groups:
        seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        assert seconds == max(MIN_GROUP_TIMEOUT, 2 * hang_timeout)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_throughput_timer_is_off_unless_asked_for(enabled):
    """It calls torch.cuda.synchronize() at the begin and the end of every micro-batch."""
    raw = {"timers": {"throughput": {"enabled": True}}} if enabled else {}
    engine = make_engine(make_config(deepspeed=raw), Mesh.single())
    assert engine.deepspeed.tput_timer.config.enabled is enabled


def test_raw_keys_are_merged_in():
    got = settings(
        deepspeed={"zero_optimization": {"sub_group_size": 5}, "communication_data_type": "fp32"}, zero={"stage": 3}
    )
    assert got["zero_optimization"]["sub_group_size"] == 5
    assert got["zero_optimization"]["stage"] == 3
    assert got["communication_data_type"] == "fp32"
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    "raw",
    [
        {"train_batch_size": 8},
        {"gradient_clipping": 1.0},
        {"zero_optimization": {"stage": 1}},
        {"optimizer": {"type": "Adam"}},
        {"bf16": {"enabled": True}},
    ],
)
def test_what_has_a_key_of_its_own_is_refused(raw):
    with pytest.raises(ConfigError, match=r"error\[2\].*deepspeed\."):
        settings(deepspeed=raw)


def test_keys_that_the_engine_sets_are_refused_when_the_config_is_checked():
    """Not only when the engine is built: `neox config check` reports them too."""
    free = {"zero_optimization", "zero_allow_untested_optimizer", "wall_clock_breakdown", "timers", "steps_per_print"}
    assert settings().keys() - OWNED_KEYS.keys() == free


def test_nothing_is_compiled_and_nothing_is_printed(capfd):
    make_engine(make_config(zero={"stage": 1}, precision={"dtype": "bf16"}), Mesh.single())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert CPUWithoutOps().create_op_builder("ShareMemCommBuilder") is None
    assert torch.distributed.is_initialized()
