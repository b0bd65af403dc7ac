"""Batches for one data-parallel rank, read ahead by a thread. The state of the loader is one integer, `consumed`."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neox._native import core
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.sample import BatchArrays, BatchReader, Pair, Sample, Samples
from neox.errors import DataError
from neox.targets import IGNORED

POLL_SECONDS = 0.2  # interval at which a waiting thread checks whether the other one is alive


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    A pair gives two rows, the chosen and the rejected answer.

    Attributes:
        tokens: int64 [b, s].
        targets: int64 [b, s]; a target of -100 is ignored.
        segment_ids: int32 [b, s], the document of each token; None without a document mask.
        position_ids: int64 [b, s], positions in each document; None without a document mask.
        sample_ids: int64 [b], numbers of the samples in the order of the run.
        ends: int64 [b], the last input of a row that is not padding; None if rows are packed.
        reference: fp32 [b], log-probability of each answer by the model at the start; None if the dataset has none.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    sample_ids: torch.Tensor
    ends: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Loader:
    """Iterates over optimizer steps without end: each item is a list of gradient_accumulation batches.

    Args:
        dataset: `dataset[i]` for every sample of the run.
        micro_batch_size: samples per batch.
        gradient_accumulation: batches per step.
        dp_rank: data-parallel rank.
        dp_size: number of data-parallel ranks.
        start: samples consumed before (0, or `consumed` of a checkpoint).
        prefetch: steps read ahead; 0 reads in the calling thread.
        vocab_size: ids must be below it; None disables the check.

    Attributes:
        consumed: samples handed out so far, over all ranks.

    Raises:
        DataError: while iterating, at its step: an id outside the vocabulary (file, document, offset, id), damaged
            data, or a sample beyond the end of the dataset.
        ValueError: a size is not positive, or the rank is outside the group.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        micro_batch_size: int,
        gradient_accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: int = 0,
        prefetch: int = 2,
        vocab_size: int | None = None,
    ):
        if (
            min(micro_batch_size, gradient_accumulation, dp_size) < 1
            or not 0 <= dp_rank < dp_size
            or min(start, prefetch) < 0
        ):
            raise ValueError(
                f"loader sizes out of range: {micro_batch_size=} {gradient_accumulation=} {dp_rank=} {dp_size=} "
                f"{start=} {prefetch=}"
            )
        self.consumed = start
        self._global_batch_size = micro_batch_size * gradient_accumulation * dp_size
        layout = BatchLayout(micro_batch_size, dp_size)
        self._read = StepReader(dataset, [layout.samples(m, dp_rank) for m in range(gradient_accumulation)], vocab_size)
        self._ready: queue.Queue | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        if prefetch > 0:
            self._ready = queue.Queue(maxsize=prefetch)
            # The thread has no reference to the loader, so that garbage collection of the loader ends the thread.
            self._thread = threading.Thread(
                target=read_ahead,
                args=(self._read, start, self._global_batch_size, self._ready, self._stop),
                daemon=True,
            )
            self._thread.start()
            weakref.finalize(self, stop_thread, self._stop, self._thread)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        if self._stop.is_set():
            raise ValueError("loader is closed")
        step = (
            self._read(self.consumed)
            if self._ready is None or self._thread is None
            else take(self._ready, self._thread)
        )
        if isinstance(step, BaseException):
            self.close()
            raise step
        self.consumed += self._global_batch_size
        return step

    def close(self) -> None:
        """Stop the background thread and wait for it."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take(ready: queue.Queue, thread: threading.Thread) -> list[Batch] | BaseException:
    """The next step, or the exception that replaces it."""
    while True:
        try:
            return ready.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if not thread.is_alive() and ready.empty():
                return RuntimeError("the loader's thread died")


def stop_thread(stop: threading.Event, thread: threading.Thread) -> None:
    """Stop the thread of a loader that was not closed. At exit, a thread in native code would crash the process."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(2 * POLL_SECONDS)


