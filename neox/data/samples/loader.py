"""Batches for one data-parallel rank, read ahead by a background thread. Its whole state is one integer, `consumed`."""

from __future__ import annotations

import queue
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from neox._native import core
from neox.data.samples.sample import BatchArrays, BatchReader, Dataset, Pair, Sample
from neox.errors import DataError
from neox.targets import IGNORED

MOST_KEPT = 64  # arrays of one shape that are watched for being free again
ONLY_KEPT = 2  # references to an array that nobody uses: the collection's, and that of the argument of getrefcount
POLL_SECONDS = 0.2  # how often a waiting side looks whether the other is still there


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tokens, targets: int64 [b, s]; a target of -100 is ignored. sample_ids: int64 [b], numbers of the samples in the run's order.
    segment_ids int32 [b, s] and position_ids int64 [b, s] (counted from each document's start): None without document_mask.
    ends: int64 [b], last input of a row that is no padding; None where rows are packed. A sample that is a pair gives two rows, chosen and rejected;
    reference: fp32 [b], their log-probabilities by the model at the start; None where the dataset has none.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    sample_ids: torch.Tensor
    ends: torch.Tensor | None = None
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Which samples of an optimizer step a rank reads: micro-batch m, row j reads c + (m x dp_size + dp_rank) x micro_batch_size + j."""

    micro_batch_size: int
    gradient_accumulation: int
    dp_rank: int
    dp_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation * self.dp_size

    def sample_ids(self, consumed: int, micro_batch: int) -> list[int]:
        """The samples of one micro-batch of this rank."""
        first = consumed + (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))


class Loader:
    """Iterates over optimizer steps: each item is a list of gradient_accumulation batches. It never ends by itself.

    Args:
        dataset: `dataset[i]` for every sample number of the run.
        start: samples consumed before (0, or `consumed` of a checkpoint).
        prefetch: steps read ahead; 0 reads in the caller's thread.
        vocab_size: ids must be below; None checks nothing.

    Raises:
        DataError: while iterating, at the step it belongs to: an id outside the vocabulary (file, document, offset, id), damaged data,
            or a sample beyond the dataset.
        ValueError: sizes that are not positive, or a rank outside the group.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        gradient_accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        prefetch: int = 2,
        vocab_size: int | None = None,
    ):
        if min(micro_batch_size, gradient_accumulation, dp_size) < 1 or not 0 <= dp_rank < dp_size or min(start, prefetch) < 0:
            raise ValueError(f"loader sizes out of range: {micro_batch_size=} {gradient_accumulation=} {dp_rank=} {dp_size=} {start=} {prefetch=}")
        self.consumed = start  # samples handed out over all ranks
        self._layout = Layout(micro_batch_size, gradient_accumulation, dp_rank, dp_size)
        self._read = StepReader(dataset, self._layout, vocab_size)
        self._ready: queue.Queue | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        if prefetch > 0:
            self._ready = queue.Queue(maxsize=prefetch)
            # The thread holds no reference to the loader, so that dropping the loader ends the thread.
            self._thread = threading.Thread(target=read_ahead, args=(self._read, start, self._layout.global_batch_size, self._ready, self._stop), daemon=True)
            self._thread.start()
            weakref.finalize(self, end, self._stop, self._thread)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        if self._stop.is_set():
            raise ValueError("loader is closed")
        step = self._read(self.consumed) if self._ready is None else self._take()
        if isinstance(step, BaseException):
            self.close()
            raise step
        self.consumed += self._layout.global_batch_size
        return step

    def _take(self) -> list[Batch] | BaseException:
        while True:
            try:
                return self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    return RuntimeError("the loader's thread died")

    def close(self) -> None:
        """Stop the background thread and wait for it."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end(stop: threading.Event, thread: threading.Thread) -> None:
    """Stop a loader's thread that was dropped without `close`, or is left at the end of the process, where a thread inside native code would take it down."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(2 * POLL_SECONDS)


