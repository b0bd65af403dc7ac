"""The sections that describe how a run is operated: checkpoint, logging, profile, guard, run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from neox.config.schema.base import NonNegativeInt, PositiveInt, Section


class CheckpointConfig(Section, frozen=True):
    """Saving and resuming. Checkpoints are in run.dir/checkpoints."""

    save_interval: NonNegativeInt = Field(
        default=1000,
        description="iterations between checkpoints; the last iteration is always saved; 0: save the last only",
    )
    save_iters: tuple[NonNegativeInt, ...] = Field(
        default=(),
        strict=False,
        description="additional iterations after which a checkpoint is saved; 0: the initial weights",
    )
    keep: NonNegativeInt = Field(default=0, description="number of newest checkpoints to retain; 0: all")
    resume: str = Field(
        default="auto",
        description="auto: resume from the newest complete checkpoint of the run, else start; "
        "must: an error if there is none; never: start a new run, an error if the run has a checkpoint; "
        "PATH: resume from that checkpoint",
    )
    init_from: str | None = Field(
        default=None,
        description="checkpoint whose weights, and nothing else, a new run starts from; "
        "ignored where the run resumes one of its own checkpoints",
    )
    accept_data_change: bool = Field(
        default=False,
        description="resume although the data differs from that of the checkpoint: unchanged sources continue where "
        "they were, new ones start; set it for one start only",
    )
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop", description="what the run does when a save fails"
    )
    in_background: bool = Field(
        default=True,
        alias="async",
        description="write checkpoints in the background, from a copy in host memory; false: training waits",
    )


class WandbConfig(Section, frozen=True):
    """Weights & Biases. The API key comes from WANDB_API_KEY or `wandb login`."""

    project: str = Field(default="neox", description="project of the run")
    entity: str | None = Field(default=None, description="team or user; null: the default of the API key")
    group: str | None = Field(default=None, description="group of runs")
    name: str | None = Field(default=None, description="name of the run; null: generated")
    host: str | None = Field(default=None, description="URL of a self-hosted server")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write the records to run.dir/wandb, for `wandb sync`"
    )


class CometConfig(Section, frozen=True):
    """Comet. The API key comes from COMET_API_KEY or `comet login`."""

    project: str = Field(default="neox", description="project of the experiment")
    workspace: str | None = Field(default=None, description="workspace; null: the default of the API key")
    name: str | None = Field(default=None, description="name of the experiment; null: generated")
    tags: tuple[str, ...] = Field(default=(), strict=False, description="tags of the experiment")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write the records to run.dir/comet, for `comet upload`"
    )


class LoggingConfig(Section, frozen=True):
    """What a run prints and records. metrics.jsonl has every step, whatever the interval."""

    interval: PositiveInt = Field(default=10, description="iterations between lines on the terminal and in log.txt")
    tensorboard: bool = Field(default=True, description="write run.dir/tensorboard")
    wandb: WandbConfig | None = Field(default=None, description="log to Weights & Biases; null: off")
    comet: CometConfig | None = Field(default=None, description="log to Comet; null: off")


class ProfileConfig(Section, frozen=True):
    """A trace of the torch profiler, in run.dir/profile."""

    start: NonNegativeInt = Field(default=0, description="first step of the trace; 0: no trace")
    steps: PositiveInt = Field(default=3, description="number of steps")
    memory: bool = Field(default=False, description="record memory allocations")
    stacks: bool = Field(default=False, description="record the Python stack of each operator")


class GuardConfig(Section, frozen=True):
    """Health checks of a run, and its reaction to each of them."""

    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="loss or gradient that is NaN or infinite: stop the run, or skip the update"
    )
    max_skipped: PositiveInt = Field(
        default=5, description="consecutive skipped updates tolerated before the run stops"
    )
    loss_spike: Literal["off", "warn", "skip", "rollback"] = Field(
        default="warn",
        description="loss spike: do nothing; log a warning; skip the update; or restore the newest checkpoint and "
        "skip ahead to new data",
    )
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        default=3.0, description="a spike is a loss above this many times the median of the losses before it"
    )
    spike_window: PositiveInt = Field(default=64, description="steps over which that median is taken")
    drift_interval: NonNegativeInt = Field(
        default=100, description="steps between comparisons of parameters that are replicated across processes; 0: off"
    )
    hang_timeout: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = Field(
        default=1200.0,
        description="seconds without progress after which a process counts as stuck and the run stops; 0: off",
    )


class RunConfig(Section, frozen=True):
    """Output folder of a run."""

    dir: str = Field(default="runs/default", description="folder of the run")
