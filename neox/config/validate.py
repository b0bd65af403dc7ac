"""Checks a config against itself and the processes it will run on, before any process group or device is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neox.config.load import Origin, flatten
from neox.config.problems import brief, raise_problems
from neox.config.rules import RULES, Conflict, Situation
from neox.config.schema import Config
from neox.errors import ConfigError

BATCH_RULE = "global_batch_size = micro_batch_size x gradient_accumulation x data-parallel size"
BATCH_KEYS = ("train.micro_batch_size", "train.gradient_accumulation", "train.global_batch_size")


@dataclass(frozen=True)
class BatchSizes:
    """The batch of one optimizer step, with nothing left out.

    Attributes:
        micro_batch_size: samples of one forward pass of one process.
        gradient_accumulation: forward passes of one process per step.
        global_batch_size: samples of a step over all processes.
        dp: data-parallel size.
    """

    micro_batch_size: int
    gradient_accumulation: int
    global_batch_size: int
    dp: int


def validate(config: Config, world_size: int, device: str, origins: Mapping[str, Origin] | None = None) -> None:
    """Check every rule between keys.

    Args:
        config: what load() gave.
        world_size: number of processes.
        device: "cpu" or "cuda".
        origins: of the values, from load(); with them a message names file and line.

    Raises:
        ConfigError: all broken rules at once, each with its keys, their values and the rule.
        ValueError: a world size below 1 or an unknown device.
    """
    if world_size < 1 or device not in ("cpu", "cuda"):
        raise ValueError(f"world_size must be at least 1 and device cpu or cuda, got {world_size} and {device!r}")
    situation = Situation(world_size, device)
    conflicts = [conflict for rule in RULES for conflict in rule(config, situation)]
    conflicts += batch_conflicts(config, world_size)
    values = dict(flatten(config))
    raise_problems(problem(conflict, values, origins or {}) for conflict in conflicts)


def batch_sizes(config: Config, world_size: int) -> BatchSizes:
    """Complete the batch triangle.

    Raises:
        ConfigError: the three sizes contradict each other, or too few are given.
    """
    raise_problems(problem(conflict, dict(flatten(config)), {}) for conflict in batch_conflicts(config, world_size))
    dp = data_parallel_size(config, world_size)
    micro, accumulation, total = config.train.micro_batch_size, config.train.gradient_accumulation, config.train.global_batch_size
    if micro is None and accumulation is None:
        accumulation = 1
    if total is None:
        accumulation = accumulation or 1
        total = micro * accumulation * dp
    elif micro is None:
        micro = total // (accumulation * dp)
    else:
        accumulation = total // (micro * dp)
    return BatchSizes(micro, accumulation, total, dp)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Processes that see different data: those that the tensor and pipeline layout leaves."""
    layout = config.parallel
    return max(world_size // (layout.tensor * layout.pipeline * layout.context), 1)


def batch_conflicts(config: Config, world_size: int) -> Iterator[Conflict]:
    """What is wrong with the batch triangle: too little given, or sizes that do not multiply up."""
    micro, accumulation, total = config.train.micro_batch_size, config.train.gradient_accumulation, config.train.global_batch_size
    dp = data_parallel_size(config, world_size)
    facts = (("data-parallel size", dp),)
    if micro is None and total is None:
        yield Conflict(
            "the batch size is not given", ("train.micro_batch_size", "train.global_batch_size"), "at least one of them", "set train.micro_batch_size"
        )
        return
    if total is None:
        return
    given = [key for key, value in zip(BATCH_KEYS, (micro, accumulation, total), strict=True) if value is not None]
    factor = (micro or 1) * (accumulation or 1) * dp
    if micro is not None and accumulation is not None:
        if total != factor:
            yield Conflict("the batch sizes contradict each other", tuple(given), BATCH_RULE, f"global_batch_size: {factor}, or leave one of them out", facts)
    elif total % factor:
        yield Conflict("the global batch cannot be divided", tuple(given), f"{BATCH_RULE}: a multiple of {factor}", None, facts)


def problem(conflict: Conflict, values: Mapping[str, object], origins: Mapping[str, Origin]) -> ConfigError:
    """A conflict as an error that names its keys with their places and values."""
    places = [place(key, origins) for key in conflict.keys]
    facts = [f"{name} = {value}" for name, value in conflict.facts]
    got = [f"{key} = {brief(value_of(key, values))}" for key in conflict.keys] + facts
    return ConfigError(conflict.what, where=", ".join(places) or None, got=", ".join(got), want=conflict.rule, do=conflict.do)


def place(key: str, origins: Mapping[str, Origin]) -> str:
    """`file:line key`, or the key alone where its value is nobody's choice."""
    inner = next((origin for name, origin in origins.items() if name == key or name.startswith(f"{key}.")), None)
    if inner is None or inner.source in ("default", "derived"):
        return key
    return f"{inner} {key}"


def value_of(key: str, values: Mapping[str, object]) -> object:
    """Value of a dotted key; for a section, what stands below it."""
    if key in values:
        return values[key]
    return {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}