def read_ahead(read: StepReader, consumed: int, stride: int, ready: queue.Queue, stop: threading.Event) -> None:
    """Fill the queue step by step until told to stop; an exception takes the place of its step and ends the thread."""
    while not stop.is_set():
        try:
            step: list[Batch] | BaseException = read(consumed)
        except BaseException as error:  # handed to the thread that asks for this step
            step = error
        while not stop.is_set():
            try:
                ready.put(step, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(step, BaseException):
            return
        consumed += stride


class StepReader:
    """Reads the batches of one optimizer step: a pure function of the samples consumed before it."""

    def __init__(self, dataset: Dataset, layout: Layout, vocab_size: int | None):
        self._dataset = dataset
        self._layout = layout
        self._vocab_size = vocab_size
        self._memory = Memory()

    def __call__(self, consumed: int) -> list[Batch]:
        return [self._batch(self._layout.sample_ids(consumed, m)) for m in range(self._layout.gradient_accumulation)]

    def _batch(self, sample_ids: list[int]) -> Batch:
        if not isinstance(self._dataset, BatchReader):
            return self._batch_of_samples(sample_ids)
        shape = (len(sample_ids), self._dataset.seq_length)
        types = ("int64", "int64", "int32", "int64") if self._dataset.document_mask else ("int64", "int64")
        rows = BatchArrays(*(self._memory.array(shape, dtype) for dtype in types))
        largest = self._dataset.read_rows(np.array(sample_ids, dtype=np.int64), np.arange(len(sample_ids)), rows)
        if self._vocab_size is not None and largest >= self._vocab_size:
            self._check_vocabulary(np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1), sample_ids)
        return Batch(*(None if array is None else torch.from_numpy(array) for array in rows), torch.tensor(sample_ids, dtype=torch.int64))

    def _batch_of_samples(self, sample_ids: list[int]) -> Batch:
        """The batch of a dataset that gives one sample, or one pair, at a time."""
        samples = [self._dataset[sample] for sample in sample_ids]
        rows = [row for sample in samples for row in ((sample.chosen, sample.rejected) if isinstance(sample, Pair) else (sample,))]
        tokens = np.stack([row.tokens for row in rows])  # [b, s + 1]
        self._check_vocabulary(tokens, sample_ids)
        targets = tokens if rows[0].labels is None else self._checked_labels(tokens, rows, sample_ids)
        marks = positions = ends = reference = None
        if rows[0].segment_ids is not None:
            segments = np.stack([row.segment_ids for row in rows])
            marks, positions = torch.from_numpy(segments), torch.from_numpy(positions_in_documents(segments))
        if rows[0].end is not None:
            ends = torch.tensor([row.end for row in rows], dtype=torch.int64)
        if isinstance(samples[0], Pair) and samples[0].reference is not None:
            reference = torch.from_numpy(np.concatenate([sample.reference for sample in samples]))
        both = (torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy()))
        return Batch(*both, marks, positions, torch.tensor(sample_ids, dtype=torch.int64), ends, reference)

    def _checked_labels(self, tokens: np.ndarray, rows: list[Sample], sample_ids: list[int]) -> np.ndarray:
        """Labels [b, s + 1], each the token beside it or -100.

        Raises:
            DataError: one is something else: the labels belong to other tokens.
        """
        labels = np.stack([row.labels for row in rows])
        wrong = np.argwhere((labels != tokens) & (labels != IGNORED))
        if len(wrong):
            row, column = (int(part) for part in wrong[0])
            raise DataError(
                "label is not the token",
                where=self._where(row, column, tokens, sample_ids),
                got=f"label {labels[row, column]} at token {tokens[row, column]}",
                want="the token, or -100",
                do="make tokens and labels by one neox preprocess --chat",
            )
        return labels

    def _where(self, row: int, column: int, tokens: np.ndarray, sample_ids: list[int]) -> str:
        """Where a token of a batch lies; the rows of a pair are counted through."""
        sample, second = divmod(row, len(tokens) // len(sample_ids))
        return self._dataset.describe(sample_ids[sample], second * tokens.shape[1] + column)

    def _check_vocabulary(self, tokens: np.ndarray, sample_ids: list[int]) -> None:
        """Raises DataError at the first of these ids [b, s + 1] that the vocabulary does not have."""
        if self._vocab_size is None or (place := core.first_outside(tokens, self._vocab_size)) < 0:
            return
        row, column = divmod(place, tokens.shape[1])
        raise DataError(
            "token id is outside the vocabulary",
            where=self._where(row, column, tokens, sample_ids),
            got=f"id {tokens[row, column]}",
            want=f"0 to {self._vocab_size - 1}",
            do="use the tokenizer that made the data, or raise model.vocab_size",
        )


class Memory:
    """Arrays that are given out again when nothing else refers to them: of fresh ones, page faults cost more than reading the tokens.

    A tensor made of an array by `torch.from_numpy`, and every view of it, keeps a reference to the array.
    """

    def __init__(self):
        self._arrays: dict[tuple[tuple[int, ...], str], deque[np.ndarray]] = {}

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array with any content."""
        kept = self._arrays.setdefault((shape, dtype), deque(maxlen=MOST_KEPT))
        for _ in range(len(kept)):
            kept.rotate(-1)
            if sys.getrefcount(kept[0]) == ONLY_KEPT:
                return kept[0]
        kept.appendleft(np.empty(shape, dtype=dtype))
        return kept[0]


def positions_in_documents(segments: np.ndarray) -> np.ndarray:
    """Position of each token in its document's part of the sample: int64 [b, s], 0 where the segment id [b, s] (int32) changes."""
    found = np.empty(segments.shape, dtype=np.int64)
    core.positions_in_segments(segments, found)
    return found
