"""The loader: which samples each rank gets, what it refuses, and that its state is one integer."""

from __future__ import annotations

import gc
import queue
import threading
import time

import numpy as np
import pytest
import torch

from neox.data.samples import loader as module
from neox.data.samples.blend import BlendedDataset
from neox.data.samples.loader import Loader, positions_in_documents, take
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, gpt_neox_order
from neox.data.samples.sample import BatchArrays, Sample
from neox.errors import DataError


class Numbers:
    """Sample i is i, i + 1, ..., so that a batch shows what was read."""

    def __init__(self, seq_length: int = 4, length: int = 100):
        self.seq_length, self.length = seq_length, length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        if index >= self.length:
            raise DataError("sample is beyond the end of the order", got=index)
        return Sample(np.arange(index, index + self.seq_length + 1), None)

    def describe(self, index: int, token: int) -> str:
        return f"numbers.bin document {index} offset {token}"


def steps(dataset, count, **options):
    with Loader(dataset, **options) as loader:
        return [[batch.sample_ids.tolist() for batch in next(loader)] for _ in range(count)], loader.consumed


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_ranks_and_micro_batches_share_the_global_batch(prefetch):
    mb, gas, dp = 3, 2, 2
    ranks = [
        steps(
            Numbers(),
            2,
            micro_batch_size=mb,
            gradient_accumulation=gas,
            dp_rank=r,
            dp_size=dp,
            start=7,
            prefetch=prefetch,
        )
        for r in range(dp)
    ]
    for rank, (found, consumed) in enumerate(ranks):
        assert consumed == 7 + 2 * mb * gas * dp
        for step in range(2):
            c = 7 + step * mb * gas * dp
            assert found[step] == [[c + m * dp * mb + rank * mb + j for j in range(mb)] for m in range(gas)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_global_sample_sequence_does_not_depend_on_the_layout(prefetch):
    """0 repeated, 0 skipped when batch, accumulation and ranks change at a resume."""
    seen, start = [], 0
    for mb, gas, dp in ((2, 3, 1), (1, 2, 3), (6, 1, 1), (3, 1, 2)):
        found = [
            steps(
                Numbers(),
                2,
                micro_batch_size=mb,
                gradient_accumulation=gas,
                dp_rank=r,
                dp_size=dp,
                start=start,
                prefetch=prefetch,
            )
            for r in range(dp)
        ]
        seen += sorted(i for ids, _ in found for step in ids for batch in step for i in batch)
        start = found[0][1]
    assert seen == list(range(48)) and start == 48


@pytest.mark.parametrize("prefetch", [0, 2])
def test_consumed_counts_what_was_handed_out_and_not_what_was_read_ahead(prefetch):
    """A cursor one step ahead would skip data at every resume."""
    dataset = Numbers()
    with Loader(dataset, micro_batch_size=2, prefetch=prefetch) as loader:
        assert loader.consumed == 0
        first = next(loader)
        time.sleep(0.05)
        assert loader.consumed == 2 and first[0].sample_ids.tolist() == [0, 1]
        second = next(loader)
        assert loader.consumed == 4
    with Loader(dataset, micro_batch_size=2, start=2, prefetch=prefetch) as resumed:
        assert torch.equal(next(resumed)[0].tokens, second[0].tokens)


def test_targets_are_the_tokens_one_further(corpus):
    dataset = EpochDataset(corpus, (0, 101), 16, seed=3)
    with Loader(dataset, micro_batch_size=5) as loader:
        batch = next(loader)[0]
    assert (
        batch.tokens.shape == batch.targets.shape == (5, 16)
        and batch.tokens.dtype == batch.targets.dtype == torch.int64
    )
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    for row in range(5):
        sample = dataset[row].tokens
        assert batch.tokens[row].tolist() == sample[:-1].tolist() and batch.targets[row].tolist() == sample[1:].tolist()
    assert batch.segment_ids is None and batch.position_ids is None


def test_document_mask_gives_segments_and_positions(corpus):
    dataset = EpochDataset(corpus, (0, 101), 64, seed=3, document_mask=True)
    with Loader(dataset, micro_batch_size=3) as loader:
        batch = next(loader)[0]
    assert batch.segment_ids.dtype == torch.int32 and batch.position_ids.dtype == torch.int64
    for row in range(3):
        segments, wanted, position = dataset[row].segment_ids.tolist(), [], 0
        for i, segment in enumerate(segments):
            position = position + 1 if i and segment == segments[i - 1] else 0
            wanted.append(position)
        assert batch.segment_ids[row].tolist() == segments and batch.position_ids[row].tolist() == wanted
    assert positions_in_documents(np.array([[0, 0, 1, 2, 2, 2]], dtype=np.int32)).tolist() == [[0, 1, 0, 0, 1, 2]]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("bad", "vocab_size"), [(-1, 50), (50, 50), (2**40, 50)])
