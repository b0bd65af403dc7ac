"""Translation of GPT-NeoX's keys of a run: optimizer, schedule, precision, batch, layout, data, checkpoints."""

from __future__ import annotations

import math

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS, PARTS
from neox.config.gpt_neox.translation import Translation

PUBLIC_WANDB = "https://api.wandb.ai"
OBJECTIVES = {"normal": "pretrain", "dpo": "dpo", "rm": "reward"}  # train_impl -> train.objective


def optimizer(work: Translation) -> None:
    """Translate the optimizer. GPT-NeoX's Adam is AdamW: decoupled weight decay, none on biases and norms."""
    section = work.value("optimizer")
    parameters = section.get("params", {}) if isinstance(section, dict) else None
    if not isinstance(parameters, dict):
        work.refuse("optimizer", "bad value", want="{type: ..., params: {...}}")
        return
    kind = str(section.get("type", "Adam")).lower().replace("_", "")
    ours = {"adam": "adamw", "adamw": "adamw", "cpuadam": "adamw", "cputorchadam": "adamw", "lion": "lion"}.get(kind)
    if ours is None:
        work.refuse(
            "optimizer",
            f"optimizer is not supported: {section.get('type')}",
            want="Adam or Lion",
            decides="optimizer.type",
        )
        return
    work.set("optimizer.type", ours, "optimizer")
    work.set("optimizer.lr", parameters.get("lr", 0.001), "optimizer")
    work.set("optimizer.betas", parameters.get("betas", [0.9, 0.999]), "optimizer")
    work.set("optimizer.eps", parameters.get("eps", 1e-8), "optimizer")
    unread = sorted(set(parameters) - {"lr", "betas", "eps", "weight_decay", "freeze_step", "momentum"})
    if unread:
        work.note(f"unused params: {', '.join(unread)}", "optimizer")
    inner = parameters.get("weight_decay")
    if inner is not None and "weight_decay" in work.given and inner != work.value("weight_decay"):
        work.refuse(
            "weight_decay", f"weight decay is given twice; it is {inner} in optimizer.params", want="one of them"
        )
    decay = "optimizer" if inner is not None else "weight_decay"
    work.set("optimizer.weight_decay", work.value("weight_decay") if inner is None else inner, decay)
    clip = work.first("gradient_clipping", "clip_grad")
    work.set("optimizer.gradient_clipping", work.value(clip), clip)


def schedule(work: Translation) -> None:
    """Translate the learning-rate schedule. A native `schedule.type` or `schedule.rule` takes precedence."""
    style = work.value("lr_decay_style")
    kind = work.native.get(("schedule", "type"), style)
    if kind not in ("constant", "linear", "cosine"):
        work.refuse(
            "lr_decay_style",
            "learning-rate decay is not supported",
            want="constant, linear or cosine",
            decides="schedule.type",
        )
    exact = work.native.get(("schedule", "rule"), "gpt_neox") == "gpt_neox" and kind in ("constant", "linear", "cosine")
    iterations = work.number("train_iters")
    end, source = decay_length(work, iterations)
    length = work.native.get(("schedule", "decay_iters")) or end or iterations
    work.set("schedule.type", style, "lr_decay_style")
    if exact:
        work.set("schedule.rule", "gpt_neox", "lr_decay_style")
    if end is not None:
        work.set("schedule.decay_iters", end, source)
    low = 0.0 if kind == "constant" else work.number("min_lr")
    if low is not None:
        work.set("schedule.min_lr", low, "min_lr")
    share = work.number("warmup")
    if not isinstance(length, (int, float)) or share is None:
        return
    warmup = share * length
    work.set("schedule.warmup_iters", warmup if exact else round(warmup), "warmup")
    if exact and 0 < warmup < 1:
        work.note(
            f"the warmup is {warmup:.3g} of a step, so the learning rate of the first step is {1 / warmup:.3g} times "
            "the peak, as in GPT-NeoX",
            "warmup",
        )
    if exact and kind == "cosine" and iterations and iterations > length:
        work.note(
            f"the learning rate rises again after step {length}, as in GPT-NeoX; schedule.rule: native keeps it at "
            "min_lr",
            "lr_decay_style",
        )


