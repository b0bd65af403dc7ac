"""Search for the smallest and the fastest change of keys with which a run fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neox.config.parse import YamlValue
from neox.config.rules import LAYOUT_RULES, Conflict, Environment, batch, data_parallel_size
from neox.config.schema import Config
from neox.config.validate import batch_sizes
from neox.plan.devices import Device
from neox.plan.memory import StageMemory, stage_memory
from neox.plan.sizes import ResolvedLayout, resolve
from neox.plan.time import StepTime, step_time

MAX_KEYS = 4
FASTEST_KEYS = 3  # keys of the fastest change
MAX_STAGES = 32


@dataclass(frozen=True)
class Estimate:
    """Estimate for a config on a number of devices: layout, memory of each stage, time of a step."""

    config: Config
    layout: ResolvedLayout
    memories: tuple[StageMemory, ...]
    time: StepTime

    @property
    def peak(self) -> int:
        """Peak memory of the process that needs the most, bytes."""
        return max(memory.peak for memory in self.memories)


@dataclass(frozen=True)
class Change:
    """New values of keys, and the resulting estimate."""

    keys: dict[str, YamlValue]
    estimate: Estimate


def conflicts(config: Config, world_size: int, kind: str) -> list[Conflict]:
    """List the rules that the config breaks on a number of devices."""
    environment = Environment(world_size, kind)
    return [conflict for rule in LAYOUT_RULES for conflict in rule(config, environment)]


def estimate(config: Config, world_size: int, device: Device) -> Estimate:
    """Estimate memory and time of a config without conflicts."""
    layout = resolve(config, world_size)
    memories = tuple(stage_memory(config, layout, stage, device.kind) for stage in layout.stages)
    return Estimate(config, layout, memories, step_time(config, layout, memories, device))


def options(config: Config, world_size: int, device: Device) -> dict[str, list[YamlValue]]:
    """Return keys that trade speed for memory, each with the values that need less memory than the current one."""
    layout, train = config.parallel, config.train
    stronger = ["none", "selective", "full"]
    known = train.micro_batch_size is not None or any(batch(config, Environment(world_size, device.kind)))
    micro = (train.micro_batch_size or 1) if known else batch_sizes(config, world_size).micro_batch_size
    sizes = [n for n in range(2, min(world_size, max(MAX_STAGES, device.per_node)) + 1) if world_size % n == 0]
    return {
        "train.activation_checkpointing": stronger[stronger.index(train.activation_checkpointing) + 1 :],
        "train.micro_batch_size": divisors(micro)[-2::-1],
        "zero.stage": list(range(config.zero.stage + 1, 4)),
        "parallel.sequence": [] if layout.sequence else [True],
        "parallel.tensor": [n for n in sizes if n > layout.tensor and n % layout.tensor == 0 and n <= device.per_node],
        "parallel.pipeline": [
            n
            for n in sizes
            if n > layout.pipeline and n % layout.pipeline == 0 and n <= min(MAX_STAGES, config.model.num_layers)
        ],
    }


def divisors(n: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def changed(config: Config, world_size: int, keys: Mapping[str, YamlValue]) -> tuple[Config, dict[str, YamlValue]]:
    """Return the config with new values of some keys, and these keys.

    gradient_accumulation is adjusted if it is set, so that the global batch size stays the same.
    """
    keys = dict(keys)
    train = config.train
    micro = keys.get("train.micro_batch_size", train.micro_batch_size)
    grown = {key.split(".")[1]: value for key, value in keys.items() if key.startswith("parallel.")}
    smaller = config.model_copy(update={"parallel": config.parallel.model_copy(update=grown)})
    if micro is not None and (train.global_batch_size is None or train.gradient_accumulation is not None):
        dp = data_parallel_size(config, world_size)
        total = train.global_batch_size or (train.micro_batch_size or 1) * (train.gradient_accumulation or 1) * dp
        accumulation, rest = divmod(total, micro * data_parallel_size(smaller, world_size))
        if not rest and accumulation != (train.gradient_accumulation or 1):
            keys["train.gradient_accumulation"] = accumulation
    out = config
    for key, value in keys.items():
        section, name = key.split(".")
        out = out.model_copy(update={section: getattr(out, section).model_copy(update={name: value})})
    return out, keys


def combinations(choices: Mapping[str, list[YamlValue]], count: int) -> Iterator[dict[str, YamlValue]]:
    """Yield every choice of values for every choice of `count` keys."""
    for names in itertools.combinations(choices, count):
        for values in itertools.product(*(choices[name] for name in names)):
            yield dict(zip(names, values, strict=True))


def changes(config: Config, world_size: int, device: Device) -> tuple[Change | None, Change | None]:
    """Find changes with which the config runs and fits.

    Returns:
        the fastest change among those of the fewest keys, and the fastest change of up to FASTEST_KEYS keys. Both are
        None if no change of MAX_KEYS keys is sufficient.
    """
    choices = options(config, world_size, device)
    smallest: Change | None = None
    fastest: Change | None = None
    for count in range(1, MAX_KEYS + 1):
        if count > FASTEST_KEYS and smallest is not None:
            break
        for chosen in combinations(choices, count):
            candidate, keys = changed(config, world_size, chosen)
            if conflicts(candidate, world_size, device.kind):
                continue
            found = estimate(candidate, world_size, device)
            if found.peak <= device.usable and (fastest is None or found.time.total < fastest.estimate.time.total):
                fastest = Change(keys, found)
        smallest = smallest or fastest
    return smallest, fastest
