"""Validation of a config against itself and the processes it runs on, before any process group or device is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox.config.layers import Origin
from neox.config.problems import brief, raise_problems
from neox.config.rules import RULES, Conflict, Environment, batch, data_parallel_size
from neox.config.rules.data import source_lists
from neox.config.schema import Config
from neox.config.values import flatten
from neox.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The batch of one optimizer step.

    Attributes:
        micro_batch_size: samples per forward pass of one process.
        gradient_accumulation: forward passes of one process per step.
        global_batch_size: samples per step over all processes.
        dp: data-parallel size.
    """

    micro_batch_size: int
    gradient_accumulation: int
    global_batch_size: int
    dp: int


def validate(config: Config, world_size: int, device: str, origins: Mapping[str, Origin] | None = None) -> None:
    """Check every rule between keys.

    Args:
        config: a config from load().
        world_size: number of processes.
        device: "cpu" or "cuda".
        origins: origins of the values, from load(); with them an error names file and line.

    Raises:
        ConfigError: all broken rules at once, each with its keys, their values and the rule.
        ValueError: a world size below 1 or an unknown device.
    """
    if world_size < 1 or device not in ("cpu", "cuda"):
        raise ValueError(f"world_size must be at least 1 and device cpu or cuda, got {world_size} and {device!r}")
    environment = Environment(world_size, device)
    conflicts = [conflict for rule in RULES for conflict in rule(config, environment)]
    values = dict(flatten(config)) if conflicts else {}
    raise_problems(problem(conflict, values, origins or {}) for conflict in conflicts)


def batch_sizes(config: Config, world_size: int) -> BatchSizes:
    """Compute the batch size that the config omits.

    Raises:
        ConfigError: the three sizes contradict each other, or too few are given.
    """
    conflicts = list(batch(config, Environment(world_size, "cpu")))
    raise_problems(problem(conflict, dict(flatten(config)), {}) for conflict in conflicts)
    dp = data_parallel_size(config, world_size)
    train = config.train
    micro, accumulation, total = train.micro_batch_size, train.gradient_accumulation, train.global_batch_size
    if total is None:
        accumulation = accumulation or 1
        total = (micro or 1) * accumulation * dp
    if micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * dp)
    return BatchSizes(micro, total // (micro * dp), total, dp)


def check_sources(config: Config) -> None:
    """Check that training data is given in exactly one way.

    Raises:
        ConfigError: it is missing or given twice.
    """
    conflicts = list(source_lists(config.data))
    raise_problems(problem(conflict, dict(flatten(config)), {}) for conflict in conflicts)


def problem(conflict: Conflict, values: Mapping[str, object], origins: Mapping[str, Origin]) -> ConfigError:
    """Convert a conflict to an error with the locations and values of its keys."""
    locations = [location(key, origins) for key in conflict.keys]
    facts = [f"{name} = {value}" for name, value in conflict.facts]
    got = [f"{key} = {brief(value_of(key, values))}" for key in conflict.keys] + facts
    where = ", ".join(locations) or None
    return ConfigError(conflict.what, where=where, got=", ".join(got), want=conflict.rule, do=conflict.do)


def location(key: str, origins: Mapping[str, Origin]) -> str:
    """Return `file:line key`, or the key alone if no file or option set its value."""
    inner = next((origin for name, origin in origins.items() if name == key or name.startswith(f"{key}.")), None)
    if inner is None or inner.source in ("default", "derived"):
        return key
    return f"{inner} {key}"


def value_of(key: str, values: Mapping[str, object]) -> object:
    """Return the value of a dotted key; for a section, the values below it."""
    if key in values:
        return values[key]
    return {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}