def test_ids_outside_the_vocabulary_name_file_document_offset_and_id(make_dataset, prefetch, bad, vocab_size):
    documents = [[1] * 9, [2] * 9, [3, 4, bad, *[5] * 6]]
    dataset = EpochDataset(make_dataset(documents, dtype="int64"), (0, 3), 13, seed=1)
    loader = Loader(dataset, micro_batch_size=1, vocab_size=vocab_size, prefetch=prefetch)
    with pytest.raises(
        DataError, match=rf"outside the vocabulary; where=.*corpus\.bin document 2 offset 2; got=id {bad}; want=0 to 49"
    ):
        for _ in range(4):
            next(loader)


@pytest.mark.parametrize("bad", [-1, 50])
def test_the_last_target_of_a_row_is_checked_too(make_dataset, bad):
    """No input of the row has that id: it is the one token that is a target only."""
    dataset = EpochDataset(make_dataset([[1, 2, 3, 4, bad]], dtype="int64"), (0, 1), 4, seed=1)
    with pytest.raises(
        DataError, match=rf"outside the vocabulary; where=.*corpus\.bin document 0 offset 4; got=id {bad}; want=0 to 49"
    ):
        next(Loader(dataset, micro_batch_size=1, vocab_size=50, prefetch=0))


class Labelled(Numbers):
    """Numbers with one label changed."""

    def __init__(self, place: int, label: int):
        super().__init__()
        self.place, self.label = place, label

    def __getitem__(self, index: int) -> Sample:
        tokens = np.arange(10 + index, 15 + index)
        labels = tokens.copy()
        labels[self.place] = self.label
        return Sample(tokens, None, labels)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("label", [-1, -99, -101, 0, 9])
def test_a_label_is_the_token_or_ignored(place, label):
    found = (
        rf"label differs from the token; where=numbers\.bin document 0 offset {place}; got=label {label} at token "
        rf"{10 + place}"
    )
    with pytest.raises(DataError, match=found):
        next(Loader(Labelled(place, label), micro_batch_size=2, prefetch=0))
    batch = next(Loader(Labelled(place, -100), micro_batch_size=2, prefetch=0))[0]
    assert batch.targets[0].tolist() == [-100 if i == place else 10 + i for i in range(1, 5)]


def test_an_error_comes_at_the_step_it_belongs_to():
    loader = Loader(Numbers(length=5), micro_batch_size=2, prefetch=4)
    assert next(loader)[0].sample_ids.tolist() == [0, 1]
    assert next(loader)[0].sample_ids.tolist() == [2, 3]
    with pytest.raises(DataError, match="beyond the end of the order; got=5"):
        next(loader)
    assert loader.consumed == 4
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_no_random_generator_is_touched(corpus):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with Loader(EpochDataset(corpus, (0, 101), 16, seed=3), micro_batch_size=2) as loader:
        for _ in range(5):
            next(loader)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_read_ahead_is_bounded():
    dataset = Numbers()
    with Loader(dataset, micro_batch_size=1, prefetch=3) as loader:
        next(loader)
        time.sleep(0.3)
        assert max(dataset.read) <= 5  # one handed out, three waiting, one in the thread's hands


def test_a_dropped_loader_ends_its_thread():
    def living() -> int:
        return sum(thread.is_alive() for thread in threading.enumerate())

    before = living()
    loader = Loader(Numbers(), micro_batch_size=1)
    next(loader)
    assert living() == before + 1
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while living() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert living() == before


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 0},
        {"micro_batch_size": 1, "dp_rank": 1},
        {"micro_batch_size": 1, "start": -1},
        {"micro_batch_size": 1, "gradient_accumulation": 0},
        {"micro_batch_size": 1, "dp_rank": -1},
        {"micro_batch_size": 1, "dp_size": 0},
        {"micro_batch_size": 1, "prefetch": -1},
    ],
)
def test_bad_sizes_are_refused(options):
    with pytest.raises(ValueError, match="out of range"):
        Loader(Numbers(), **options)


@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_are_the_samples_one_by_one(corpus, document_mask):
    """Datasets fill a batch at a time; what they fill in is what they give for each sample."""
    whole = (0, corpus.num_documents)
    sizes = corpus.sizes
    order = gpt_neox_order(sizes, np.arange(len(corpus)), 7, 40, 3)
    epoch, neox = EpochDataset(corpus, whole, 7, 1, document_mask), GptNeoxOrderDataset(corpus, order, 7, document_mask)
    for dataset in (epoch, neox, BlendedDataset([epoch, neox], [0.3, 0.7])):
        with Loader(dataset, micro_batch_size=5, start=2, prefetch=0, vocab_size=1000) as loader:
            (batch,) = next(loader)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            tokens, segments = dataset[sample][:2]
            assert (
                batch.tokens[row].tolist() == tokens[:-1].tolist()
                and batch.targets[row].tolist() == tokens[1:].tolist()
            )
            assert (segments is None) == (batch.segment_ids is None) == (not document_mask)
            assert segments is None or batch.segment_ids[row].tolist() == segments.tolist()
    with pytest.raises(DataError, match="sample is beyond the end of the order"):
        Loader(neox, micro_batch_size=3, start=len(neox) - 1, prefetch=0).__next__()


