"""Which data a run has read: the documents of a step's batch, the steps that saw a document, what was read of each source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from neox.config.load import load_config, loads
from neox.config.schema import Config
from neox.data.samples.builder import RunDatasets
from neox.data.samples.cursor import Cursor, SavedCursor
from neox.data.samples.provenance import DocumentSlice
from neox.data.samples.sample import Dataset
from neox.errors import ConfigError, DataError

LOCK, METRICS = "config.lock.yml", "metrics.jsonl"


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is shared out: micro_batch_size samples to each of dp data-parallel ranks, again and again. tp, cp: see Mesh."""

    micro_batch_size: int
    dp: int
    tp: int = 1
    cp: int = 1

    def place(self, offset: int) -> tuple[int, int, int]:
        """(micro-batch, data-parallel rank, row in it) of the sample that is `offset` samples behind the first of the batch."""
        turn, row = divmod(offset, self.micro_batch_size)
        micro_batch, dp_rank = divmod(turn, self.dp)
        return micro_batch, dp_rank, row

    def dp_rank(self, rank: int) -> int:
        """Data-parallel rank of a process."""
        return rank // (self.tp * self.cp) % self.dp


@dataclass(frozen=True)
class BatchRow:
    """One sample of a batch: its number in the run's order, who read it, and the parts of documents that it is made of."""

    sample: int
    micro_batch: int
    dp_rank: int
    row: int
    pieces: list[DocumentSlice]


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint of the run tells of the steps up to it.

    Args:
        step: that it was saved at. consumed: samples read by then.
        config_lock: config of the start that wrote it.
        data: its data cursor; None: of an earlier version.
        where: its folder.
        world_size: processes that wrote it.
    """

    step: int
    consumed: int
    config_lock: str
    data: dict[str, Any] | None
    where: str
    world_size: int


class ConfigSpan:
    """The steps of a run up to `last` that were made by one config.

    Attributes:
        config: theirs.
        last: the last step; None: the run's latest.
        world_size: processes; None where no checkpoint tells.
    """

    def __init__(self, config: Config, last: int | None, world_size: int | None, saved: SavedCursor | None, batch: int | None):
        self.config, self.last, self.world_size = config, last, world_size
        self._saved, self._batch = saved, batch

    @cached_property
    def dataset(self) -> Dataset:
        """What they read. Raises CheckpointError where it is no longer what they read."""
        batch = self._batch or self.config.train.global_batch_size or 1
        return RunDatasets(self.config, {"train": self.config.train.train_iters * batch}, self._saved).parts["train"]


class RunProvenance:
    """The data of a run: by the config and data cursor of its checkpoints, by config.lock.yml for what came after them, and by metrics.jsonl.

    Paths in the configs are as they were: ask from the same folder.

    Args:
        run: the run's folder.
        batch: samples of an optimizer step; None: by the records of the steps, or else the config.
        written: checkpoints of the run's newest branch, ascending by step.

    Raises:
        ConfigError: the folder has no config, or the batch is known from nowhere.
        DataError: data or records cannot be read.
    """

    def __init__(self, run: Path, batch: int | None = None, written: Sequence[CheckpointRecord] = ()):
        self.run = run
        lock = run / LOCK
        if not lock.is_file():
            raise ConfigError("not the folder of a run", where=run, got=f"no {LOCK}", do="name the folder that run.dir named")
        self.config: Config = load_config(lock)
        self._steps, self._ends, self._batches = self._records()
        given = batch or self.config.train.global_batch_size
        if given is None and not self._steps.size:
            raise ConfigError("the batch size is not known", where=run, got=f"neither train.global_batch_size nor {METRICS}", do="give --batch")
        self.batch = int(given or self._batches[-1])
        self.written = list(written)
        self._config_spans = list(config_spans(written, self.config, self.batch))

    def config_span(self, step: int) -> ConfigSpan:
        """The stage that a step belongs to."""
        return next(stage for stage in self._config_spans if stage.last is None or step <= stage.last)

    @property
    def consumed(self) -> int:
        """Samples read so far, by the records."""
        return int(self._ends[-1]) if self._ends.size else 0

    @property
    def last_step(self) -> int:
        """The last step that is recorded; 0 without one."""
        return int(self._steps[-1]) if self._steps.size else 0

    def span(self, step: int) -> tuple[int, int]:
        """The samples [first, last) of a step, counted from 1; of steps that are to come, where they will be.

        Raises:
            ConfigError: no such step.
        """
        if step < 1:
            raise ConfigError("no such step", where="--step", got=step, want="1 or more")
        at = int(np.searchsorted(self._steps, step))
        if at < self._steps.size and self._steps[at] == step:
            return int(self._ends[at] - self._batches[at]), int(self._ends[at])
        if at < self._steps.size:
            raise DataError("the step has no record", where=self.run / METRICS, got=step, want=f"one of {self._steps[0]} to {self._steps[-1]}")
        last = (int(self._steps[-1]), self.consumed) if self._steps.size else (0, 0)
        end = last[1] + (step - last[0]) * self.batch
        return end - self.batch, end

    def batch_of(self, step: int, layout: BatchLayout) -> list[BatchRow]:
        """The samples of a step."""
        first, last = self.span(step)
        dataset = self.config_span(step).dataset
        return [BatchRow(sample, *layout.place(sample - first), dataset.slices(sample)) for sample in range(first, last)]

    def steps_of(self, prefix: str, document: int) -> list[tuple[int, list[int]]]:
        """The recorded steps that saw a document of a source, each with the samples that held a part of it."""
        seen: dict[int, list[int]] = {}
        before = 0
        for stage in self._config_spans:
            until = self.last_step if stage.last is None else stage.last
            rows = np.flatnonzero((self._steps > before) & (self._steps <= until))
            before = max(before, until)
            if not rows.size:
                continue
            samples = stage.dataset.find(prefix, document, int(self._ends[rows[-1]]))
            at = np.searchsorted(self._ends, samples, side="right")
            recorded = (at >= rows[0]) & (samples >= self._ends[at] - self._batches[at])  # not those of steps that a rollback took back
            for step, sample in zip(self._steps[at[recorded]].tolist(), samples[recorded].tolist(), strict=True):
                seen.setdefault(step, []).append(sample)
        return sorted(seen.items())

    def sources(self) -> list[str]:
        """Prefixes that the training samples come from."""
        return list(dict.fromkeys(seen.source for stage in self._config_spans for seen in stage.dataset.coverage(0)))

    def _records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each recorded step: its number, the samples consumed after it, and those of it; int64."""
        path = self.run / METRICS
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            rows = [orjson.loads(line) for line in lines if line.endswith(b"\n")]  # the last one may be half written
            numbers = np.array([(row["step"], row["samples"], row["tokens"]) for row in rows], dtype=np.int64).reshape(-1, 3)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("records of the run cannot be read", where=path, got=error) from error
        rows_of_sample = 2 if self.config.train.objective in ("dpo", "reward") else 1
        batches = np.diff(numbers[:, 2], prepend=0) // (rows_of_sample * self.config.data.seq_length)
        if numbers.shape[0] and numbers[0, 0] != 1:  # it goes on from another run's checkpoint, whose tokens are counted in
            batches[0] = batches[1] if batches.size > 1 else self.config.train.global_batch_size or batches[0]
        return numbers[:, 0], numbers[:, 1], batches


def config_spans(written: Sequence[CheckpointRecord], config: Config, batch: int) -> Iterator[ConfigSpan]:
    """The config_spans of a run whose last start has this config: one for each start that checkpoints tell of, and the one since the last of them."""
    saved = None
    for number, one in enumerate(written):
        then = loads(one.config_lock, one.where)
        cursor = Cursor.of_config(then) if one.data is None else Cursor.from_json(one.data)
        saved = SavedCursor(one.where, one.consumed, cursor)
        following = written[number + 1] if number + 1 < len(written) else None
        if following is None or (following.config_lock, following.data) != (one.config_lock, one.data):
            yield ConfigSpan(then, one.step, one.world_size, saved, batch)
    if saved is not None:
        saved = SavedCursor(saved.where, saved.consumed, saved.cursor, config.checkpoint.accept_data_change)
    yield ConfigSpan(config, None, written[-1].world_size if written else None, saved, batch)
