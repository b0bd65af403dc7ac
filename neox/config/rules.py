"""The rules between keys: what is right for each key alone and wrong together, or wrong on the machine at hand.

Each rule takes the config and the Situation and yields a Conflict per violation; RULES lists them all. Nothing here reads
the environment, and no rule depends on another having passed.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, REMOVED_KEYS
from neox.config.problems import nearest
from neox.config.schema import Config
from neox.config.vocabulary import tokenizer_ids, tokenizer_vocab_size

MAX_HEAD_DIM = 256  # of the attention kernels


@dataclass(frozen=True)
class Situation:
    """What a config is checked against beside itself.

    Attributes:
        world_size: number of processes.
        device: "cpu" or "cuda".
    """

    world_size: int
    device: str


@dataclass(frozen=True)
class Conflict:
    """A broken rule.

    Attributes:
        what: the problem in a few words.
        keys: dotted keys that take part; their values and origins are reported.
        rule: what has to hold.
        do: next action.
        facts: values beside the keys that take part, such as ("world size", 4).
    """

    what: str
    keys: tuple[str, ...]
    rule: str
    do: str | None = None
    facts: tuple[tuple[str, object], ...] = ()


def heads(config: Config, _: Situation) -> Iterator[Conflict]:
    """Heads divide what they share."""
    model = config.model
    if model.hidden_size % model.num_attention_heads and model.head_dim == model.hidden_size // model.num_attention_heads:
        keys = ("model.hidden_size", "model.num_attention_heads")
        yield Conflict("the heads do not divide the hidden size", keys, "hidden_size a multiple of num_attention_heads", "change one, or set model.head_dim")
    if model.num_attention_heads % model.num_kv_heads:
        keys = ("model.num_attention_heads", "model.num_kv_heads")
        yield Conflict("query heads cannot share the key/value heads", keys, "num_attention_heads a multiple of num_kv_heads")
    if model.head_dim > MAX_HEAD_DIM and model.attention_backend != "sdpa":
        keys = ("model.head_dim", "model.attention_backend")
        yield Conflict("head too wide", keys, f"head_dim at most {MAX_HEAD_DIM} for the native kernels", "more heads, or model.attention_backend: sdpa")
    if model.attention_softcap is not None and model.attention_backend == "sdpa":
        yield Conflict("the backend has no softcap", ("model.attention_softcap", "model.attention_backend"), "attention_backend auto or native with a softcap")


def positions(config: Config, _: Situation) -> Iterator[Conflict]:
    """Rotary options belong to rotary positions, and positions reach as far as the samples."""
    model = config.model
    rotary = model.position_embedding == "rotary"
    if rotary and int(model.head_dim * model.rotary_pct) % 2:
        yield Conflict("odd number of rotated channels", ("model.head_dim", "model.rotary_pct"), "head_dim x rotary_pct even")
    if rotary and model.rotary_dim == 0:
        yield Conflict(
            "no channel is rotated", ("model.head_dim", "model.rotary_pct"), "head_dim x rotary_pct at least 2", "position_embedding: none to have no positions"
        )
    if not rotary:
        for name, default in (("rotary_pct", 1.0), ("rope_theta", 10000.0), ("rope_scaling", None)):
            if dict(model)[name] != default:
                yield Conflict("rotary option without rotary positions", (f"model.{name}", "model.position_embedding"), "position_embedding: rotary")
    if model.position_embedding in ("rotary", "learned") and config.data.seq_length > model.max_position_embeddings:
        keys = ("data.seq_length", "model.max_position_embeddings")
        do = f"set model.max_position_embeddings to {config.data.seq_length} for a new model, or data.seq_length to {model.max_position_embeddings}"
        yield Conflict("data.seq_length exceeds model.max_position_embeddings", keys, "seq_length at most max_position_embeddings", do)


def rope_scaling(config: Config, _: Situation) -> Iterator[Conflict]:
    """Each kind of rotary scaling has its own parameters."""
    scaling = config.model.rope_scaling
    if scaling is None:
        return
    keys = ("model.rope_scaling.type", "model.rope_scaling.original_max_position_embeddings")
    if scaling.type in ("yarn", "llama3") and scaling.original_max_position_embeddings is None:
        yield Conflict("the scaling needs the original length", keys, f"original_max_position_embeddings given for {scaling.type}")
    if scaling.factor < 1:
        yield Conflict("a scaling that shrinks", ("model.rope_scaling.factor",), "factor at least 1")
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Conflict(
            "scaling bands out of order", ("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"), "low_freq_factor < high_freq_factor"
        )
    if scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        yield Conflict("scaling bands out of order", ("model.rope_scaling.beta_slow", "model.rope_scaling.beta_fast"), "beta_slow < beta_fast")


def residual(config: Config, _: Situation) -> Iterator[Conflict]:
    """A shared norm needs the parallel residual."""
    if config.model.shared_residual_norm and not config.model.parallel_residual:
        keys = ("model.shared_residual_norm", "model.parallel_residual")
        yield Conflict("one norm for two branches that are not parallel", keys, "parallel_residual: true with shared_residual_norm")


def row_biases(config: Config, _: Situation) -> Iterator[Conflict]:
    """Only a model whose biases GPT-NeoX adds on every rank has a use for their learning rate."""
    model = config.model
    if config.optimizer.row_bias_lr_multiplier == 1:
        return
    if not model.parallel_residual:
        keys = ("optimizer.row_bias_lr_multiplier", "model.parallel_residual")
        yield Conflict("GPT-NeoX adds row-parallel biases once without a parallel residual", keys, "row_bias_lr_multiplier: 1, or parallel_residual: true")
    elif not (model.attention_out_bias or model.mlp_bias):
        keys = ("optimizer.row_bias_lr_multiplier", "model.attention_out_bias", "model.mlp_bias")
        yield Conflict("the model has no row-parallel biases", keys, "row_bias_lr_multiplier: 1")


def vocabulary(config: Config, _: Situation) -> Iterator[Conflict]:
    """The vocabulary holds every id of the tokenizer."""
    if config.tokenizer.file is None:
        return
    try:
        size = tokenizer_vocab_size(config.tokenizer.file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield Conflict("cannot read the tokenizer", ("tokenizer.file",), "a `tokenizers` JSON file", facts=(("reason", reason),))
        return
    if size > config.model.vocab_size:
        keys = ("model.vocab_size", "tokenizer.file")
        yield Conflict("the tokenizer has ids beyond the vocabulary", keys, f"vocab_size at least {size}", "leave model.vocab_size out", (("ids", size),))


def sources(config: Config, _: Situation) -> Iterator[Conflict]:
    """There is training data, given in one of the two ways, and validation data where evaluation is asked for."""
    data = config.data
    lists = [f"data.{part}" for part in ("train", "validation", "test") if dict(data)[part]]
    whole = [f"data.{name}" for name, value in (("path", data.path), ("text", data.text)) if value]
    if whole and len(whole) + bool(lists) > 1:
        yield Conflict("data given in two ways", (*whole, *lists), "data.path or data.text, with data.split, or lists of sources")
    if not whole and not data.train:
        keys, do = ("data.train", "data.path", "data.text"), "--set data.train=[PREFIX] where PREFIX.bin and PREFIX.idx are"
        yield Conflict("no training data", keys, "one of them", do)
    if data.text and config.tokenizer.file is None:
        yield Conflict("text without a tokenizer", ("data.text", "tokenizer.file"), "tokenizer.file", "neox tokenizer train makes one")
    for part in ("train", "validation", "test"):
        blend = dict(data)[part]
        if blend and not any(source.weight for source in blend):
            yield Conflict("every source has weight 0", (f"data.{part}",), "at least one weight above 0")
        for source in blend:
            if not source.path.strip() or "\0" in source.path:
                yield Conflict("a source without a path, or with an impossible one", (f"data.{part}",), "a prefix of .bin and .idx files")
    try:
        shares = parse_split(data.split)
    except ValueError as reason:
        yield Conflict("cannot read the split", ("data.split",), str(reason))
        return
    if config.evaluate.interval and not data.validation and (not whole or shares[1] == 0):
        keys = ("evaluate.interval", "data.validation", *(("data.split",) if whole else ()))
        yield Conflict("evaluation without validation data", keys, "validation data, or evaluate.interval: 0")


def packing(config: Config, _: Situation) -> Iterator[Conflict]:
    """How samples are made of documents fits their order and what is learned of them."""
    data, fim = config.data, config.data.fim
    if data.packing == "best_fit" and data.order == "neox":
        yield Conflict("GPT-NeoX's order is one of concatenated documents", ("data.packing", "data.order"), "order: epoch with best_fit", "data.order: epoch")
    if data.packing == "best_fit" and config.train.objective in ("dpo", "reward"):
        yield Conflict("pairs are never packed", ("data.packing", "train.objective"), "packing: document or concatenate with dpo and reward")
    if not fim.rate:
        return
    if config.tokenizer.file is None:
        yield Conflict("fill in the middle without a tokenizer", ("data.fim.rate", "tokenizer.file"), "tokenizer.file, which has the three tokens")
    if config.train.objective != "pretrain":
        yield Conflict(
            "fill in the middle moves tokens away from their labels", ("data.fim.rate", "train.objective"), "objective: pretrain with fim.rate above 0"
        )
    names = {name: dict(fim)[name] for name in ("prefix_token", "middle_token", "suffix_token")}
    if len(set(names.values())) < len(names):
        yield Conflict("two tokens of fill in the middle are one", tuple(f"data.fim.{name}" for name in names), "three different tokens")
    try:
        known = tokenizer_ids(config.tokenizer.file) if config.tokenizer.file is not None else None
    except (OSError, ValueError):
        known = None  # `vocabulary` says why
    for name, token in {**names, "split_sample": fim.split_sample}.items():
        if known is not None and token is not None and token not in known:
            keys, do = (f"data.fim.{name}", "tokenizer.file"), "name the tokenizer's own, or train one with neox tokenizer train --special-token"
            yield Conflict("a token of fill in the middle is not in the vocabulary", keys, "a token of tokenizer.file", do)


def objective(config: Config, _: Situation) -> Iterator[Conflict]:
    """What a run minimises has the data, the head and the layout that it needs."""
    kind, model, layout = config.train.objective, config.model, config.parallel
    pairs = kind in ("dpo", "reward")
    for part in ("train", "validation"):
        for source in dict(config.data)[part]:
            keys = ("train.objective", f"data.{part}")
            if pairs != (source.rejected is not None):
                want = "`rejected` beside the chosen answers in `path`" if pairs else "no `rejected` in a source"
                yield Conflict("the objective does not fit the data", keys, want, None if pairs else "train.objective: dpo or reward")
            elif (kind == "sft" and source.labels is None) or (kind == "pretrain" and source.labels is not None):
                yield Conflict("the objective does not fit the data", keys, "`labels` in every source with objective: sft, in none with pretrain")
    for name in ("path", "text"):
        if kind != "pretrain" and dict(config.data)[name]:
            yield Conflict(f"data.{name} has no labels or pairs", ("train.objective", f"data.{name}"), "data.train, a list of {path, labels, ...}")
    if (kind == "reward") != (model.output == "score"):
        yield Conflict("the head does not fit the objective", ("model.output", "train.objective"), "model.output: score with objective: reward, and only there")
    if pairs and layout.context > 1:
        yield Conflict("context parallelism cuts answers apart", ("train.objective", "parallel.context"), "context: 1 with dpo and reward")


def lora(config: Config, _: Situation) -> Iterator[Conflict]:
    """Adapters stand beside frozen weights, which not every layout can hold."""
    if config.model.lora is None:
        return
    if set(config.model.lora.targets) == {"mlp.gate"} and not config.model.gated:
        keys = ("model.lora.targets", "model.activation")
        yield Conflict("no matrix gets an adapter", keys, "a target that the model has: mlp.gate exists where the activation is gated", "name mlp.up too")
    if config.zero.stage > 2:
        yield Conflict("ZeRO stage 3 cuts the frozen weights", ("model.lora.rank", "zero.stage"), "zero.stage 0 to 2 with LoRA", "zero.stage: 2")
    if config.parallel.pipeline > 1 and config.model.tie_embeddings and config.model.output == "tokens":
        keys = ("model.lora.rank", "parallel.pipeline", "model.tie_embeddings")
        yield Conflict("a frozen tied embedding on two stages", keys, "pipeline: 1 with LoRA and tied embeddings", "parallel.tensor instead")


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of train, validation and test, normalised to a sum of 1.

    Args:
        text: up to three numbers separated by commas or slashes; those left out are 0.

    Raises:
        ValueError: not that, or nothing is left for training.
    """
    want = "one to three shares such as 969,30,1, none negative, the first above 0"
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        raise ValueError(want) from None
    shares += [0.0] * (3 - len(shares))
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or shares[0] == 0:
        raise ValueError(want)
    total = math.fsum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


