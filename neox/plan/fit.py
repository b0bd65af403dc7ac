"""The smallest change of keys with which a run fits, and the fastest: every combination of one key, then of two, ..., is looked at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox.config.rules import Conflict, Situation, context, heads, parallel, positions, precision, residual, stages
from neox.config.schema import Config
from neox.config.validate import batch_conflicts, batch_sizes, data_parallel_size
from neox.plan.devices import Device
from neox.plan.memory import Memory, stage_memory
from neox.plan.sizes import Layout, resolve
from neox.plan.time import StepTime, step_time

RULES = (heads, positions, residual, precision, parallel, stages, context)  # of validate(), those that a plan depends on: data need not be there
MOST_KEYS = 4
FREE_KEYS = 3  # of the change that is the fastest
MOST_STAGES = 32


@dataclass(frozen=True)
class Estimate:
    """A config over a number of devices: its layout, the memory of each stage, the time of a step."""

    config: Config
    layout: Layout
    memories: tuple[Memory, ...]
    time: StepTime

    @property
    def peak(self) -> int:
        """Bytes of the process that needs most."""
        return max(memory.peak for memory in self.memories)


@dataclass(frozen=True)
class Change:
    """New values of keys, and what comes of them."""

    keys: dict[str, Any]
    estimate: Estimate


def conflicts(config: Config, world_size: int, kind: str) -> list[Conflict]:
    """Broken rules that keep the config from running on so many devices."""
    situation = Situation(world_size, kind)
    found = [conflict for rule in RULES for conflict in rule(config, situation)]
    return [*found, *batch_conflicts(config, world_size)]


def estimate(config: Config, world_size: int, device: Device) -> Estimate:
    """Memory and time of a config without conflicts."""
    layout = resolve(config, world_size)
    memories = tuple(stage_memory(config, layout, stage, device.kind) for stage in layout.stages)
    return Estimate(config, layout, memories, step_time(config, layout, memories, device))


def options(config: Config, world_size: int, device: Device) -> dict[str, list[Any]]:
    """Keys that trade speed for memory, each with the values that need less than the present one."""
    layout, train = config.parallel, config.train
    stronger = ["none", "selective", "full"]
    known = train.micro_batch_size is not None or any(batch_conflicts(config, world_size))
    micro = (train.micro_batch_size or 1) if known else batch_sizes(config, world_size).micro_batch_size
    divisors = [n for n in range(2, min(world_size, max(MOST_STAGES, device.per_node)) + 1) if world_size % n == 0]
    return {
        "train.activation_checkpointing": stronger[stronger.index(train.activation_checkpointing) + 1 :],
        "train.micro_batch_size": [n for n in range(micro // 2, 0, -1) if micro % n == 0],
        "zero.stage": list(range(config.zero.stage + 1, 4)),
        "parallel.sequence": [] if layout.sequence else [True],
        "parallel.tensor": [n for n in divisors if n > layout.tensor and n % layout.tensor == 0 and n <= device.per_node],
        "parallel.pipeline": [n for n in divisors if n > layout.pipeline and n % layout.pipeline == 0 and n <= min(MOST_STAGES, config.model.num_layers)],
    }


def changed(config: Config, world_size: int, keys: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config with new values of some keys, and these keys; gradient_accumulation follows where it is given, so that the global batch stays."""
    keys = dict(keys)
    train = config.train
    micro = keys.get("train.micro_batch_size", train.micro_batch_size)
    grown = {key.split(".")[1]: value for key, value in keys.items() if key.startswith("parallel.")}
    smaller = config.model_copy(update={"parallel": config.parallel.model_copy(update=grown)})
    if micro is not None and (train.global_batch_size is None or train.gradient_accumulation is not None):
        total = train.global_batch_size or train.micro_batch_size * (train.gradient_accumulation or 1) * data_parallel_size(config, world_size)
        accumulation, rest = divmod(total, micro * data_parallel_size(smaller, world_size))
        if not rest and accumulation != (train.gradient_accumulation or 1):
            keys["train.gradient_accumulation"] = accumulation
    out = config
    for key, value in keys.items():
        section, name = key.split(".")
        out = out.model_copy(update={section: getattr(out, section).model_copy(update={name: value})})
    return out, keys


def combinations(choices: Mapping[str, list[Any]], count: int) -> Iterator[dict[str, Any]]:
    """Every choice of values for every choice of `count` keys."""
    for names in itertools.combinations(choices, count):
        for values in itertools.product(*(choices[name] for name in names)):
            yield dict(zip(names, values, strict=True))


def changes(config: Config, world_size: int, device: Device) -> tuple[Change | None, Change | None]:
    """The fewest keys that make the config run and fit (of the combinations of so many the fastest), and the fastest of up to FREE_KEYS keys.

    Returns:
        None for both where MOST_KEYS are not enough.
    """
    choices = options(config, world_size, device)
    smallest: Change | None = None
    fastest: Change | None = None
    for count in range(1, MOST_KEYS + 1):
        if count > FREE_KEYS and smallest is not None:
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
