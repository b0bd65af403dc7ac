"""Upstream's description of a run: schedule, precision, batch, layout, data, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox.config.load import load
from neox.config.validate import validate
from neox.engine.lr_schedule import build_lr_schedule
from tests.config.gpt_neox.sample_files import BASE, flow_text
from tests.config.gpt_neox.test_model import result


def settings(changes: dict) -> dict:
    values, _, problems = result(changes)
    assert problems == []
    return values


RATES = json.loads((Path(__file__).parent / "learning_rates.json").read_text())


@pytest.mark.parametrize("row", RATES, ids=range(len(RATES)))
def test_the_learning_rate_matches_the_scheduler_of_gpt_neox(row, tmp_path):
    """The rates were written by megatron/training.py:get_learning_rate_scheduler, stepped unless the step
    overflowed.
    """
    keys = ("train_iters", "lr_decay_style", "min_lr", "warmup", "lr_decay_iters", "lr_decay_fraction")
    file = (
        BASE
        | {key: row[key] for key in keys if key in row}
        | {"optimizer": {"type": "Adam", "params": {"lr": row["lr"]}}}
    )
    (tmp_path / "a.yml").write_text(flow_text(file | {"vocab_file": None, "tokenizer_type": "GPT2BPETokenizer"}))
    config = load([tmp_path / "a.yml"]).config
    schedule = build_lr_schedule(config.schedule, config.optimizer, config.train.train_iters)
    skipped = row.get("overflows", [])
    got = {
        step: schedule.learning_rate(int(step), int(step) - 1 - sum(n < int(step) for n in skipped))
        for step in row["rates"]
    }
    assert got == pytest.approx(row["rates"], rel=1e-12)


def test_the_schedule_follows_native_settings():
    file = {"warmup": 0.025, "lr_decay_style": "cosine", "min_lr": 1e-4}

    def schedule(**native) -> dict:
        values, _, problems = result(file, {tuple(key.split("__")): value for key, value in native.items()})
        assert problems == []
        return {key: value for key, value in values.items() if key.startswith("schedule.")}

    assert schedule(train__train_iters=100)["schedule.warmup_iters"] == 2.5
    assert schedule(schedule__decay_iters=300)["schedule.warmup_iters"] == 7.5
    for native in ({"schedule__rule": "native"}, {"schedule__type": "wsd"}):
        got = schedule(train__train_iters=100, **native)
        assert "schedule.rule" not in got and got["schedule.warmup_iters"] == 2


def test_notes_mention_unusual_rates():
    assert any(
        "learning rate of the first step is 5 times the peak" in note
        for note in result({"train_iters": 20, "warmup": 0.01})[1]
    )
    assert any(
        "rises again after step 500" in note for note in result({"lr_decay_style": "cosine", "lr_decay_iters": 500})[1]
    )
    assert not any("rises" in note for note in result({"lr_decay_style": "cosine", "lr_decay_iters": 1000})[1])


def test_defaults_are_those_of_gpt_neox():
    got = settings({})
    wanted = {
        "optimizer.type": "adamw",
        "optimizer.lr": 0.001,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.1,
        "optimizer.gradient_clipping": 1.0,
        "schedule.type": "linear",
        "schedule.rule": "gpt_neox",
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
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.3}}},
            {"optimizer.type": "lion", "optimizer.weight_decay": 0.3},
        ),
        ({"clip_grad": 0.5}, {"optimizer.gradient_clipping": 0.5}),
        ({"pack_impl": "unpacked"}, {"data.packing": "document", "data.order": "neox"}),
        ({"pack_impl": "pack_until_overflow"}, {"data.packing": "best_fit", "data.order": "epoch"}),
        ({"lr_decay_style": "constant", "min_lr": 1e-5}, {"schedule.type": "constant", "schedule.min_lr": 0.0}),
        (
            {"lr_decay_fraction": 0.5, "lr_decay_style": "cosine"},
            {"schedule.decay_iters": 500, "schedule.warmup_iters": 5},
        ),
        (
            {"lr_decay_fraction": 0.4999, "lr_decay_style": "cosine"},
            {"schedule.decay_iters": 499, "schedule.warmup_iters": 4.99},
        ),
        ({"lr_decay_fraction": 0.5, "lr_decay_iters": 700}, {"schedule.decay_iters": 700, "schedule.warmup_iters": 7}),
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
            {
                "zero.stage": 2,
                "deepspeed.zero_optimization.overlap_comm": True,
                "deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"},
            },
        ),
        (
            {"train_micro_batch_size_per_gpu": None, "batch_size": 3, "gas": 2},
            {"train.micro_batch_size": 3, "train.gradient_accumulation": 2},
        ),
        ({"train_batch_size": 64}, {"train.global_batch_size": 64, "train.micro_batch_size": 4}),
        (
            {"pipe_parallel_size": 0, "model_parallel_size": 1, "sequence_parallel": True},
            {"parallel.tensor": 1, "parallel.sequence": False},
        ),
        (
            {"pipe_parallel_size": 2, "model_parallel_size": 2, "sequence_parallel": True},
            {"parallel.pipeline": 2, "parallel.sequence": True},
        ),
        (
            {"checkpoint_factor": 100, "extra_save_iters": [0, 1, 2, 1]},
            {"checkpoint.save_interval": 100, "checkpoint.save_iters": [0, 1, 2]},
        ),
        ({"save_interval": 50, "keep_last_n_checkpoints": 3}, {"checkpoint.save_interval": 50, "checkpoint.keep": 3}),
        (
            {"checkpoint_scale": "log", "checkpoint_factor": 10},
            {"checkpoint.save_interval": 0, "checkpoint.save_iters": [1, 10, 100, 1000]},
        ),
        ({"save": "out", "load": "out"}, {"run.dir": "out"}),
        ({"save": "out", "load": "old", "finetune": True}, {"run.dir": "out", "checkpoint.init_from": "old"}),
        ({"load": "old"}, {"checkpoint.resume": "old"}),
        ({"checkpoint_activations": True}, {"train.activation_checkpointing": "full"}),
        ({"data_path": "a", "split": "949, 50, 1"}, {"data.path": "a", "data.split": "949,50,1"}),
        ({"train_data_paths": ["a", "b"]}, {"data.train": ["a", "b"]}),
        ({"valid_data_paths": ["a"], "valid_data_weights": [2.0]}, {"data.validation": [{"path": "a", "weight": 2.0}]}),
        ({"gpt_j_residual": True, "model_parallel_size": 4}, {"optimizer.row_bias_lr_multiplier": 4}),
        (
            {"gpt_j_residual": True, "model_parallel_size": 2, "use_bias_in_attn_linear": False},
            {"optimizer.row_bias_lr_multiplier": 2},
        ),
        ({"eval_interval": 7, "eval_iters": 3}, {"evaluate.interval": 7, "evaluate.iters": 3}),
        ({"eval_interval": 7, "eval_iters": 0}, {"evaluate.interval": 0}),
        (
            {"profile": True, "memory_profiling": True},
            {"profile.start": 10, "profile.steps": 2, "profile.memory": True},
        ),
        ({"flops_profiler": {"enabled": True}}, {"deepspeed.flops_profiler": {"enabled": True}}),
        ({"deepspeed_extra_args": {"comms_logger": {"enabled": True}}}, {"deepspeed.comms_logger": {"enabled": True}}),
    ],
)
def test_a_key_is_translated(changes, wanted):
    got = settings(changes)
    assert {key: got[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    "changes",
    [{"model_parallel_size": 4}, {"gpt_j_residual": True}, {"gpt_j_residual": True, "model_parallel_size": 0}],
)
def test_biases_that_are_added_once_learn_at_the_common_rate(changes):
    assert "optimizer.row_bias_lr_multiplier" not in settings(changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optimizer": {"type": "sm3", "params": {}}}, "optimizer is not supported: sm3"),
        ({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.3}}, "weight_decay": 0.1}, "given twice"),
        ({"lr_decay_style": "exponential"}, "constant, linear or cosine"),
        ({"precision": "fp32", "fp16": {"enabled": True}}, "conflicting number formats"),
        ({"precision": "fp8"}, "precision"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "static loss scale"),
        ({"train_data_paths": ["a"], "train_data_weights": [1, 2]}, "train_data_weights"),
        ({"train_epochs": 2}, "train_epochs"),
        ({"loss_scale": 1024}, "loss_scale"),
        ({"weight_by_num_documents": True}, "weight_by_num_documents"),
        ({"precision": {"dtype": "bf16"}}, "bad value; where=a.yml:1 precision"),
        ({"precision": ["bf16"]}, "bad value; where=a.yml:1 precision"),
        ({"extra_save_iters": 5}, "want=a list of steps"),
        ({"extra_save_iters": [5, "10"]}, "want=a list of steps"),
        ({"train_iters": 10**400}, "want=a finite number"),
        ({"lr_decay_fraction": float("nan")}, "want=a finite number"),
    ],
)
def test_unsupported_values_are_refused_by_name(changes, part):
    assert part in "\n".join(result(changes)[2])


def test_a_complete_file_passes_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {
        "data_path": "corpus",
        "zero_optimization": {"stage": 1, "reduce_scatter": True},
        "checkpoint_factor": 100,
        "pipe_parallel_size": 1,
    }
    (tmp_path / "a.yml").write_text(flow_text(BASE | more))
    loaded = load(["a.yml"])
    validate(loaded.config, 1, "cpu", loaded.origins)