def schedule(config: Config, _: Situation) -> Iterator[Conflict]:
    """The phases of the schedule fit into its length, and its ends are in order."""
    plan = config.schedule
    end = "schedule.decay_iters" if plan.decay_iters is not None else "train.train_iters"
    length = plan.decay_iters or config.train.train_iters
    if plan.warmup_iters > length:
        yield Conflict("the warm-up does not end", ("schedule.warmup_iters", end), f"warmup_iters at most {end}")
    if plan.min_lr > config.optimizer.lr:
        yield Conflict("the smallest learning rate is above the peak", ("schedule.min_lr", "optimizer.lr"), "min_lr at most lr")
    if plan.rule == "gpt_neox" and plan.type not in ("constant", "linear", "cosine"):
        yield Conflict("GPT-NeoX has no such schedule", ("schedule.rule", "schedule.type"), "rule: native, or type constant, linear or cosine")
    if plan.rule == "native" and isinstance(plan.warmup_iters, float):
        keys = ("schedule.warmup_iters", "schedule.rule")
        yield Conflict("warm-up of a fraction of an iteration", keys, "a whole number of iterations with rule: native", "give iterations, not a share")
    if plan.type == "wsd":
        if plan.cooldown_iters == 0:
            yield Conflict("wsd without a cool-down", ("schedule.type", "schedule.cooldown_iters"), "cooldown_iters above 0")
        elif plan.warmup_iters <= length < plan.warmup_iters + plan.cooldown_iters:
            keys = ("schedule.warmup_iters", "schedule.cooldown_iters", end)
            yield Conflict("warm-up and cool-down overlap", keys, f"warmup_iters + cooldown_iters at most {end}")
    elif plan.cooldown_iters:
        yield Conflict("a cool-down that this schedule does not have", ("schedule.cooldown_iters", "schedule.type"), "type: wsd with cooldown_iters")
    if plan.type == "constant" and plan.min_lr:
        yield Conflict("a constant rate has no smallest value", ("schedule.min_lr", "schedule.type"), "min_lr: 0 with type: constant")


