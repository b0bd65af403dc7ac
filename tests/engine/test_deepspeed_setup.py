"""The config that DeepSpeed gets."""

import gc
import math
import os

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import groups

from neox.config.deepspeed_keys import OWNED_KEYS
from neox.config.validate import BatchSizes
from neox.engine.deepspeed_setup import (
    CPUWithoutOps,
    check_passed_through,
    combined_norm_on_host,
    deepspeed_config,
    ensure_process_group,
    frozen_objects,
    global_norm_on_host,
    import_muon_uncompiled,
    merge,
)
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
    assert CPUWithoutOps().get_op_builder("ShareMemCommBuilder") is None
    assert CPUWithoutOps().is_fp16_supported() is True
    assert torch.distributed.is_initialized()


PRECISIONS = {
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16", "initial_scale_power": 12, "loss_scale_window": 7, "min_loss_scale": 4.0},
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_complete_config(dtype, optimizer):
    """For 5 replicas of a process with 3,001 parameters."""
    config = make_config(
        zero={"stage": 2},
        precision=PRECISIONS[dtype],
        optimizer={"type": optimizer, "gradient_clipping": 0.7},
        deepspeed={},
    )
    want = {
        "train_batch_size": 2 * 4 * 5,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.7,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 3002,
            "allgather_bucket_size": 3002,
            "reduce_scatter": optimizer == "adamw",
        },
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": True, "immediate_grad_update": True},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 1 << 62,
    }
    if dtype == "fp16":
        want["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 12,
            "loss_scale_window": 7,
            "min_loss_scale": 4,
            "hysteresis": 1,
        }
    assert deepspeed_config(config, BatchSizes(2, 4, 24, 3), 5, 3001) == want


def test_the_smallest_loss_scale_is_an_integer_of_at_least_1():
    for given, want in ((0.25, 1), (1.0, 1), (2.9, 2), (4096.0, 4096)):
        scale = settings(precision={"dtype": "fp16", "min_loss_scale": given})["fp16"]["min_loss_scale"]
        assert (scale, type(scale)) == (want, int)


def test_clipping_is_deepspeeds_from_stage_1_on():
    """bf16 at stage 0 runs at stage 1."""
    clipping = {
        (dtype, stage): settings(zero={"stage": stage}, precision={"dtype": dtype})["gradient_clipping"]
        for dtype in ("fp32", "bf16")
        for stage in (0, 1)
    }
    assert clipping == {("fp32", 0): 0.0, ("fp32", 1): 0.1, ("bf16", 0): 0.1, ("bf16", 1): 0.1}


def test_merging_changes_neither_side():
    base, over = {"a": {"b": {"c": 1}, "d": 2}, "e": 3, "f": {"g": 4}}, {"a": {"b": {"h": 5}}, "e": {"i": 6}, "f": 7}
    kept = repr((base, over))
    assert merge(base, over) == {"a": {"b": {"c": 1, "h": 5}, "d": 2}, "e": {"i": 6}, "f": 7}
    assert repr((base, over)) == kept
    assert merge({}, {"a": 1}) == merge({"a": 1}, {}) == {"a": 1}


def test_a_refused_key_is_named_with_the_key_to_set():
    with pytest.raises(ConfigError) as caught:
        check_passed_through({"zero_optimization": {"sub_group_size": 5, "stage": 1}})
    assert (caught.value.where, caught.value.do) == ("deepspeed.zero_optimization.stage", "set zero.stage")
    with pytest.raises(ConfigError) as caught:
        check_passed_through({"comms_logger": {}, "optimizer": None})
    assert (caught.value.where, caught.value.want) == ("deepspeed.optimizer", "set by optimizer")
    check_passed_through({"zero_optimization": {"sub_group_size": 5}, "stage": 1, "zero_force_ds_cpu_optimizer": False})
    check_passed_through({"zero_optimization": True})


@pytest.mark.parametrize(("device", "rank"), [("cuda:3", "3"), ("cuda", "0"), ("cpu", None)])
def test_deepspeed_gets_the_gpu_and_the_sizes_of_this_process(device, rank, monkeypatch):
    groups.mpu = object()  # of an earlier engine
    engine = make_engine(make_config(), Mesh.single())  # makes the process group
    assert groups.mpu is None
    size = sum(p.numel() for p in engine.model.parameters())
    assert engine.deepspeed.zero_reduce_bucket_size() == engine.deepspeed.zero_allgather_bucket_size() == size
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    ensure_process_group(torch.device(device))
    assert {os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]} == {rank or "7"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_on_the_host_are_those_of_all_elements(dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in (1, 17, 300)]
    want = math.sqrt(sum(float(one.double().square().sum()) for one in tensors))
    assert float(global_norm_on_host(tensors)) == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert float(combined_norm_on_host([torch.tensor(3.0), torch.tensor(4.0)])) == pytest.approx(5.0)
    for bad in (math.nan, math.inf):
        tensors[1][3] = bad
        assert float(global_norm_on_host(tensors)) == -1, "DeepSpeed's sign of a norm that is not finite"


@pytest.fixture
def thawed():
    """No object is excluded from garbage collection; left as it was."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if frozen:
        gc.freeze()


def test_frozen_objects_are_thawed_also_after_an_error(thawed):
    with frozen_objects():
        assert gc.get_freeze_count() > 0
    with pytest.raises(KeyError), frozen_objects():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen_and_nothing_else(thawed):
    gc.freeze()
    count = gc.get_freeze_count()
    later = [[] for _ in range(100)]
    with frozen_objects():
        assert gc.get_freeze_count() == count
    assert gc.get_freeze_count() == count and len(later) == 100


def test_the_compiler_is_replaced_for_one_import_only(monkeypatch):
    before, seen = compiler.compile, []

    def fail(name):
        seen.append((name, compiler.compile is before))
        raise KeyError(name)

    import_muon_uncompiled()
    assert compiler.compile is before
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(KeyError):
        import_muon_uncompiled()
    assert seen == [("deepspeed.runtime.zero.muon.muon_optimizer", False)] and compiler.compile is before
