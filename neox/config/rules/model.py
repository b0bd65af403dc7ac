"""Rules of the architecture."""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.rules.conflict import Conflict, Environment
from neox.config.schema import Config, ModelConfig
from neox.config.vocabulary import tokenizer_ids

MAX_HEAD_DIM = 256  # of the native attention kernels
HOPPER_HEAD_DIMS = (64, 128)


def heads(config: Config, _: Environment) -> Iterator[Conflict]:
    """Heads must divide the hidden size, and each other."""
    model = config.model
    derived = model.head_dim == model.hidden_size // model.num_attention_heads
    if model.hidden_size % model.num_attention_heads and derived:
        keys = ("model.hidden_size", "model.num_attention_heads")
        rule = "hidden_size a multiple of num_attention_heads"
        yield Conflict("heads do not divide the hidden size", keys, rule, "change one, or set model.head_dim")
    if model.num_attention_heads % model.num_kv_heads:
        keys = ("model.num_attention_heads", "model.num_kv_heads")
        rule = "num_attention_heads a multiple of num_kv_heads"
        yield Conflict("key/value heads do not divide the query heads", keys, rule)
    if model.head_dim > MAX_HEAD_DIM and model.attention_backend != "sdpa":
        keys = ("model.head_dim", "model.attention_backend")
        rule = f"head_dim at most {MAX_HEAD_DIM} for the native kernels"
        yield Conflict("head_dim is too large", keys, rule, "use more heads, or model.attention_backend: sdpa")
    if model.attention_softcap is not None and model.attention_backend == "sdpa":
        keys = ("model.attention_softcap", "model.attention_backend")
        rule = "attention_backend auto or native with a softcap"
        yield Conflict("attention backend does not support softcap", keys, rule)


def attention_kernels(config: Config, environment: Environment) -> Iterator[Conflict]:
    """The kernels of `attention_backend` must support the device, the number format and the options.

    They would refuse it themselves in the first step, when data and model have been loaded.
    """
    backend, fp32 = config.model.attention_backend, config.precision.dtype == "fp32"
    if backend == "hopper":
        yield from hopper(config, environment)
    elif fp32 and environment.device == "cuda":
        device = (("device", environment.device),)
        if config.model.attention_softcap is not None and backend != "sdpa":  # `auto` has no other kernels for it
            keys, rule = ("model.attention_softcap", "precision.dtype"), "bf16 or fp16 with a softcap on a GPU"
            yield Conflict("softcap in fp32 is not supported on a GPU", keys, rule, "set precision.dtype: bf16", device)
        elif backend == "native":
            keys, rule = ("model.attention_backend", "precision.dtype"), "bf16 or fp16 with native on a GPU"
            do = "set attention_backend: auto, or precision.dtype: bf16"
            yield Conflict("the native attention kernels do not support fp32 on a GPU", keys, rule, do, device)


def hopper(config: Config, environment: Environment) -> Iterator[Conflict]:
    """The kernels for sm_90a mask keys, and have no other option."""
    model, key = config.model, "model.attention_backend"
    if environment.device != "cuda":
        device = (("device", environment.device),)
        rule, do = "native, sdpa or auto on a CPU", "use auto"
        yield Conflict("attention backend hopper needs a GPU", (key,), rule, do, device)
    unsupported = (
        ("model.head_dim", "this head_dim", model.head_dim not in HOPPER_HEAD_DIMS),
        ("model.attention_softcap", "softcap", model.attention_softcap is not None),
        ("model.attention_dropout", "dropout", model.attention_dropout > 0),
        ("model.position_embedding", "ALiBi", model.position_embedding == "alibi"),
        ("precision.dtype", "fp32", config.precision.dtype == "fp32"),
    )
    rule = "head_dim 64 or 128, bf16 or fp16, and no softcap, dropout or ALiBi, for attention_backend hopper"
    for name, option, is_unsupported in unsupported:
        if is_unsupported:
            do = "use auto, or native with bf16 or fp16"
            yield Conflict(f"attention backend hopper does not support {option}", (name, key), rule, do)


def positions(config: Config, _: Environment) -> Iterator[Conflict]:
    """Rotary options need rotary positions, and samples must not be longer than the positions."""
    model = config.model
    rotary = model.position_embedding == "rotary"
    share = ("model.head_dim", "model.rotary_pct")
    if rotary and int(model.head_dim * model.rotary_pct) % 2:
        yield Conflict("odd number of rotated channels", share, "head_dim x rotary_pct even")
    if rotary and model.rotary_dim == 0:
        do = "set position_embedding: none for a model without positions"
        yield Conflict("no channel is rotated", share, "head_dim x rotary_pct at least 2", do)
    if not rotary:
        for name in ("rotary_pct", "rope_theta", "rope_scaling"):
            if getattr(model, name) != ModelConfig.model_fields[name].default:
                keys = (f"model.{name}", "model.position_embedding")
                yield Conflict("rotary option without rotary positions", keys, "position_embedding: rotary")
    length, limit = config.data.seq_length, model.max_position_embeddings
    if model.position_embedding in ("rotary", "learned") and length > limit:
        keys = ("data.seq_length", "model.max_position_embeddings")
        do = f"set model.max_position_embeddings to {length} for a new model, or data.seq_length to {limit}"
        rule = "seq_length at most max_position_embeddings"
        yield Conflict("data.seq_length exceeds model.max_position_embeddings", keys, rule, do)