def precision(config: Config, situation: Situation) -> Iterator[Conflict]:
    """The number format is one that the device computes in."""
    if config.precision.dtype == "fp16" and situation.device == "cpu":
        yield Conflict("fp16 needs a GPU", ("precision.dtype",), "bf16 or fp32 on a CPU", facts=(("device", "cpu"),))
    if config.precision.min_loss_scale > 2.0**config.precision.initial_scale_power:
        keys = ("precision.min_loss_scale", "precision.initial_scale_power")
        yield Conflict("the loss scale starts below its minimum", keys, "min_loss_scale at most 2 to the initial_scale_power")


def parallel(config: Config, situation: Situation) -> Iterator[Conflict]:
    """The layout fits the processes and the model."""
    model, layout = config.model, config.parallel
    world = (("world size", situation.world_size),)
    if situation.world_size % (layout.tensor * layout.pipeline * layout.context):
        keys = ("parallel.tensor", "parallel.pipeline", *(("parallel.context",) if layout.context > 1 else ()))
        rule = "the number of processes a multiple of tensor x pipeline" + (" x context" if layout.context > 1 else "")
        start = "start that many: torchrun --nproc-per-node N, or deepspeed --num_gpus N"
        yield Conflict("the processes cannot be divided", keys, rule, do=start, facts=world)
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
    ):
        if count % layout.tensor:
            yield Conflict("the tensor group does not divide the model", (f"model.{name}", "parallel.tensor"), f"{name} a multiple of parallel.tensor")
    if layout.sequence and layout.tensor == 1:
        yield Conflict("sequence parallelism without a tensor group", ("parallel.sequence", "parallel.tensor"), "tensor above 1 with sequence: true")
    if layout.sequence and config.data.seq_length % (layout.tensor * layout.context):
        yield Conflict("the tensor group does not divide the sequence", ("data.seq_length", "parallel.tensor"), "seq_length a multiple of tensor x context")
    for axis in ("tensor", "pipeline", "context"):
        if config.optimizer.type == "muon" and dict(layout)[axis] > 1:
            yield Conflict("DeepSpeed's Muon works on whole models only", ("optimizer.type", f"parallel.{axis}"), f"{axis}: 1 with muon", "another optimizer")


