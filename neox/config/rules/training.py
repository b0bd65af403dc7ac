"""Rules of schedule, precision, output folders, health checks and DeepSpeed's own keys."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Collection, Iterator

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, REMOVED_KEYS
from neox.config.problems import nearest
from neox.config.rules.conflict import Conflict, Environment
from neox.config.schema import Config


def schedule(config: Config, _: Environment) -> Iterator[Conflict]:
    """The phases of the schedule must fit into its length, and min_lr must not exceed lr."""
    plan = config.schedule
    end = "schedule.decay_iters" if plan.decay_iters is not None else "train.train_iters"
    length = plan.decay_iters or config.train.train_iters
    if plan.warmup_iters > length:
        keys = ("schedule.warmup_iters", end)
        yield Conflict("warmup is longer than the schedule", keys, f"warmup_iters at most {end}")
    if plan.min_lr > config.optimizer.lr:
        yield Conflict(
            "min_lr exceeds the peak learning rate", ("schedule.min_lr", "optimizer.lr"), "min_lr at most lr"
        )
    if plan.rule == "gpt_neox" and plan.type not in ("constant", "linear", "cosine"):
        keys, rule = ("schedule.rule", "schedule.type"), "rule: native, or type constant, linear or cosine"
        yield Conflict("GPT-NeoX has no such schedule", keys, rule)
    if plan.rule == "native" and isinstance(plan.warmup_iters, float):
        keys = ("schedule.warmup_iters", "schedule.rule")
        do = "give a number of iterations, not a fraction of the run"
        yield Conflict("fractional warmup_iters", keys, "a whole number of iterations with rule: native", do)
    if plan.type == "wsd":
        if plan.cooldown_iters == 0:
            keys = ("schedule.type", "schedule.cooldown_iters")
            yield Conflict("wsd without cooldown", keys, "cooldown_iters above 0")
        elif plan.warmup_iters <= length < plan.warmup_iters + plan.cooldown_iters:
            keys = ("schedule.warmup_iters", "schedule.cooldown_iters", end)
            yield Conflict("warmup and cooldown overlap", keys, f"warmup_iters + cooldown_iters at most {end}")
    elif plan.cooldown_iters:
        keys = ("schedule.cooldown_iters", "schedule.type")
        yield Conflict("schedule has no cooldown", keys, "type: wsd with cooldown_iters")
    if plan.type == "constant" and plan.min_lr:
        yield Conflict("constant schedule with min_lr", ("schedule.min_lr", "schedule.type"), "min_lr: 0")


def precision(config: Config, environment: Environment) -> Iterator[Conflict]:
    """The device must support the number format."""
    if config.precision.dtype == "fp16" and environment.device == "cpu":
        facts = (("device", "cpu"),)
        yield Conflict("fp16 needs a GPU", ("precision.dtype",), "bf16 or fp32 on a CPU", facts=facts)
    if config.precision.min_loss_scale > 2.0**config.precision.initial_scale_power:
        keys = ("precision.min_loss_scale", "precision.initial_scale_power")
        rule = "min_loss_scale at most 2 to the initial_scale_power"
        yield Conflict("initial loss scale is below the minimum", keys, rule)


def folders(config: Config, _: Environment) -> Iterator[Conflict]:
    """Paths must be valid, and the folder of the run must not be a file."""
    for key, text in (("run.dir", config.run.dir), ("checkpoint.resume", config.checkpoint.resume)):
        if not text.strip() or "\0" in text:
            yield Conflict("path is empty or invalid", (key,), "a path")
    keys = ("run.dir",)
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in config.run.dir):
        rule = "a name without line breaks and control characters"
        yield Conflict("run.dir has control characters in its name", keys, rule)
    if config.run.dir.strip() and os.path.realpath(config.run.dir.replace("\0", "")) == os.sep:
        yield Conflict("run.dir is the root of the file system", keys, "a separate folder, such as runs/first")
    try:
        mode = os.stat(config.run.dir.replace("\0", "")).st_mode
    except OSError as error:  # it does not exist, or its creation reports why it cannot be reached
        if error.errno == errno.ENAMETOOLONG:
            yield Conflict("run.dir has a name that is too long", keys, "a shorter name")
        return
    if not stat.S_ISDIR(mode):
        yield Conflict("run.dir is a file", keys, "a folder, or a name that does not exist")


def rollback(config: Config, _: Environment) -> Iterator[Conflict]:
    """A rollback needs a checkpoint to restore, and data beyond train_iters."""
    if config.guard.loss_spike != "rollback":
        return
    if config.data.order == "neox":
        keys, rule = ("guard.loss_spike", "data.order"), "data.order: epoch, which is unbounded, for rollback"
        yield Conflict("sample order ends with train_iters", keys, rule)
    if not config.checkpoint.save_interval and not config.checkpoint.save_iters:
        keys = ("guard.loss_spike", "checkpoint.save_interval")
        yield Conflict("no checkpoint to roll back to", keys, "checkpoint.save_interval above 0 for rollback")


def deepspeed(config: Config, _: Environment) -> Iterator[Conflict]:
    """DeepSpeed must know the keys below `deepspeed`, and neox must not set them."""
    for name, value in config.deepspeed.items():
        yield from deepspeed_key(name, DEEPSPEED_KEYS)
        known = DEEPSPEED_KEYS.get(name)
        if name in OWNED_KEYS or known is None:
            continue
        if not isinstance(value, dict):
            yield Conflict("not a section", (f"deepspeed.{name}",), f"keys below it, such as {known[0]}")
            continue
        for inner in value:
            yield from deepspeed_key(f"{name}.{inner}", tuple(f"{name}.{key}" for key in known))
    comet = config.deepspeed.get("comet")
    if isinstance(comet, dict) and "api_key" in comet:
        facts = (("key", "deepspeed.comet.api_key"),)
        yield Conflict("secret in a config", (), "secrets in the environment, as COMET_API_KEY", facts=facts)
    yield from offload(config)
    yield from gradient_norm(config)


def deepspeed_key(key: str, known: Collection[str]) -> Iterator[Conflict]:
    """Check one dotted key of DeepSpeed."""
    owner = OWNED_KEYS.get(key)
    if owner is not None:
        yield Conflict("DeepSpeed key that neox sets", (f"deepspeed.{key}", owner), f"set by {owner}", f"set {owner}")
    elif key in REMOVED_KEYS:
        yield Conflict("DeepSpeed removed this feature", (f"deepspeed.{key}",), "no such key", "remove the key")
    elif key not in known:
        close = nearest(key, known)
        do = f"did you mean deepspeed.{close}?" if close else None
        yield Conflict("unknown DeepSpeed key", (f"deepspeed.{key}",), "a key of DeepSpeed's config", do)


def offload(config: Config) -> Iterator[Conflict]:
    """Offloading needs a ZeRO stage that shards the state."""
    section = config.deepspeed.get("zero_optimization")
    for name, stage in (("offload_optimizer", 1), ("offload_param", 3)):
        if isinstance(section, dict) and section.get(name) is not None and config.zero.stage < stage:
            keys = (f"deepspeed.zero_optimization.{name}", "zero.stage")
            yield Conflict("cannot offload state that ZeRO does not shard", keys, f"zero.stage at least {stage}")


def gradient_norm(config: Config) -> Iterator[Conflict]:
    """Without the norm, DeepSpeed cannot clip, checks no gradient in fp32, and supports few ZeRO stages."""
    if config.computes_grad_norm:
        return
    key = "deepspeed.zero_optimization.compute_grad_norm"
    if config.precision.dtype == "fp32":
        rule = "precision.dtype: bf16 or fp16, whose gradients are also checked without it"
        yield Conflict("gradients in fp32 are checked by their norm", (key, "precision.dtype"), rule)
    if config.optimizer.gradient_clipping:
        keys = (key, "optimizer.gradient_clipping")
        yield Conflict("gradients are clipped by their norm", keys, "gradient_clipping: 0 without the norm")
    stages = (2,) if config.precision.dtype == "bf16" else (0, 1, 2)
    if config.zero.stage not in stages:
        rule = f"zero.stage: {' or '.join(map(str, stages))} without the norm in {config.precision.dtype}"
        yield Conflict("ZeRO stage needs the gradient norm", (key, "zero.stage"), rule)
