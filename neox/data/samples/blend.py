"""Blending: which dataset each sample comes from, by weight (csrc/data/blend.h)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neox._native import core
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset
from neox.data.samples.provenance import Coverage, DocumentSlice
from neox.data.samples.sample import BatchArrays, Collatable, Dataset, Pair, Sample
from neox.errors import DataError


def normalise_weights(weights: Sequence[float]) -> np.ndarray:
    """Weights as shares that sum to 1, float64.

    Raises:
        DataError: a weight is negative or not finite, all are 0, or there is none; names the dataset.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.ndim != 1 or shares.size == 0:
        raise DataError("a blend needs a list of weights", got=f"shape {shares.shape}")
    bad = np.flatnonzero(~np.isfinite(shares) | (shares < 0))
    if bad.size:
        raise DataError("bad weight of a dataset", where=f"dataset {bad[0]}", got=shares[bad[0]], want="a finite number >= 0")
    total = shares.sum()
    if not 0 < total < np.inf:
        raise DataError("weights of a blend have no finite sum above 0", got=total)
    return shares / total


def blend_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample i comes from dataset_index[i] and is its dataset_sample_index[i]-th, as in GPT-NeoX.

    Sample i goes to the dataset with the largest weight x max(i, 1) - samples given so far, the first on a tie; a dataset of
    weight 0 never gets one. The result for a smaller size is a prefix of that for a larger one.

    Returns:
        dataset_index int32 [size], dataset_sample_index int64 [size].

    Raises:
        DataError: see `normalise_weights`.
        ValueError: negative size.
    """
    shares = normalise_weights(weights)
    dataset, sample, _ = core.blend(shares, 0, size, np.zeros(shares.size, dtype=np.int64))
    return dataset, sample


class Blend:
    """The same sequence as `blend_indices`, unbounded, computed in blocks as samples are asked for.

    Two blocks are kept, and the counts at each block's start, so that going back costs one block.
    """

    BLOCK = 1 << 16

    def __init__(self, weights: Sequence[float]):
        self.shares = normalise_weights(weights)
        self._starts = [np.zeros(self.shares.size, dtype=np.int64)]  # samples taken from each dataset before block k
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """(dataset, sample of that dataset)."""
        number, offset = divmod(sample, self.BLOCK)
        dataset, inner = self._block(number)
        return int(dataset[offset]), int(inner[offset])

    def taken(self, count: int) -> np.ndarray:
        """How many of the first `count` samples come from each dataset, int64."""
        out = np.zeros(self.shares.size, dtype=np.int64)
        for first in range(0, count, self.BLOCK):
            out = core.blend(self.shares, first, min(self.BLOCK, count - first), out)[2]
        return out

    def positions(self, inner: list[np.ndarray], count: int) -> np.ndarray:
        """Where samples stand in the blend: those below `count` that are sample inner[k][j] of dataset k, int64, ascending."""
        taken, found = np.zeros(self.shares.size, dtype=np.int64), [np.empty(0, dtype=np.int64)]
        for first in range(0, count, self.BLOCK):
            dataset, sample, taken = core.blend(self.shares, first, min(self.BLOCK, count - first), taken)
            wanted = np.zeros(dataset.size, dtype=bool)
            for number, samples in enumerate(inner):
                wanted |= (dataset == number) & np.isin(sample, samples) if samples.size else False
            found.append(first + np.flatnonzero(wanted))
        return np.concatenate(found)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number in self._blocks:
            return self._blocks[number]
        for k in range(min(number, len(self._starts) - 1), number + 1):
            dataset, inner, after = core.blend(self.shares, k * self.BLOCK, self.BLOCK, self._starts[k])
            if len(self._starts) == k + 1:
                self._starts.append(after)
        while len(self._blocks) > 1:
            self._blocks.pop(next(iter(self._blocks)))
        self._blocks[number] = (dataset, inner)
        return dataset, inner


@dataclass(frozen=True)
class BlendPhase:
    """Samples of a run that were blended by one set of weights.

    Args:
        first: the run's first sample of the phase; it ends where the next one begins.
        weights: of the datasets.
        taken: samples that each dataset had given before it.
    """

    first: int
    weights: tuple[float, ...]
    taken: tuple[int, ...]


class PhasedBlend:
    """A blend whose weights changed during the run: each dataset continues after the last sample that it gave.

    Args:
        phases: at least one, ascending by `first`.

    Raises:
        DataError: bad weights, or a sample before the first phase is asked for.
    """

    def __init__(self, phases: Sequence[BlendPhase]):
        self._phases = list(phases)
        self._firsts = [phase.first for phase in self._phases]
        self._blends = [Blend(phase.weights) for phase in self._phases]
        self._before = [np.array(phase.taken, dtype=np.int64) for phase in self._phases]

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """(dataset, sample of that dataset)."""
        number = self._number(sample)
        dataset, inner = self._blends[number][sample - self._firsts[number]]
        return dataset, inner + int(self._before[number][dataset])

    def taken(self, count: int) -> np.ndarray:
        """How many of the first `count` samples come from each dataset, int64."""
        if count == 0:
            return np.zeros_like(self._before[0])
        number = self._number(count)
        return self._before[number] + self._blends[number].taken(count - self._firsts[number])

    def positions(self, inner: list[np.ndarray], count: int) -> np.ndarray:
        """Positions in the run of samples inner[k][j] of dataset k, those from the first phase on and below `count`, int64, ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for number, (first, blend) in enumerate(zip(self._firsts, self._blends, strict=True)):
            end = min(count, self._firsts[number + 1]) if number + 1 < len(self._firsts) else count
            if end > first:
                wanted = [samples - before for samples, before in zip(inner, self._before[number].tolist(), strict=True)]
                found.append(first + blend.positions(wanted, end - first))
        return np.concatenate(found)

    def _number(self, sample: int) -> int:
        """The phase that a sample lies in."""
        if sample < self._firsts[0]:
            raise DataError(
                "how the sample was read is not known: the run continued with other data after it",
                got=f"sample {sample:,}",
                want=f"{self._firsts[0]:,} or later",
                do="keep a checkpoint from before the change (checkpoint.keep)",
            )
        return bisect_right(self._firsts, sample) - 1