def read_ahead(read: StepReader, consumed: int, stride: int, ready: queue.Queue, stop: threading.Event) -> None:
    """Fill the queue step by step until `stop` is set.

    An exception is queued in place of its step and ends the thread.
    """
    while not stop.is_set():
        try:
            step: list[Batch] | BaseException = read(consumed)
        except BaseException as error:  # raised in the thread that takes this step
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
    """Reads the batches of one optimizer step. They are a pure function of the samples consumed before.

    Args:
        dataset: the samples of the run.
        micro_batches: samples of each micro-batch, counted from the start of the global batch.
        vocab_size: ids must be below it; None disables the check.
    """

    def __init__(self, dataset: Samples, micro_batches: Sequence[range], vocab_size: int | None):
        self._dataset = dataset
        self._micro_batches = micro_batches
        self._vocab_size = vocab_size

    def __call__(self, consumed: int) -> list[Batch]:
        return [self._batch([consumed + sample for sample in samples]) for samples in self._micro_batches]

    def _batch(self, sample_ids: list[int]) -> Batch:
        if not isinstance(self._dataset, BatchReader):
            return self._batch_of_samples(sample_ids)
        shape = (len(sample_ids), self._dataset.seq_length)
        types = ("int64", "int64", "int32", "int64") if self._dataset.document_mask else ("int64", "int64")
        rows = BatchArrays(*(np.empty(shape, dtype=dtype) for dtype in types))
        largest = self._dataset.read_rows(np.array(sample_ids, dtype=np.int64), np.arange(len(sample_ids)), rows)
        if self._vocab_size is not None and largest >= self._vocab_size:
            self._check_vocabulary(np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1), sample_ids)
        return Batch(
            tokens=torch.from_numpy(rows.inputs),
            targets=torch.from_numpy(rows.targets),
            segment_ids=None if rows.segment_ids is None else torch.from_numpy(rows.segment_ids),
            position_ids=None if rows.position_ids is None else torch.from_numpy(rows.position_ids),
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        )

    def _batch_of_samples(self, sample_ids: list[int]) -> Batch:
        """The batch of a dataset that reads one sample, or one pair, at a time."""
        samples = [self._dataset[sample] for sample in sample_ids]
        rows = [
            row
            for sample in samples
            for row in ((sample.chosen, sample.rejected) if isinstance(sample, Pair) else (sample,))
        ]
        tokens = np.stack([row.tokens for row in rows])  # [b, s + 1]
        self._check_vocabulary(tokens, sample_ids)
        targets = tokens if rows[0].labels is None else self._checked_labels(tokens, rows, sample_ids)
        segment_ids = position_ids = ends = reference = None
        if rows[0].segment_ids is not None:
            segments = np.stack([row.segment_ids for row in rows if row.segment_ids is not None])
            segment_ids, position_ids = torch.from_numpy(segments), torch.from_numpy(positions_in_documents(segments))
        if rows[0].end is not None:
            ends = torch.tensor([row.end for row in rows], dtype=torch.int64)
        references = [
            sample.reference for sample in samples if isinstance(sample, Pair) and sample.reference is not None
        ]
        if references:
            reference = torch.from_numpy(np.concatenate(references))
        return Batch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            targets=torch.from_numpy(targets[:, 1:].copy()),
            segment_ids=segment_ids,
            position_ids=position_ids,
            sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
            ends=ends,
            reference=reference,
        )

    def _checked_labels(self, tokens: np.ndarray, rows: list[Sample], sample_ids: list[int]) -> np.ndarray:
        """Labels [b, s + 1], each of them its token or -100.

        Raises:
            DataError: a label is neither, because the labels belong to other tokens.
        """
        labels = np.stack([row.labels for row in rows if row.labels is not None])
        wrong = np.argwhere((labels != tokens) & (labels != IGNORED))
        if len(wrong):
            row, column = (int(part) for part in wrong[0])
            raise DataError(
                "label differs from the token",
                where=self._where(row, column, tokens, sample_ids),
                got=f"label {labels[row, column]} at token {tokens[row, column]}",
                want="the token, or -100",
                do="make tokens and labels by one neox preprocess --chat",
            )
        return labels

    def _where(self, row: int, column: int, tokens: np.ndarray, sample_ids: list[int]) -> str:
        """The location of a token of a batch; a pair has two rows."""
        sample, second = divmod(row, len(tokens) // len(sample_ids))
        return self._dataset.describe(sample_ids[sample], second * tokens.shape[1] + column)

    def _check_vocabulary(self, tokens: np.ndarray, sample_ids: list[int]) -> None:
        """Raise DataError for the first of these ids [b, s + 1] that is outside the vocabulary."""
        if self._vocab_size is None or (first := core.first_outside(tokens, self._vocab_size)) < 0:
            return
        row, column = divmod(first, tokens.shape[1])
        raise DataError(
            "token id is outside the vocabulary",
            where=self._where(row, column, tokens, sample_ids),
            got=f"id {tokens[row, column]}",
            want=f"0 to {self._vocab_size - 1}",
            do="use the tokenizer of the dataset, or raise model.vocab_size",
        )


def positions_in_documents(segments: np.ndarray) -> np.ndarray:
    """Position of each token in its segment: int64 [b, s], from segment ids int32 [b, s]."""
    found = np.empty(segments.shape, dtype=np.int64)
    core.positions_in_segments(segments, found)
    return found