def stages(config: Config, _: Situation) -> Iterator[Conflict]:
    """Pipeline stages: there are layers for each, and a ZeRO stage that does not reduce at every micro-batch."""
    model, layout = config.model, config.parallel
    if layout.pipeline > model.num_layers:
        yield Conflict("more stages than layers", ("parallel.pipeline", "model.num_layers"), "pipeline at most num_layers")
    if layout.pipeline > 1 and config.zero.stage > 1:
        keys = ("zero.stage", "parallel.pipeline")
        yield Conflict("ZeRO stage and pipeline exclude each other", keys, "zero.stage 0 or 1 with pipeline above 1")
    if isinstance(layout.partition, tuple):
        if len(layout.partition) != layout.pipeline:
            yield Conflict("the list does not name every stage", ("parallel.partition", "parallel.pipeline"), "one number per stage")
        if sum(layout.partition) != model.num_layers:
            yield Conflict("the list does not share out the layers", ("parallel.partition", "model.num_layers"), "numbers that add up to num_layers")


def context(config: Config, _: Situation) -> Iterator[Conflict]:
    """Context parallelism: members exchange parts of the sequence for parts of the heads."""
    model, layout = config.model, config.parallel
    if layout.context == 1:
        return
    if model.num_kv_heads % (layout.tensor * layout.context):
        yield Conflict("too few key/value heads to share", ("model.num_kv_heads", "parallel.context"), "num_kv_heads a multiple of tensor x context")
    if config.data.seq_length % layout.context:
        yield Conflict("the context group does not divide the sequence", ("data.seq_length", "parallel.context"), "seq_length a multiple of context")


