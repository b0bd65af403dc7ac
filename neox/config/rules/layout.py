"""Rules of the parallel layout and the batch size."""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.rules.conflict import Conflict, Environment
from neox.config.schema import Config

BATCH_RULE = "global_batch_size = micro_batch_size x gradient_accumulation x data-parallel size"
BATCH_KEYS = ("train.micro_batch_size", "train.gradient_accumulation", "train.global_batch_size")


def data_parallel_size(config: Config, world_size: int) -> int:
    """Number of processes that read different data: world size / (tensor x pipeline x context), at least 1."""
    layout = config.parallel
    return max(world_size // (layout.tensor * layout.pipeline * layout.context), 1)


def parallel(config: Config, environment: Environment) -> Iterator[Conflict]:
    """The layout must divide the processes and the model."""
    model, layout = config.model, config.parallel
    if environment.world_size % (layout.tensor * layout.pipeline * layout.context):
        keys = ("parallel.tensor", "parallel.pipeline", *(("parallel.context",) if layout.context > 1 else ()))
        rule = "world size a multiple of tensor x pipeline" + (" x context" if layout.context > 1 else "")
        start = "start that many processes: torchrun --nproc-per-node N, or deepspeed --num_gpus N"
        facts = (("world size", environment.world_size),)
        yield Conflict("world size does not match the parallel layout", keys, rule, do=start, facts=facts)
    for name in model.undivided(layout.tensor):
        keys, rule = (f"model.{name}", "parallel.tensor"), f"{name} a multiple of parallel.tensor"
        yield Conflict("tensor parallelism does not divide the model", keys, rule)
    if layout.sequence and layout.tensor == 1:
        keys = ("parallel.sequence", "parallel.tensor")
        yield Conflict("sequence parallelism without tensor parallelism", keys, "tensor above 1 with sequence: true")
    if layout.sequence and config.data.seq_length % (layout.tensor * layout.context):
        keys, rule = ("data.seq_length", "parallel.tensor"), "seq_length a multiple of tensor x context"
        yield Conflict("sequence parallelism does not divide the sequence", keys, rule)
    for axis in ("tensor", "pipeline", "context"):
        if config.optimizer.type == "muon" and getattr(layout, axis) > 1:
            keys, rule = ("optimizer.type", f"parallel.{axis}"), f"{axis}: 1 with muon"
            yield Conflict("DeepSpeed's Muon does not support model parallelism", keys, rule, "use another optimizer")


def stages(config: Config, _: Environment) -> Iterator[Conflict]:
    """Each pipeline stage needs a layer, and a ZeRO stage that does not reduce after every micro-batch."""
    model, layout = config.model, config.parallel
    if layout.pipeline > model.num_layers:
        keys = ("parallel.pipeline", "model.num_layers")
        yield Conflict("more pipeline stages than layers", keys, "pipeline at most num_layers")
    if layout.pipeline > 1 and config.zero.stage > 1:
        keys, rule = ("zero.stage", "parallel.pipeline"), "zero.stage 0 or 1 with pipeline above 1"
        yield Conflict("ZeRO stage is incompatible with pipeline parallelism", keys, rule)
    if isinstance(layout.partition, tuple):
        if len(layout.partition) != layout.pipeline:
            keys, rule = ("parallel.partition", "parallel.pipeline"), "one number per stage"
            yield Conflict("parallel.partition does not match the number of stages", keys, rule)
        if sum(layout.partition) != model.num_layers:
            keys, rule = ("parallel.partition", "model.num_layers"), "numbers that add up to num_layers"
            yield Conflict("parallel.partition does not sum to num_layers", keys, rule)


def context(config: Config, _: Environment) -> Iterator[Conflict]:
    """Context parallelism must divide the sequence and the key/value heads, which it exchanges."""
    model, layout = config.model, config.parallel
    if layout.context == 1:
        return
    if model.num_kv_heads % (layout.tensor * layout.context):
        keys, rule = ("model.num_kv_heads", "parallel.context"), "num_kv_heads a multiple of tensor x context"
        yield Conflict("too few key/value heads for context parallelism", keys, rule)
    if config.data.seq_length % layout.context:
        keys, rule = ("data.seq_length", "parallel.context"), "seq_length a multiple of context"
        yield Conflict("context parallelism does not divide the sequence", keys, rule)


def batch(config: Config, environment: Environment) -> Iterator[Conflict]:
    """The three batch sizes must be consistent, and one of micro and global batch size is required."""
    train = config.train
    sizes = (train.micro_batch_size, train.gradient_accumulation, train.global_batch_size)
    micro, accumulation, total = sizes
    dp = data_parallel_size(config, environment.world_size)
    facts = (("data-parallel size", dp),)
    if micro is None and total is None:
        keys = ("train.micro_batch_size", "train.global_batch_size")
        yield Conflict("batch size is not given", keys, "at least one of them", "set train.micro_batch_size")
        return
    if total is None:
        return
    given = tuple(key for key, value in zip(BATCH_KEYS, sizes, strict=True) if value is not None)
    factor = (micro or 1) * (accumulation or 1) * dp
    if micro is not None and accumulation is not None:
        if total != factor:
            do = f"set global_batch_size: {factor}, or omit one of them"
            yield Conflict("batch sizes contradict each other", given, BATCH_RULE, do, facts)
    elif total % factor:
        rule = f"{BATCH_RULE}: a multiple of {factor}"
        yield Conflict("global batch size is not divisible", given, rule, None, facts)
