"""What a run reads from the checkpoint that it resumes, and how its config differs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.manifest import read_manifest
from neox.checkpoint.reader import Checkpoint
from neox.config.load import loads
from neox.config.problems import yaml_constant
from neox.config.schema import Config
from neox.config.validate import batch_sizes
from neox.config.values import flatten, to_builtins
from neox.data.samples.cursor import Cursor, SavedCursor
from neox.engine.lr_schedule import build_lr_schedule
from neox.errors import CheckpointError, ConfigError, ModelMismatch
from neox.files import JsonObject

# keys that concern only this start, or that a resume ignores
QUIET = ("run.", "checkpoint.resume", "checkpoint.accept_data_change", "checkpoint.init_from")


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes.

    Attributes:
        path: its folder.
        step: number of completed optimizer steps.
        state: counters and the data cursor.
        config: config of the start that wrote it; None if this version cannot read it.
        problem: the reason.
        world_size: number of processes that wrote it.
    """

    path: Path
    step: int
    state: JsonObject
    config: Config | None
    problem: str | None
    world_size: int

    @property
    def consumed(self) -> int:
        """Number of samples read."""
        return self.state["consumed"]

    def saved_data(self, accept: bool) -> SavedCursor | None:
        """The data cursor; None if it is unknown."""
        if "data" in self.state:
            cursor = Cursor.from_json(self.state["data"])
        elif self.config is not None:
            cursor = Cursor.of_config(self.config)
        else:
            return None
        return SavedCursor(str(self.path), self.consumed, cursor, accept)


def read_resumed(path: Path, config: Config) -> Resumed:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: the manifest is damaged, or contains nothing to resume.
        ConfigError: the run would end before the checkpoint's step.
    """
    manifest = read_manifest(path)
    if "optimizer" not in manifest.state:
        do = f"checkpoint.init_from: {path}, to start at step 0 from it"
        raise CheckpointError("the checkpoint holds weights only: nothing to resume", where=path, do=do)
    if config.train.train_iters < manifest.step:
        raise ConfigError(
            "the run would end before the step that it resumes from",
            where="train.train_iters",
            got=f"{config.train.train_iters}, resuming {path} at step {manifest.step}",
            want=f"{manifest.step} or more",
            do="raise train.train_iters, or name an older checkpoint by checkpoint.resume",
        )
    before, problem = None, None
    try:
        before = loads(manifest.config_lock, str(path))
    except ConfigError as error:
        problem = f"{error.what}, {error.where}"
    return Resumed(path, manifest.step, manifest.state, before, problem, manifest.world_size)


def describe_changes(resumed: Resumed, config: Config, world_size: int) -> list[str]:
    """Differences between the config of a checkpoint and that of this start, derived values included, as lines."""
    out = [f"resumed from {resumed.path} at step {resumed.step}"]
    if "data" not in resumed.state:
        out.append(
            "the checkpoint is of an earlier version and does not record its data: whether the content of the "
            "datasets changed cannot be checked"
        )
    if resumed.config is None:
        return [
            *out,
            f"the checkpoint's config cannot be read by this version ({resumed.problem}): its differences are not "
            f"listed",
        ]
    before, after = dict(flatten(resumed.config)), dict(flatten(config))
    given = [key for key, value in after.items() if before.get(key) != value and not key.startswith(QUIET)]
    out += [f"{key}: {as_yaml(before.get(key))} -> {as_yaml(after[key])}" for key in given]
    old, new = derived(resumed.config, resumed.world_size), derived(config, world_size)
    for key, (value, source) in new.items():
        if key in old and old[key][0] != value and key not in given:
            out.append(f"{key}: {as_yaml(old[key][0])} -> {as_yaml(value)} (follows from {source})")
    return out + learning_rate(resumed.config, config, resumed.step + 1, resumed.state["updates"])


def model_changes(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Differences between the model of a checkpoint and that of this start, as lines. A key of one alone is omitted."""
    before = checkpoint.model_config
    return [
        f"model.{key}: {as_yaml(before[key])} -> {as_yaml(value)}"
        for key, value in to_builtins(config.model).items()
        if key in before and before[key] != value
    ]


@contextlib.contextmanager
def naming_changes(changes: Sequence[str]) -> Iterator[None]:
    """Name the changed keys of the model in the error of a checkpoint whose tensors do not fit it.

    Raises:
        ModelMismatch: as raised inside.
    """
    try:
        yield
    except ModelMismatch as error:
        got = "; ".join([", ".join(changes), str(error.got)]) if changes else error.got
        raise ModelMismatch(error.what, where=error.where, got=got, do=error.do) from None


def as_yaml(value: object) -> str:
    """Return a value as text, with null, true and false as YAML writes them."""
    return yaml_constant(value) or str(value)


def derived(config: Config, world_size: int) -> dict[str, tuple[object, str]]:
    """Key -> (value, its source) of the values that are derived from others."""
    out: dict[str, tuple[object, str]] = {}
    if config.schedule.decay_iters is None:
        out["schedule.decay_iters"] = (config.train.train_iters, "train.train_iters")
    else:
        out["schedule.decay_iters"] = (config.schedule.decay_iters, "schedule.decay_iters")
    try:
        sizes = batch_sizes(config, world_size)
    except ConfigError:  # of a converted checkpoint, with another number of processes
        return out
    for name in ("micro_batch_size", "gradient_accumulation", "global_batch_size"):
        out[f"train.{name}"] = (getattr(sizes, name), "the other batch sizes and the number of processes")
    out["data-parallel size"] = (sizes.dp, "the number of processes")
    return out


def learning_rate(before: Config, after: Config, step: int, updates: int) -> list[str]:
    """A line if the learning rate of a step, before which `updates` updates were made, differs between two configs."""
    rates = [
        build_lr_schedule(one.schedule, one.optimizer, one.train.train_iters).learning_rate(step, updates)
        for one in (before, after)
    ]
    return [] if rates[0] == rates[1] else [f"learning rate of step {step}: {rates[0]:.6g} -> {rates[1]:.6g}"]