def folders(config: Config, _: Situation) -> Iterator[Conflict]:
    """Folders are named, and not by something that is a file."""
    for key, text in (("run.dir", config.run.dir), ("checkpoint.resume", config.checkpoint.resume)):
        if not text.strip() or "\0" in text:
            yield Conflict("empty or impossible path", (key,), "a path")
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in config.run.dir):
        yield Conflict("the run's folder has control characters in its name", ("run.dir",), "a name without line breaks and control characters")
    if config.run.dir.strip() and os.path.realpath(config.run.dir.replace("\0", "")) == os.sep:
        yield Conflict("the run's folder is the root of the file system", ("run.dir",), "a folder of its own, such as runs/first")
    folder = Path(config.run.dir.replace("\0", ""))
    if folder.exists() and not folder.is_dir():
        yield Conflict("the run's folder is a file", ("run.dir",), "a folder, or a name that is free")


def deepspeed(config: Config, _: Situation) -> Iterator[Conflict]:
    """Raw DeepSpeed keys are known to DeepSpeed and not decided by our own."""
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
        yield Conflict("a secret in a config", (), "secrets in the environment, as COMET_API_KEY", facts=(("key", "deepspeed.comet.api_key"),))
    yield from offload(config)


def deepspeed_key(key: str, known: dict | tuple) -> Iterator[Conflict]:
    """One key of DeepSpeed, dotted."""
    ours = OWNED_KEYS.get(key)
    if ours is not None:
        yield Conflict("DeepSpeed key that we set", (f"deepspeed.{key}", ours), f"{ours} decides it", f"set {ours}")
    elif key in REMOVED_KEYS:
        yield Conflict("DeepSpeed removed this feature", (f"deepspeed.{key}",), "none", "take the key out")
    elif key not in known:
        close = nearest(key, known)
        yield Conflict("unknown DeepSpeed key", (f"deepspeed.{key}",), "a key of DeepSpeed's config", f"did you mean deepspeed.{close}?" if close else None)


def offload(config: Config) -> Iterator[Conflict]:
    """Offloading needs the ZeRO stage that cuts what is offloaded."""
    section = config.deepspeed.get("zero_optimization")
    for name, stage in (("offload_optimizer", 1), ("offload_param", 3)):
        if isinstance(section, dict) and section.get(name) is not None and config.zero.stage < stage:
            yield Conflict("offloading what is not cut", (f"deepspeed.zero_optimization.{name}", "zero.stage"), f"zero.stage at least {stage}")


def rollback(config: Config, _: Situation) -> Iterator[Conflict]:
    """Going back takes further data, and a place to go back to."""
    if config.guard.loss_spike != "rollback":
        return
    if config.data.order == "neox":
        yield Conflict("the order ends with train_iters", ("guard.loss_spike", "data.order"), "data.order: epoch, which goes on, for rollback")
    if not config.checkpoint.save_interval and not config.checkpoint.save_iters:
        yield Conflict("nothing to go back to", ("guard.loss_spike", "checkpoint.save_interval"), "checkpoint.save_interval above 0 for rollback")


RULES = (
    heads,
    positions,
    rope_scaling,
    residual,
    row_biases,
    vocabulary,
    sources,
    packing,
    objective,
    lora,
    schedule,
    precision,
    parallel,
    stages,
    context,
    folders,
    rollback,
    deepspeed,
)
