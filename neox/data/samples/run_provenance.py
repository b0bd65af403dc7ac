"""Which data a run has read: the documents of a step, the steps of a document, and the coverage of each source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson

from neox.config.load import load_config, loads
from neox.config.schema import Config
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.builder import RunDatasets
from neox.data.samples.cursor import Cursor, SavedCursor
from neox.data.samples.provenance import DocumentSlice
from neox.data.samples.sample import Dataset
from neox.errors import ConfigError, DataError
from neox.files import LARGEST_RECORD, JsonObject, read_bytes

LOCK, METRICS = "config.lock.yml", "metrics.jsonl"


@dataclass(frozen=True)
class BatchRow:
    """One sample of a batch: its number in the run, where it was read, and its slices of documents."""

    sample: int
    micro_batch: int
    dp_rank: int
    row: int
    slices: list[DocumentSlice]


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint records about the steps before it.

    Attributes:
        step: its step.
        consumed: samples read before it.
        config_lock: config of the process that wrote it.
        data: its data cursor; None in a checkpoint of an earlier version.
        where: its folder.
        world_size: number of processes that wrote it.
    """

    step: int
    consumed: int
    config_lock: str
    data: JsonObject | None
    where: str
    world_size: int


class ConfigSpan:
    """Consecutive steps of a run with the same config.

    Args:
        config: their config.
        last: the last step; None for the latest step of the run.
        world_size: number of processes; None if no checkpoint records it.
        saved: data cursor of the checkpoint that they resumed from.
        batch: samples per step; None for the config's.
    """

    def __init__(
        self, config: Config, last: int | None, world_size: int | None, saved: SavedCursor | None, batch: int | None
    ):
        self.config, self.last, self.world_size = config, last, world_size
        self._saved, self._batch = saved, batch

    @cached_property
    def dataset(self) -> Dataset:
        """The training data of these steps.

        Raises:
            CheckpointError: the data has changed since.
        """
        batch = self._batch or self.config.train.global_batch_size or 1
        return RunDatasets(self.config, {"train": self.config.train.train_iters * batch}, self._saved).parts["train"]