def test_rows_are_checked_before_they_are_written(corpus):
    out = BatchArrays(np.zeros((2, 7), dtype=np.int64), np.zeros((2, 7), dtype=np.int64))
    starts, rows = np.array([0, 1]), np.array([0, 1])
    for bad in (np.array([0, 2]), np.array([-1, 0])):
        with pytest.raises(IndexError, match="is out of range"):
            corpus.read_rows(starts, bad, out)
    with pytest.raises(ValueError, match="one start per row"):
        corpus.read_rows(np.array([0]), rows, out)
    with pytest.raises(DataError, match="read beyond the end"):
        corpus.read_rows(np.array([0, corpus.num_tokens - 7]), rows, out)
    with pytest.raises(TypeError):
        corpus.read_rows(starts, rows, out._replace(inputs=np.zeros((7, 2), dtype=np.int64).T))
    with pytest.raises(ValueError, match="must be"):
        corpus.read_rows(starts, rows, out._replace(targets=np.zeros((2, 6), dtype=np.int64)))
    marks, places = np.zeros((2, 7), dtype=np.int32), np.zeros((2, 7), dtype=np.int64)
    with pytest.raises(ValueError, match="positions must be"):
        corpus.read_rows(starts, rows, out._replace(segment_ids=marks, position_ids=places[:, :6].copy()))
    with pytest.raises(ValueError, match="positions need segments"):
        corpus.read_rows(starts, rows, out._replace(position_ids=places))
    with pytest.raises(TypeError, match="segments must be"):
        corpus.read_rows(starts, rows, out._replace(segment_ids=places))
    assert not marks.any() and not places.any()


def test_retained_batches_do_not_change(corpus):
    order = EpochDataset(corpus, (0, corpus.num_documents), 16, 1, True)
    with Loader(order, micro_batch_size=2, prefetch=2) as loader:
        kept = [next(loader)[0] for _ in range(12)]
    with Loader(order, micro_batch_size=2, prefetch=0) as loader:
        for batch in kept:
            again = next(loader)[0]
            for one, other in (
                (batch.tokens, again.tokens),
                (batch.segment_ids, again.segment_ids),
                (batch.position_ids, again.position_ids),
            ):
                assert torch.equal(one, other)


def test_the_thread_of_a_loader_ends_with_it_and_does_not_hold_up_the_process():
    before = set(threading.enumerate())
    with Loader(Numbers(), micro_batch_size=1) as loader:
        next(loader)
        (own,) = set(threading.enumerate()) - before
        assert own.daemon
    assert not own.is_alive()
    loader.close()
    with pytest.raises(ValueError, match="loader is closed"):
        next(loader)
    with Loader(Numbers(), micro_batch_size=1, prefetch=0) as loader:
        assert not set(threading.enumerate()) - before and loader.consumed == 0
    with pytest.raises(ValueError, match="loader is closed"):
        next(loader)


def test_a_thread_that_died_is_an_error_after_what_it_left(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    ready, thread = queue.Queue(), threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    ready.put(["the last step"])
    assert take(ready, thread) == ["the last step"]
    found = take(ready, thread)
    assert isinstance(found, RuntimeError) and "the loader's thread died" in str(found)


@pytest.mark.parametrize("vocab_size", [13, 14])
def test_ids_of_single_samples_are_checked_and_located(vocab_size):
    """Sample 8 is 8 to 12, sample 9 is 9 to 13: in the second row, as a target only."""
    loader = Loader(Numbers(), micro_batch_size=2, start=8, prefetch=0, vocab_size=vocab_size)
    if vocab_size == 14:
        assert next(loader)[0].targets[1].tolist() == [10, 11, 12, 13]
        return
    with pytest.raises(DataError, match=r"where=numbers\.bin document 9 offset 4; got=id 13; want=0 to 12"):
        next(loader)


def test_without_a_vocabulary_no_id_is_checked(make_dataset):
    dataset = EpochDataset(make_dataset([[1, 2, 60_000, 3]]), (0, 1), 3, seed=1)
    assert next(Loader(dataset, micro_batch_size=1, prefetch=0))[0].tokens.tolist() == [[1, 2, 60_000]]
    assert next(Loader(dataset, micro_batch_size=1, prefetch=0, vocab_size=60_001))[0].targets[0, 1] == 60_000


def test_single_samples_give_the_fields_that_they_have():
    class Marked(Numbers):
        def __getitem__(self, index: int) -> Sample:
            return Sample(np.arange(index, index + 5), np.array([0, 0, 1, 1], dtype=np.int32), None, index % 4)

    (batch,) = next(Loader(Marked(), micro_batch_size=3, start=5, prefetch=0))
    assert batch.ends.tolist() == [1, 2, 3] and batch.ends.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.sample_ids.tolist() == [5, 6, 7] and batch.reference is None
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1]] * 3 and batch.segment_ids.dtype == torch.int32
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]] * 3
    (plain,) = next(Loader(Numbers(), micro_batch_size=1, prefetch=0))
    assert plain.ends is plain.segment_ids is plain.position_ids is plain.reference is None
