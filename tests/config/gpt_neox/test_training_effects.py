"""The complete effect of a key of a run: every native value that it changes, every note and every problem."""

from __future__ import annotations

import pytest

from neox.config.gpt_neox.files import translate
from neox.config.gpt_neox.translation import DEFAULT, Given
from tests.config.gpt_neox.sample_files import BASE
from tests.config.gpt_neox.test_model import result

PLAIN = result({})[0]
PAIRS = {f"{side}_train_data_paths": [f"{side}1", f"{side}2"] for side in ("pos", "neg")} | {"dataset_impl": "pairwise"}
PAIR_ROWS = [{"path": "pos1", "rejected": "neg1"}, {"path": "pos2", "rejected": "neg2"}]
LION = {"optimizer.type": "lion"}
NO_MEMORY = {"profile.memory": False}
GATHERED = "deepspeed.zero_optimization"


def effect(changes: dict, native: dict | None = None) -> dict:
    """The native values that changes of the base file give or change; None for one that they take away."""
    values, _, problems = result(changes, native)
    assert problems == []
    missing = dict.fromkeys(PLAIN.keys() - values.keys())
    return missing | {key: value for key, value in values.items() if key not in PLAIN or PLAIN[key] != value}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # optimizer
        *(
            ({"optimizer": {"type": kind}}, {} if name == "adamw" else LION)
            for kind, name in {
                **dict.fromkeys(("Adam", "AdamW", "cpu_adam", "CPU_Torch_Adam"), "adamw"),
                **dict.fromkeys(("Lion", "lion"), "lion"),
            }.items()
        ),
        ({"optimizer": {"type": "Lion"}}, LION),
        ({"optimizer": {"params": {"lr": 2}}}, {"optimizer.lr": 2}),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 3, "betas": [0.1, 0.2], "eps": 4, "weight_decay": 5}}},
            {
                "optimizer.lr": 3,
                "optimizer.betas": [0.1, 0.2],
                "optimizer.eps": 4,
                "optimizer.weight_decay": 5,
            },
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.0}}},
            {"optimizer.weight_decay": 0.0},
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.3}}, "weight_decay": 0.3},
            {"optimizer.weight_decay": 0.3},
        ),
        ({"weight_decay": 0}, {"optimizer.weight_decay": 0}),
        ({"gradient_clipping": 0.25, "clip_grad": 0.5}, {"optimizer.gradient_clipping": 0.25}),
        # schedule: BASE has 1000 steps
        ({"min_lr": 1e-5}, {"schedule.min_lr": 1e-5}),
        ({"warmup": 0.0}, {"schedule.warmup_iters": 0}),
        ({"warmup": 0.0025}, {"schedule.warmup_iters": 2.5}),
        ({"lr_decay_iters": 0}, {"schedule.decay_iters": 1, "schedule.warmup_iters": 0.01}),
        ({"lr_decay_fraction": 0.0001}, {"schedule.decay_iters": 1, "schedule.warmup_iters": 0.01}),
        ({"lr_decay_style": "cosine"}, {"schedule.type": "cosine"}),
        # precision
        ({"precision": "fp16"}, {"precision.dtype": "fp16"}),
        ({"precision": "fp16", "fp16": {"enabled": True}}, {"precision.dtype": "fp16"}),
        ({"precision": "fp32"}, {}),
        ({"precision": "bfloat16", "fp16": {"enabled": False, "initial_scale_power": 3}}, {"precision.dtype": "bf16"}),
        ({"bf16": {"enabled": False}}, {}),
        (
            {"fp16": {"fp16": True, "enabled": True, "loss_scale_window": 7, "min_loss_scale": 2, "hysteresis": 2}},
            {"precision.dtype": "fp16", "precision.loss_scale_window": 7, "precision.min_loss_scale": 2},
        ),
        # ZeRO
        ({"zero_optimization": {}}, {}),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload": False, "cpu_offload_param": True}},
            {"zero.stage": 3, f"{GATHERED}.offload_param": {"device": "cpu"}},
        ),
        (
            {"zero_optimization": {"allgather_bucket_size": 5, "reduce_bucket_size": 6}},
            {f"{GATHERED}.allgather_bucket_size": 5, f"{GATHERED}.reduce_bucket_size": 6},
        ),
        # batch and layout
        ({"batch_size": 9}, {}),  # the new name wins
        ({"gas": 2, "gradient_accumulation_steps": 3}, {"train.gradient_accumulation": 3}),
        ({"gas": 2}, {"train.gradient_accumulation": 2}),
        ({"pipe_parallel_size": 1}, {}),
        ({"pipe_parallel_size": 4}, {"parallel.pipeline": 4}),
        ({"model_parallel_size": 0}, {}),
        (
            {"model_parallel_size": 2, "make_vocab_size_divisible_by": 64},
            {"parallel.tensor": 2},
        ),
        (
            {"model_parallel_size": 2, "make_vocab_size_divisible_by": 64, "gpt_j_residual": True},
            {"parallel.tensor": 2, "model.parallel_residual": True, "optimizer.row_bias_lr_multiplier": 2},
        ),
        (
            {
                "model_parallel_size": 2,
                "make_vocab_size_divisible_by": 64,
                "sequence_parallel": True,
            },
            {"parallel.tensor": 2, "parallel.sequence": True},
        ),
        # checkpoints
        ({"checkpoint_factor": 5, "save_interval": 6}, {"checkpoint.save_interval": 5}),
        ({"checkpoint_scale": "log", "checkpoint_factor": 1}, {"checkpoint.save_interval": 1}),
        (
            {"checkpoint_scale": "log", "checkpoint_factor": 4, "extra_save_iters": [0, 5, 16]},
            {"checkpoint.save_iters": [0, 1, 4, 5, 16, 64, 256]},
        ),
        (
            {"checkpoint_scale": "log", "checkpoint_factor": 2.5, "train_iters": 40},
            {
                "train.train_iters": 40,
                "schedule.warmup_iters": 0.4,
                "checkpoint.save_iters": [1, 2, 6, 15, 39],
            },
        ),
        ({"keep_last_n_checkpoints": 2}, {"checkpoint.keep": 2}),
        ({"extra_save_iters": []}, {}),
        ({"save": "out"}, {"run.dir": "out"}),
        ({"finetune": True}, {}),
        ({"load": "old", "finetune": True}, {"checkpoint.init_from": "old"}),
        ({"load": "same", "save": "same", "finetune": True}, {"run.dir": "same", "checkpoint.init_from": "same"}),
        ({"load": "old", "save": "new"}, {"run.dir": "new", "checkpoint.resume": "old"}),
        # evaluation and profile
        ({"eval_iters": 3}, {"evaluate.iters": 3}),
        ({"eval_interval": 3}, {"evaluate.interval": 3}),
        ({"eval_iters": 0}, {"evaluate.interval": 0, "evaluate.iters": None}),
        ({"memory_profiling": True, "profile_step_start": 3}, {}),
        ({"profile": True}, {"profile.start": 10, "profile.steps": 2, **NO_MEMORY}),
        ({"profile": True, "profile_step_stop": 10}, {}),
        ({"profile": True, "profile_step_stop": 11}, {"profile.start": 10, "profile.steps": 1, **NO_MEMORY}),
        (
            {"profile": True, "profile_step_start": 0, "profile_step_stop": 4},
            {"profile.start": 1, "profile.steps": 4, **NO_MEMORY},
        ),
        # services
        ({"wandb_project": "p", "comet_project": "q", "wandb_host": "h"}, {}),
        (
            {"use_wandb": True, "use_comet": True},
            {"logging.wandb.project": "neox", "logging.comet.project": "neox"},
        ),
        (
            {
                "use_wandb": True,
                "wandb_project": "p",
                "wandb_group": "g",
                "wandb_run_name": "n",
                "wandb_team": "t",
                "wandb_host": "https://example.org",
            },
            {
                "logging.wandb.project": "p",
                "logging.wandb.group": "g",
                "logging.wandb.name": "n",
                "logging.wandb.entity": "t",
                "logging.wandb.host": "https://example.org",
            },
        ),
        ({"use_wandb": True, "wandb_host": "https://api.wandb.ai"}, {"logging.wandb.project": "neox"}),
        (
            {
                "use_comet": True,
                "comet_project": "p",
                "comet_workspace": "w",
                "comet_experiment_name": "n",
                "comet_tags": ["a"],
            },
            {
                "logging.comet.project": "p",
                "logging.comet.workspace": "w",
                "logging.comet.name": "n",
                "logging.comet.tags": ["a"],
            },
        ),
        # data
        ({"data_path": "a"}, {"data.path": "a", "data.split": "969,30,1"}),
        ({"split": "1,2,3"}, {}),
        ({"pack_impl": "packed"}, {}),
        ({"pack_impl": "unpacked"}, {"data.packing": "document"}),
        ({"pack_impl": "pack_until_overflow"}, {"data.packing": "best_fit", "data.order": "epoch"}),
        ({"test_data_paths": ["a"], "valid_data_paths": ["b"]}, {"data.test": ["a"], "data.validation": ["b"]}),
        (
            {"train_data_paths": ["a", "b"], "train_data_weights": [1, 2]},
            {"data.train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]},
        ),
        ({"train_data_paths": ["a"], "train_label_data_paths": ["l"], "train_data_weights": [3]},
         {"train.objective": "sft", "data.train": [{"path": "a", "weight": 3, "labels": "l"}]}),
        ({"valid_data_paths": ["a"], "valid_label_data_paths": ["l"]},
         {"data.validation": [{"path": "a", "labels": "l"}]}),
        ({"train_impl": "normal", "dataset_impl": "gpt2"}, {}),
        (
            {"train_impl": "dpo", **PAIRS},
            {"train.objective": "dpo", "train.dpo_beta": 0.1, "data.train": PAIR_ROWS},
        ),
        (
            {"train_impl": "rm", "dpo_beta": 3, **PAIRS},
            {"train.objective": "reward", "model.output": "score", "data.train": PAIR_ROWS},
        ),
        (
            {
                "train_impl": "rm",
                "train_data_weights": [1, 2],
                "pos_train_label_data_paths": ["m1", "m2"],
                "neg_train_label_data_paths": ["n1", "n2"],
                "train_label_data_paths": ["x"],
                **PAIRS,
            },
            {
                "train.objective": "reward",
                "model.output": "score",
                "data.train": [
                    row | {"weight": i, "labels": f"m{i}", "rejected_labels": f"n{i}"}
                    for i, row in enumerate(PAIR_ROWS, 1)
                ],
            },
        ),
        # DeepSpeed
        ({"flops_profiler": {}}, {}),
        ({"flops_profiler": {"enabled": False}}, {}),
        ({"flops_profiler": {"enabled": False, "top_modules": 3}},
         {"deepspeed.flops_profiler": {"enabled": False, "top_modules": 3}}),
        ({"prescale_gradients": True}, {"deepspeed.prescale_gradients": True}),
        ({"deepspeed_extra_args": {"dump_state": True, "aio": {}}}, {"deepspeed.dump_state": True}),
    ],
    ids=lambda value: ",".join(value)[:60],
)  # fmt: skip
def test_a_key_has_its_effect_and_no_other(changes, wanted):
    assert effect(changes) == wanted