def decay_length(work: Translation, iterations: float | None) -> tuple[int | None, str]:
    """Return the iterations of the decay (None: train_iters) and the key that sets them.

    lr_decay_iters takes precedence over lr_decay_fraction.
    """
    if (end := work.number("lr_decay_iters")) is not None:
        return max(1, end), "lr_decay_iters"
    share = work.number("lr_decay_fraction")
    if share is None or iterations is None:
        return None, "lr_decay_iters"
    return max(1, math.floor(iterations * share)), "lr_decay_fraction"


def precision(work: Translation) -> None:
    """Translate `precision`, `fp16.enabled` and `bf16.enabled`. The default is fp32."""
    fp16, bf16 = (work.value(name) if isinstance(work.value(name), dict) else {} for name in ("fp16", "bf16"))
    sources: dict[str, str] = {}  # native dtype -> the key that selects it
    if fp16.get("enabled"):
        sources["bf16" if fp16.get("type") == "bfloat16" else "fp16"] = "fp16"
    if bf16.get("enabled"):
        sources["bf16"] = "bf16"
    named = {"bfloat16": "bf16", "fp16": "fp16", "fp32": "fp32"}.get(str(work.value("precision")))
    if work.value("precision") is not None and named is None:
        work.refuse("precision", "bad value", want="fp32, fp16 or bfloat16", decides="precision.dtype")
    if named is not None:
        sources.setdefault(named, "precision")
    if len(sources) > 1:
        first = work.first("precision", *sources.values())
        work.refuse(
            first, "conflicting number formats", want=f"one of {', '.join(sorted(sources))}", decides="precision.dtype"
        )
        return
    dtype, source = next(iter(sources.items()), ("fp32", ""))
    work.set("precision.dtype", dtype, source)
    if dtype != "fp16":
        return
    for theirs, ours in (
        ("initial_scale_power", "initial_scale_power"),
        ("loss_scale_window", "loss_scale_window"),
        ("min_loss_scale", "min_loss_scale"),
    ):
        if theirs in fp16:
            work.set(f"precision.{ours}", fp16[theirs], "fp16")
    if fp16.get("loss_scale"):
        work.refuse("fp16", "a static loss scale is not supported", want="loss_scale: 0, which is dynamic")


def zero(work: Translation) -> None:
    """Translate the ZeRO stage, and pass the other keys to DeepSpeed."""
    section = work.value("zero_optimization")
    if not isinstance(section, dict):
        work.refuse("zero_optimization", "bad value", want="a mapping with stage")
        return
    work.set("zero.stage", section.get("stage", 0), "zero_optimization")
    known = DEEPSPEED_KEYS["zero_optimization"] or ()
    for name, value in section.items():
        if name == "stage":
            continue
        if name in ("cpu_offload", "cpu_offload_param"):
            if value:
                target = "offload_optimizer" if name == "cpu_offload" else "offload_param"
                work.set(f"deepspeed.zero_optimization.{target}", {"device": "cpu"}, "zero_optimization")
        elif name in known:
            work.set(f"deepspeed.zero_optimization.{name}", value, "zero_optimization")
        else:
            work.note(f"{name} is not a key of the installed DeepSpeed; ignored", "zero_optimization")


def batch(work: Translation) -> None:
    """Translate the batch sizes, which have old and new names."""
    triangle = (
        ("micro_batch_size", ("train_micro_batch_size_per_gpu", "batch_size")),
        ("gradient_accumulation", ("gradient_accumulation_steps", "gas")),
    )
    for ours, names in triangle:
        name = work.first(*names)
        if work.value(name) is not None:
            work.set(f"train.{ours}", work.value(name), name)
    work.set(
        "train.activation_checkpointing",
        "full" if work.value("checkpoint_activations") else "none",
        "checkpoint_activations",
    )


def parallel(work: Translation) -> None:
    """Translate the parallel sizes. 0 and 1 both mean one process."""
    tensor, pipeline = work.number("model_parallel_size"), work.number("pipe_parallel_size")
    work.set("parallel.tensor", max(tensor or 0, 1), "model_parallel_size")
    work.set("parallel.pipeline", max(pipeline or 0, 1), "pipe_parallel_size")
    work.set("parallel.sequence", bool(work.value("sequence_parallel")) and (tensor or 0) > 1, "sequence_parallel")


