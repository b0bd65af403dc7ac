"""Upstream's description of a run: schedule, precision, batch, layout, data, checkpoints."""

from __future__ import annotations

import math

import pytest

from neox.config.load import load
from neox.config.validate import validate
from neox.engine.schedule import Schedule
from tests.config.test_neox_model import result
from tests.config.upstream import BASE, flow_text


def settings(changes: dict) -> dict:
    values, _, problems = result(changes)
    assert problems == []
    return values


def upstream_rate(values: dict, step: int) -> float:
    """GPT-NeoX's AnnealingLR: warm-up from 0, then a line to 0 or a cosine to min_lr, never below min_lr."""
    end, peak, low = values["lr_decay_iters"], values["lr"], values["min_lr"]
    warmup = values["warmup"] * end
    if warmup and step <= warmup:
        return peak * step / warmup
    step, length = step - warmup, end - warmup
    if values["style"] == "linear":
        return max(peak * (length - step) / length, low)
    return max(low + (peak - low) / 2 * (math.cos(math.pi * step / length) + 1), low)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_learning_rate_is_upstreams_at_every_step(style):
    values = {"lr_decay_iters": 800, "lr": 1e-3, "min_lr": 2e-4, "warmup": 0.05, "style": style}
    file = {"lr_decay_style": style, "lr_decay_iters": 800, "min_lr": 2e-4, "warmup": 0.05, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    got = settings(file)
    schedule = Schedule(got["schedule.type"], 1e-3, got["schedule.min_lr"], got["schedule.warmup_iters"], got["schedule.decay_iters"])
    assert [schedule.learning_rate(step) for step in range(1, 801)] == pytest.approx([upstream_rate(values, step) for step in range(1, 801)], rel=2e-3)


def test_defaults_are_upstreams():
    got = settings({})
    wanted = {
        "optimizer.type": "adamw",
        "optimizer.lr": 0.001,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.1,
        "optimizer.gradient_clipping": 1.0,
        "schedule.type": "linear",
        "schedule.warmup_iters": 10,
        "precision.dtype": "fp32",
        "zero.stage": 0,
        "parallel.pipeline": 1,
        "evaluate.interval": 1000,
        "evaluate.iters": 100,
        "logging.interval": 100,
        "train.activation_checkpointing": "none",
        "checkpoint.save_interval": 0,
        "data.order": "neox",
    }
    assert {key: got[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.3}}}, {"optimizer.type": "lion", "optimizer.weight_decay": 0.3}),
        ({"clip_grad": 0.5}, {"optimizer.gradient_clipping": 0.5}),
        ({"pack_impl": "unpacked"}, {"data.packing": "document", "data.order": "neox"}),
        ({"pack_impl": "pack_until_overflow"}, {"data.packing": "best_fit", "data.order": "epoch"}),
        ({"lr_decay_style": "constant", "min_lr": 1e-5}, {"schedule.type": "constant", "schedule.min_lr": 0.0}),
        ({"lr_decay_fraction": 0.5, "lr_decay_style": "cosine"}, {"schedule.decay_iters": 500, "schedule.warmup_iters": 5}),
        ({"precision": "bfloat16"}, {"precision.dtype": "bf16"}),
        ({"bf16": {"enabled": True}}, {"precision.dtype": "bf16"}),
        ({"precision": "bfloat16", "bf16": {"enabled": True}}, {"precision.dtype": "bf16"}),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, {"precision.dtype": "bf16"}),
        ({"fp16": {"enabled": False}}, {"precision.dtype": "fp32"}),
        (
            {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "min_loss_scale": 1}},
            {"precision.dtype": "fp16", "precision.initial_scale_power": 12, "precision.min_loss_scale": 1},
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": True, "cpu_offload": True}},
            {"zero.stage": 2, "deepspeed.zero_optimization.overlap_comm": True, "deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}},
        ),
        ({"train_micro_batch_size_per_gpu": None, "batch_size": 3, "gas": 2}, {"train.micro_batch_size": 3, "train.gradient_accumulation": 2}),
        ({"train_batch_size": 64}, {"train.global_batch_size": 64, "train.micro_batch_size": 4}),
        ({"pipe_parallel_size": 0, "model_parallel_size": 1, "sequence_parallel": True}, {"parallel.tensor": 1, "parallel.sequence": False}),
        ({"pipe_parallel_size": 2, "model_parallel_size": 2, "sequence_parallel": True}, {"parallel.pipeline": 2, "parallel.sequence": True}),
        ({"checkpoint_factor": 100, "extra_save_iters": [0, 1, 2, 1]}, {"checkpoint.save_interval": 100, "checkpoint.save_iters": [0, 1, 2]}),
        ({"save_interval": 50, "keep_last_n_checkpoints": 3}, {"checkpoint.save_interval": 50, "checkpoint.keep": 3}),
        ({"checkpoint_scale": "log", "checkpoint_factor": 10}, {"checkpoint.save_interval": 0, "checkpoint.save_iters": [1, 10, 100, 1000]}),
        ({"save": "out", "load": "out"}, {"run.dir": "out"}),
        ({"save": "out", "load": "old", "finetune": True}, {"run.dir": "out", "checkpoint.init_from": "old"}),
        ({"load": "old"}, {"checkpoint.resume": "old"}),
        ({"checkpoint_activations": True}, {"train.activation_checkpointing": "full"}),
        ({"data_path": "a", "split": "949, 50, 1"}, {"data.path": "a", "data.split": "949,50,1"}),
        ({"train_data_paths": ["a", "b"]}, {"data.train": ["a", "b"]}),
        ({"valid_data_paths": ["a"], "valid_data_weights": [2.0]}, {"data.validation": [{"path": "a", "weight": 2.0}]}),
        ({"profile": True, "memory_profiling": True}, {"profile.start": 10, "profile.steps": 2, "profile.memory": True}),
        ({"flops_profiler": {"enabled": True}}, {"deepspeed.flops_profiler": {"enabled": True}}),
        ({"deepspeed_extra_args": {"comms_logger": {"enabled": True}}}, {"deepspeed.comms_logger": {"enabled": True}}),
    ],
)
def test_a_key_becomes_ours(changes, wanted):
    got = settings(changes)
    assert {key: got[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": {"type": "sm3", "params": {}}}, "optimizer is not supported: sm3"),
        ({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.3}}, "weight_decay": 0.1}, "given twice"),
        ({"lr_decay_style": "exponential"}, "constant, linear or cosine"),
        ({"precision": "fp32", "fp16": {"enabled": True}}, "number formats contradict"),
        ({"precision": "fp8"}, "precision"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "static loss scale"),
        ({"train_data_paths": ["a"], "train_data_weights": [1, 2]}, "train_data_weights"),
        ({"train_epochs": 2}, "train_epochs"),
        ({"loss_scale": 1024}, "loss_scale"),
        ({"weight_by_num_documents": True}, "weight_by_num_documents"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(changes, said):
    assert said in "\n".join(result(changes)[2])


def test_a_whole_file_passes_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"data_path": "corpus", "zero_optimization": {"stage": 1, "reduce_scatter": True}, "checkpoint_factor": 100, "pipe_parallel_size": 1}
    (tmp_path / "a.yml").write_text(flow_text(BASE | more))
    loaded = load(["a.yml"])
    validate(loaded.config, 1, "cpu", loaded.origins)