class RunProvenance:
    """The data that a run has read.

    It is computed from the config and data cursor in each checkpoint, from config.lock.yml for later steps, and from
    metrics.jsonl. Relative paths in the configs must be valid in the current folder.

    Args:
        run: folder of the run.
        batch: samples per optimizer step; None to use metrics.jsonl or the config.
        written: checkpoints of the newest branch of the run, ascending by step.

    Raises:
        ConfigError: the folder has no config, or the batch size is unknown.
        DataError: data or metrics cannot be read.
    """

    def __init__(self, run: Path, batch: int | None = None, written: Sequence[CheckpointRecord] = ()):
        self.run = run
        lock = run / LOCK
        if not lock.is_file():
            raise ConfigError("not the folder of a run", where=run, got=f"no {LOCK}", do="name the run.dir of the run")
        self.config: Config = load_config(lock)
        self._steps, self._ends, self._batches = self._records()
        given = batch or self.config.train.global_batch_size
        if given is None and not self._steps.size:
            raise ConfigError(
                "the batch size is unknown",
                where=run,
                got=f"neither train.global_batch_size nor {METRICS}",
                do="give --batch",
            )
        self.batch = int(given or self._batches[-1])
        self.written = list(written)
        self._config_spans = list(config_spans(written, self.config, self.batch))

    def config_span(self, step: int) -> ConfigSpan:
        """The span that a step belongs to."""
        return next(span for span in self._config_spans if span.last is None or step <= span.last)

    @property
    def consumed(self) -> int:
        """Samples read so far, from metrics.jsonl."""
        return int(self._ends[-1]) if self._ends.size else 0

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if there is none."""
        return int(self._steps[-1]) if self._steps.size else 0

    def span(self, step: int) -> tuple[int, int]:
        """The samples [first, last) of a step, which may be in the future. Steps count from 1.

        Raises:
            ConfigError: no such step.
            DataError: the step is not recorded.
        """
        if step < 1:
            raise ConfigError("no such step", where="--step", got=step, want="1 or more")
        at = int(np.searchsorted(self._steps, step))
        if at < self._steps.size and self._steps[at] == step:
            return int(self._ends[at] - self._batches[at]), int(self._ends[at])
        if at < self._steps.size:
            raise DataError(
                "the step is not recorded",
                where=self.run / METRICS,
                got=step,
                want=f"one of {self._steps[0]} to {self._steps[-1]}",
            )
        last = (int(self._steps[-1]), self.consumed) if self._steps.size else (0, 0)
        end = last[1] + (step - last[0]) * self.batch
        return end - self.batch, end

    def batch_of(self, step: int, layout: BatchLayout) -> list[BatchRow]:
        """The samples of a step."""
        first, last = self.span(step)
        dataset = self.config_span(step).dataset
        return [
            BatchRow(sample, *layout.locate(sample - first), dataset.slices(sample)) for sample in range(first, last)
        ]

    def steps_of(self, prefix: str, document: int) -> list[tuple[int, list[int]]]:
        """The recorded steps that read a document of a source, each with the samples that contain a token of it."""
        found: dict[int, list[int]] = {}
        before = 0
        for span in self._config_spans:
            until = self.last_step if span.last is None else span.last
            rows = np.flatnonzero((self._steps > before) & (self._steps <= until))
            before = max(before, until)
            if not rows.size:
                continue
            samples = span.dataset.find(prefix, document, int(self._ends[rows[-1]]))
            at = np.searchsorted(self._ends, samples, side="right")
            # without steps that a rollback has undone
            recorded = (at >= rows[0]) & (samples >= self._ends[at] - self._batches[at])
            for step, sample in zip(self._steps[at[recorded]].tolist(), samples[recorded].tolist(), strict=True):
                found.setdefault(step, []).append(sample)
        return sorted(found.items())

    def sources(self) -> list[str]:
        """Prefixes of the sources of the training samples."""
        return list(dict.fromkeys(part.source for span in self._config_spans for part in span.dataset.coverage(0)))

    def _records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each recorded step: its number, the samples consumed after it, and its own samples; int64."""
        path = self.run / METRICS
        try:
            lines = read_bytes(path, LARGEST_RECORD).splitlines(keepends=True) if os.path.lexists(path) else []
            rows = [orjson.loads(line) for line in lines if line.endswith(b"\n")]  # the last line may be incomplete
            numbers = np.array([(row["step"], row["samples"], row["tokens"]) for row in rows], dtype=np.int64).reshape(
                -1, 3
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError("metrics of the run cannot be read", where=path, got=error) from error
        tokens_per_sample = self.config.tokens_per_sample
        batches = np.diff(numbers[:, 2], prepend=0) // tokens_per_sample
        # resumed from the checkpoint of another run, whose tokens are included
        if numbers.shape[0] and numbers[0, 0] != 1:
            batches[0] = batches[1] if batches.size > 1 else self.config.train.global_batch_size or batches[0]
        return numbers[:, 0], numbers[:, 1], batches


def config_spans(written: Sequence[CheckpointRecord], config: Config, batch: int) -> Iterator[ConfigSpan]:
    """The spans of a run: one per start that wrote a checkpoint, and the steps after the last one, with `config`."""
    saved = None
    for number, one in enumerate(written):
        earlier = loads(one.config_lock, one.where)
        cursor = Cursor.of_config(earlier) if one.data is None else Cursor.from_json(one.data)
        saved = SavedCursor(one.where, one.consumed, cursor)
        following = written[number + 1] if number + 1 < len(written) else None
        if following is None or (following.config_lock, following.data) != (one.config_lock, one.data):
            yield ConfigSpan(earlier, one.step, one.world_size, saved, batch)
    if saved is not None:
        saved = SavedCursor(saved.where, saved.consumed, saved.cursor, config.checkpoint.accept_data_change)
    yield ConfigSpan(config, None, written[-1].world_size if written else None, saved, batch)