class MixedDataset(Collatable):
    """Several datasets mixed by weight. `len` is the sum of theirs; each is read in its own order, one sample after the other.

    Args:
        phases: how the run has blended them so far and continues; None: by `weights` from its first sample on.
    """

    def __init__(self, datasets: list[Dataset], weights: list[float], phases: Sequence[BlendPhase] | None = None):
        self.parts = datasets
        self._blend = PhasedBlend(phases or [BlendPhase(0, tuple(weights), (0,) * len(datasets))])

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.parts)

    def __getitem__(self, index: int) -> Sample | Pair:
        dataset, inner = self._blend[index]
        return self.parts[dataset][inner]

    def describe(self, index: int, token: int) -> str:
        """Where token `token` of sample `index` lies: file, document, offset."""
        dataset, inner = self._blend[index]
        return self.parts[dataset].describe(inner, token)

    def slices(self, index: int) -> list[DocumentSlice]:
        """The parts of documents that sample `index` is made of."""
        dataset, inner = self._blend[index]
        return self.parts[dataset].slices(inner)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` that hold a part of a document, int64."""
        taken = self._blend.taken(count)
        inner = [part.find(prefix, document, given) for part, given in zip(self.parts, taken.tolist(), strict=True)]
        return self._blend.positions(inner, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read."""
        return [seen for part, given in zip(self.parts, self._blend.taken(count).tolist(), strict=True) for seen in part.coverage(given)]


class BlendedDataset(MixedDataset):
    """Datasets that are read many samples at a time, mixed by weight."""

    def __init__(self, datasets: list[EpochDataset | GptNeoxOrderDataset], weights: list[float], phases: Sequence[BlendPhase] | None = None):
        super().__init__(datasets, weights, phases)
        self.seq_length = datasets[0].seq_length
        self.document_mask = datasets[0].document_mask

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int:
        """Sample indices[i] into row rows[i]. Returns the largest id."""
        sources, inner = (np.array(numbers, dtype=np.int64) for numbers in zip(*(self._blend[index] for index in indices.tolist()), strict=True))
        owners = [(source, sources == source) for source in np.unique(sources).tolist()]
        return max(self.parts[source].read_rows(inner[own], rows[own], out) for source, own in owners)