def rope_scaling(config: Config, _: Environment) -> Iterator[Conflict]:
    """Each type of rotary scaling has its own parameters."""
    scaling = config.model.rope_scaling
    if scaling is None:
        return
    section = "model.rope_scaling"
    if scaling.type in ("yarn", "llama3") and scaling.original_max_position_embeddings is None:
        keys = (f"{section}.type", f"{section}.original_max_position_embeddings")
        rule = f"original_max_position_embeddings set for {scaling.type}"
        yield Conflict("rotary scaling needs the original context length", keys, rule)
    if scaling.factor < 1:
        yield Conflict("rotary scaling shortens the context", (f"{section}.factor",), "factor at least 1")
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        keys = (f"{section}.low_freq_factor", f"{section}.high_freq_factor")
        yield Conflict("frequency bands out of order", keys, "low_freq_factor < high_freq_factor")
    if scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        keys = (f"{section}.beta_slow", f"{section}.beta_fast")
        yield Conflict("frequency bands out of order", keys, "beta_slow < beta_fast")


def residual(config: Config, _: Environment) -> Iterator[Conflict]:
    """A shared norm needs the parallel residual."""
    if config.model.shared_residual_norm and not config.model.parallel_residual:
        keys = ("model.shared_residual_norm", "model.parallel_residual")
        yield Conflict(
            "shared norm without parallel residual", keys, "parallel_residual: true with shared_residual_norm"
        )


def row_biases(config: Config, _: Environment) -> Iterator[Conflict]:
    """Only a model whose biases GPT-NeoX adds on every rank needs a learning-rate multiplier for them."""
    model = config.model
    if config.optimizer.row_bias_lr_multiplier == 1:
        return
    if not model.parallel_residual:
        keys = ("optimizer.row_bias_lr_multiplier", "model.parallel_residual")
        what = "without parallel residual GPT-NeoX adds row-parallel biases once"
        yield Conflict(what, keys, "row_bias_lr_multiplier: 1, or parallel_residual: true")
    elif not (model.attention_out_bias or model.mlp_bias):
        keys = ("optimizer.row_bias_lr_multiplier", "model.attention_out_bias", "model.mlp_bias")
        yield Conflict("model has no row-parallel biases", keys, "row_bias_lr_multiplier: 1")


def vocabulary(config: Config, _: Environment) -> Iterator[Conflict]:
    """The vocabulary must contain every id of the tokenizer, and the tokenizer the end-of-document token."""
    if config.tokenizer.file is None:
        return
    try:
        ids = tokenizer_ids(config.tokenizer.file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        facts = (("reason", reason),)
        yield Conflict("cannot read the tokenizer", ("tokenizer.file",), "a `tokenizers` JSON file", facts=facts)
        return
    size = max(ids.values()) + 1
    eod_token = config.tokenizer.eod_token
    if eod_token is not None and eod_token not in ids:
        keys, rule = ("tokenizer.eod_token", "tokenizer.file"), "a token of tokenizer.file"
        yield Conflict("end-of-document token is not in the vocabulary", keys, rule)
    if size > config.model.vocab_size:
        keys, rule = ("model.vocab_size", "tokenizer.file"), f"vocab_size at least {size}"
        yield Conflict("tokenizer ids exceed the vocabulary", keys, rule, "omit model.vocab_size", (("ids", size),))


def lora(config: Config, _: Environment) -> Iterator[Conflict]:
    """Adapters need a target in the model, a rank below its width, and a layout that keeps frozen weights complete."""
    if config.model.lora is None:
        return
    if set(config.model.lora.targets) == {"mlp.gate"} and not config.model.gated:
        keys = ("model.lora.targets", "model.activation")
        rule = "a matrix of the model: mlp.gate exists with a gated activation only"
        yield Conflict("no LoRA target exists in the model", keys, rule, "add mlp.up")
    if config.model.lora.rank > config.model.hidden_size:
        keys, rule = ("model.lora.rank", "model.hidden_size"), "rank at most hidden_size"
        yield Conflict("adapters are larger than the matrices they adapt", keys, rule)
    if config.zero.stage > 2:
        keys = ("model.lora.rank", "zero.stage")
        yield Conflict("ZeRO stage 3 shards frozen weights", keys, "zero.stage 0 to 2 with LoRA", "set zero.stage: 2")
    if config.parallel.pipeline > 1 and config.model.head_is_tied:
        keys = ("model.lora.rank", "parallel.pipeline", "model.tie_embeddings")
        rule = "pipeline: 1 with LoRA and tied embeddings"
        yield Conflict("frozen tied embedding on two pipeline stages", keys, rule, "use parallel.tensor instead")