@pytest.mark.parametrize(
    ("native", "wanted"),
    [
        ({"schedule.type": "cosine"}, {}),
        ({"schedule.rule": "native"}, {"schedule.rule": None}),
        ({"schedule.type": "wsd"}, {"schedule.rule": None}),
        ({"schedule.rule": "gpt_neox"}, {}),
        ({"schedule.decay_iters": 300}, {"schedule.warmup_iters": 3}),
        ({"train.train_iters": 3}, {"schedule.warmup_iters": 0.03}),
        ({"train.train_iters": 270, "schedule.rule": "native"}, {"schedule.rule": None, "schedule.warmup_iters": 3}),
    ],
    ids=str,
)
def test_a_native_key_changes_what_depends_on_it(native, wanted):
    assert effect({}, {tuple(key.split(".")): value for key, value in native.items()}) == wanted


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optimizer": {"params": {"b": 1, "aa": 2, "momentum": 3, "lr": 1}}}, "optimizer: unused params: aa, "),
        ({"warmup": 0.0005}, "warmup: the warmup is 0.5 of a step, so the learning rate of the first step is 2 times "),
        (
            {"lr_decay_style": "cosine", "lr_decay_iters": 999},
            "lr_decay_style: the learning rate rises again after step 999,",
        ),
        ({"zero_optimization": {"bogus": 1}}, "zero_optimization: bogus is not a key of the installed DeepSpeed"),
        (
            {"gpt_j_residual": True, "model_parallel_size": 2},
            "model_parallel_size: with gpt_j_residual each of the 2 ranks adds separate row-parallel biases, "
            "and their sum learns 2 times as fast: optimizer.row_bias_lr_multiplier: 2",
        ),
        ({"load": "x"}, "load: resumes from this neox checkpoint; convert"),
        ({"load": "x", "finetune": True}, "load: weights start from this neox checkpoint; convert"),
        ({"pack_impl": "pack_until_overflow"}, "pack_impl: complete documents are packed by best fit"),
        ({"deepspeed_extra_args": {"bf16": {}}}, "deepspeed_extra_args: bf16 is set by precision.dtype"),
    ],
    ids=lambda value: ",".join(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_only_additional_note(changes, part):
    common = result({})[1]
    (note,) = [note for note in result(changes)[1] if note not in common and "padded to a multiple of" not in note]
    assert note.startswith(f"a.yml:1 {part}")


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 0.001},  # one step exactly
        {"warmup": 0.0},
        {"lr_decay_style": "cosine", "lr_decay_iters": 1000},
        {"lr_decay_style": "linear", "lr_decay_iters": 100},
        {"optimizer": {"type": "Adam", "params": {"freeze_step": 1, "momentum": 1, "eps": 1, "weight_decay": 1}}},
        {"load": "same", "save": "same"},
        {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        {"deepspeed_extra_args": {"dump_state": True}},
    ],
    ids=str,
)
def test_nothing_unusual_is_noted(changes):
    assert result(changes)[1] == result({})[1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer": 3}, "bad value; where=a.yml:1 optimizer; got=3; want={type: ..., params: {...}}"),
        ({"optimizer": {"type": "Adam", "params": [1]}}, "bad value; where=a.yml:1 optimizer; got={"),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.3}}, "weight_decay": 0.2},
            "weight decay is given twice; it is 0.3 in optimizer.params; where=a.yml:1 weight_decay; got=0.2; want=one",
        ),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "conflicting number formats; where=a.yml:1 fp16; got={'enabled': True}; want=one of bf16, fp16",
        ),
        (
            {"precision": "fp32", "bf16": {"enabled": True}},
            "conflicting number formats; where=a.yml:1 precision; got='fp32'; want=one of bf16, fp32",
        ),
        ({"zero_optimization": [1]}, "bad value; where=a.yml:1 zero_optimization; got=[1]; want=a mapping with stage"),
        ({"pack_impl": "x"}, "packing is not supported; where=a.yml:1 pack_impl; got='x'; want=packed, pack_until_ov"),
        ({"train_impl": "kto"}, "train_impl is not supported; where=a.yml:1 train_impl; got='kto'; want=normal, dpo"),
        (
            {"dataset_impl": "pairwise"},
            "dataset_impl does not match train_impl; where=a.yml:1 dataset_impl; got='pairwise'; "
            "want=pairwise with dpo and rm, gpt2 without",
        ),
        ({"train_impl": "dpo", "dataset_impl": "gpt2"}, "dataset_impl does not match train_impl; where=a.yml:1 datas"),
        (
            {"train_data_paths": ["a", "b"], "train_data_weights": [1]},
            "weights do not match the datasets; where=a.yml:1 train_data_weights; got=[1]; want=one for each path",
        ),
        (
            {"valid_data_paths": ["a", "b"], "valid_label_data_paths": ["l", "m", "n"]},
            "datasets do not match each other; where=a.yml:1 valid_label_data_paths; got=['l', 'm', 'n']; want=one for",
        ),
        (
            {"train_data_paths": ["a"], "train_data_weights": 1},
            "weights do not match the datasets; where=a.yml:1 train_data_weights; got=1; want=one for each path",
        ),
        (
            {"train_impl": "rm"} | PAIRS | {"neg_train_data_paths": ["n"]},
            "datasets do not match each other; where=a.yml:1 neg_train_data_paths; got=['n']; want=one for each path",
        ),
        ({"extra_save_iters": [True]}, "bad value; where=a.yml:1 extra_save_iters; got=[True]; want=a list of steps"),
        ({"eval_iters": "all"}, "bad value; where=a.yml:1 eval_iters; got='all'; want=a number"),
        ({"model_parallel_size": "2"}, "bad value; where=a.yml:1 model_parallel_size; got='2'; want=a number"),
        ({"checkpoint_factor": "x"}, "bad value; where=a.yml:1 checkpoint_factor; got='x'; want=a number"),
    ],
    ids=lambda value: ",".join(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_complete_report_of_a_problem(changes, problem):
    lines = list(dict.fromkeys(result(changes)[2]))
    assert len(lines) == 1 and lines[0].startswith(f"error[2] {problem}"), lines


@pytest.mark.parametrize(
    ("changes", "native"),
    [
        ({"optimizer": {"type": "sgd"}}, "optimizer.type"),
        ({"lr_decay_style": "exponential"}, "schedule.type"),
        ({"precision": "fp8"}, "precision.dtype"),
        ({"precision": "fp32", "fp16": {"enabled": True}}, "precision.dtype"),
        ({"pack_impl": "x"}, "data.packing"),
        ({"train_impl": "kto"}, "train.objective"),
        ({"train_data_paths": ["a"], "train_data_weights": [1, 2]}, "data.train"),
    ],
    ids=str,
)
def test_a_native_key_decides_what_is_not_supported(changes, native):
    assert len(result(changes)[2]) == 1
    assert result(changes, {tuple(native.split(".")): "linear"})[2] == []
    assert len(result(changes, {("model", "num_layers"): 2})[2]) == 1


def test_values_have_the_line_of_the_key_that_they_come_from():
    changes = {
        "clip_grad": 1,
        "optimizer": {"type": "Adam", "params": {"weight_decay": 0.2}},
        "min_lr": 1e-5,
        "lr_decay_fraction": 0.5,
        "fp16": {"enabled": True, "loss_scale_window": 3},
        "zero_optimization": {"stage": 1, "overlap_comm": True, "cpu_offload": True},
        "gas": 2,
        "save_interval": 3,
        "extra_save_iters": [1],
        "eval_iters": 5,
        "use_wandb": True,
        "data_path": "a",
        "pack_impl": "pack_until_overflow",
        "train_data_paths": ["t"],
        "train_label_data_paths": ["l"],
        "deepspeed_extra_args": {"dump_state": True},
        "comms_logger": {"enabled": True},
    }
    given = {key: Given(value, "a.yml", line) for line, (key, value) in enumerate((BASE | changes).items(), 1)}
    settings, _, problems = translate(given, {})
    assert problems == []
    lines = {item.line: key for key, item in given.items()}
    sources = {".".join(item.path): lines.get(item.line) for item in settings}
    expected = {
        "optimizer.gradient_clipping": "clip_grad",
        "optimizer.weight_decay": "optimizer",
        "optimizer.lr": "optimizer",
        "schedule.type": None,
        "schedule.decay_iters": "lr_decay_fraction",
        "schedule.min_lr": "min_lr",
        "schedule.warmup_iters": None,
        "precision.dtype": "fp16",
        "precision.loss_scale_window": "fp16",
        "zero.stage": "zero_optimization",
        f"{GATHERED}.overlap_comm": "zero_optimization",
        f"{GATHERED}.offload_optimizer": "zero_optimization",
        "train.micro_batch_size": "train_micro_batch_size_per_gpu",
        "train.gradient_accumulation": "gas",
        "checkpoint.save_interval": "save_interval",
        "checkpoint.save_iters": "extra_save_iters",
        "evaluate.interval": None,
        "evaluate.iters": "eval_iters",
        "logging.wandb.project": "use_wandb",
        "data.split": None,
        "data.path": "data_path",
        "data.packing": "pack_impl",
        "data.order": "pack_impl",
        "data.train": "train_data_paths",
        "train.objective": None,
        "deepspeed.dump_state": "deepspeed_extra_args",
        "deepspeed.comms_logger": "comms_logger",
    }
    assert {key: sources[key] for key in expected} == expected
    assert {item.source for item in settings} == {"a.yml", DEFAULT}
    assert all((item.source == DEFAULT) == (item.line == 0) for item in settings)