def row_biases(work: Translation) -> None:
    """Scale the learning rate of row-parallel biases.

    With gpt_j_residual every rank has separate row-parallel biases, and the model adds their sum. All of them get the
    same gradient, so the sum learns faster.
    """
    ranks = work.number("model_parallel_size")
    if (
        isinstance(ranks, int)
        and ranks > 1
        and work.value("gpt_j_residual")
        and (work.value("use_bias_in_attn_linear") or work.value("use_bias_in_mlp"))
    ):
        work.set("optimizer.row_bias_lr_multiplier", ranks, "model_parallel_size")
        work.note(
            f"with gpt_j_residual each of the {ranks} ranks adds separate row-parallel biases, and their sum learns "
            f"{ranks} times as fast: "
            f"optimizer.row_bias_lr_multiplier: {ranks}",
            "model_parallel_size",
        )


def checkpoints(work: Translation) -> None:
    """Translate when and where checkpoints are saved, how many are retained, and which one the run starts from."""
    name = work.first("checkpoint_factor", "save_interval")
    factor, retained = work.number(name), work.number("keep_last_n_checkpoints")
    extra = list_of_steps(work, "extra_save_iters")
    if work.value("checkpoint_scale") == "log" and factor and factor > 1 and work.number("train_iters"):
        step = 1.0
        while step <= work.number("train_iters"):
            extra.append(int(step))
            step *= factor
        factor = 0
    work.set("checkpoint.save_interval", 0 if factor is None else int(factor), name)
    work.set("checkpoint.keep", retained or 0, "keep_last_n_checkpoints")
    if extra:
        work.set("checkpoint.save_iters", sorted(set(extra)), "extra_save_iters")
    save, load = work.value("save"), work.value("load")
    if save is not None:
        work.set("run.dir", save, "save")
    if load is not None and work.value("finetune"):
        work.set("checkpoint.init_from", load, "load")
        work.note("weights start from this neox checkpoint; convert a GPT-NeoX checkpoint with `neox import`", "load")
    elif load is not None and load != save:
        work.set("checkpoint.resume", load, "load")
        work.note("resumes from this neox checkpoint; convert a GPT-NeoX checkpoint with `neox import`", "load")


def list_of_steps(work: Translation, name: str) -> list[int]:
    """Return the steps that a key lists. Empty, and a problem, if it is not a list of integers."""
    steps = work.value(name)
    if not steps:
        return []
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        work.refuse(name, "bad value", want="a list of steps")
        return []
    return list(steps)


def evaluation(work: Translation) -> None:
    """Translate the evaluation. eval_iters: 0 disables it in GPT-NeoX."""
    iters = work.number("eval_iters")
    if iters == 0:
        work.set("evaluate.interval", 0, "eval_iters")
        return
    work.set("evaluate.interval", work.value("eval_interval"), "eval_interval")
    work.set("evaluate.iters", iters, "eval_iters")


def profile(work: Translation) -> None:
    """Translate the profiler's window of steps; profile_step_stop is exclusive."""
    start, stop = work.number("profile_step_start"), work.number("profile_step_stop")
    if work.value("profile") and start is not None and stop is not None and stop > start:
        work.set("profile.start", max(int(start), 1), "profile_step_start")
        work.set("profile.steps", int(stop - start), "profile_step_stop")
        work.set("profile.memory", bool(work.value("memory_profiling")), "memory_profiling")


def services(work: Translation) -> None:
    """Translate the options of Weights & Biases and Comet, if enabled."""
    if work.value("use_wandb"):
        work.set("logging.wandb.project", work.value("wandb_project"), work.first("wandb_project", "use_wandb"))
        for theirs, ours in (
            ("wandb_group", "group"),
            ("wandb_run_name", "name"),
            ("wandb_team", "entity"),
            ("wandb_host", "host"),
        ):
            if work.value(theirs) is not None and work.value(theirs) != PUBLIC_WANDB:
                work.set(f"logging.wandb.{ours}", work.value(theirs), theirs)
    if work.value("use_comet"):
        work.set("logging.comet.project", work.value("comet_project"), work.first("comet_project", "use_comet"))
        for theirs, ours in (
            ("comet_workspace", "workspace"),
            ("comet_experiment_name", "name"),
            ("comet_tags", "tags"),
        ):
            if work.value(theirs) is not None:
                work.set(f"logging.comet.{ours}", work.value(theirs), theirs)


PACKING = {"packed": "concatenate", "pack_until_overflow": "best_fit", "unpacked": "document"}


def data(work: Translation) -> None:
    """Translate datasets with their weights, packing, order and objective."""
    packing = PACKING.get(str(work.value("pack_impl")))
    if packing is None:
        work.refuse("pack_impl", "packing is not supported", want=", ".join(PACKING), decides="data.packing")
    elif packing != "concatenate":
        work.set("data.packing", packing, "pack_impl")
    if packing == "best_fit":
        work.set("data.order", "epoch", "pack_impl")
        work.note(
            "complete documents are packed by best fit, which pads less than GPT-NeoX, in another order", "pack_impl"
        )
    else:
        work.set("data.order", "neox", work.first("train_data_paths", "data_path"))
    if "data_path" in work.given:
        work.set("data.split", str(work.value("split")).replace(" ", ""), "split")
    objective = OBJECTIVES.get(str(work.value("train_impl")))
    if objective is None:
        work.refuse("train_impl", "train_impl is not supported", want=", ".join(OBJECTIVES), decides="train.objective")
        return
    side = "pos_" if objective in ("dpo", "reward") else ""
    if work.value("dataset_impl") != ("pairwise" if side else "gpt2") and "dataset_impl" in work.given:
        work.refuse(
            "dataset_impl", "dataset_impl does not match train_impl", want="pairwise with dpo and rm, gpt2 without"
        )
    for part, ours in PARTS.items():
        blend(work, f"{side}{part}", part, ours)
    if objective == "pretrain" and work.value("train_label_data_paths"):
        objective = "sft"
    if objective != "pretrain":
        work.set("train.objective", objective, "train_impl")
    if objective == "dpo":
        work.set("train.dpo_beta", work.value("dpo_beta"), "dpo_beta")
    if objective == "reward":
        work.set("model.output", "score", "train_impl")


def blend(work: Translation, theirs: str, part: str, ours: str) -> None:
    """Translate the sources of one part: prefixes, weights, and for post-training labels and rejected answers."""
    paths = work.value(f"{theirs}_data_paths")
    if not paths:
        return
    negative = f"neg_{part}" if theirs.startswith("pos_") else None
    columns = {"path": f"{theirs}_data_paths", "weight": f"{part}_data_weights", "labels": f"{theirs}_label_data_paths"}
    if negative:
        columns |= {"rejected": f"{negative}_data_paths", "rejected_labels": f"{negative}_label_data_paths"}
    given = {key: name for key, name in columns.items() if work.value(name)}
    for name in given.values():
        if not isinstance(work.value(name), list) or len(work.value(name)) != len(paths):
            what = (
                "weights do not match the datasets" if name.endswith("weights") else "datasets do not match each other"
            )
            work.refuse(name, what, want="one for each path", decides=f"data.{ours}")
            return
    rows = [
        dict(zip(given, row, strict=True)) for row in zip(*(work.value(name) for name in given.values()), strict=True)
    ]
    work.set(f"data.{ours}", paths if len(given) == 1 else rows, f"{theirs}_data_paths")


def deepspeed(work: Translation) -> None:
    """Pass keys of DeepSpeed's config through, except those that neox sets."""
    raw = {
        name: name for name, rule in GPT_NEOX_KEYS.items() if rule.to == (f"deepspeed.{name}",) and name in work.given
    }
    values = {name: work.value(name) for name in raw}
    extra = work.value("deepspeed_extra_args")
    for name, value in extra.items() if isinstance(extra, dict) else ():
        raw[name], values[name] = "deepspeed_extra_args", value
    for name, value in values.items():
        if name in OWNED_KEYS:
            work.note(f"{name} is set by {OWNED_KEYS[name]}", raw[name])
        elif value not in ({}, {"enabled": False}):
            work.set(f"deepspeed.{name}", value, raw[name])


STEPS = (
    optimizer,
    schedule,
    precision,
    zero,
    batch,
    parallel,
    row_biases,
    checkpoints,
    evaluation,
    profile,
    services,
    data,
    deepspeed,
)
