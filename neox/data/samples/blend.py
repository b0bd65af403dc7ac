"""Blending: the dataset that each sample comes from, by weight (csrc/data/blend.h)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neox._native import core
from neox.data.samples.provenance import Coverage, DocumentSlice
from neox.data.samples.sample import BatchArrays, BatchReader, Collatable, Dataset, Pair, Sample
from neox.errors import DataError


def normalise_weights(weights: Sequence[float]) -> np.ndarray:
    """Weights as shares that sum to 1, float64.

    Raises:
        DataError: a weight is negative or not finite, all are 0, or there is none. The message names the dataset.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.ndim != 1 or shares.size == 0:
        raise DataError("a blend needs a list of weights", got=f"shape {shares.shape}")
    bad = np.flatnonzero(~np.isfinite(shares) | (shares < 0))
    if bad.size:
        raise DataError(
            "bad weight of a dataset", where=f"dataset {bad[0]}", got=shares[bad[0]], want="a finite number >= 0"
        )
    total = shares.sum()
    if not 0 < total < np.inf:
        raise DataError("sum of the weights of a blend is not positive and finite", got=total)
    return shares / total


def blend_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The dataset and its sample for each of the first `size` samples of a blend, as in GPT-NeoX.

    Sample i comes from the dataset with the largest weight x max(i, 1) - samples taken from it so far, the first on a
    tie. A dataset of weight 0 never gives a sample. The result for a smaller size is a prefix of that for a larger one.

    Returns:
        dataset_index int32 [size] and dataset_sample_index int64 [size]: sample i is sample dataset_sample_index[i] of
        dataset dataset_index[i].

    Raises:
        DataError: see `normalise_weights`.
        ValueError: negative size.
    """
    shares = normalise_weights(weights)
    dataset, sample, _ = core.blend(shares, 0, size, np.zeros(shares.size, dtype=np.int64))
    return dataset, sample


class Blend:
    """The unbounded sequence of `blend_indices`, computed in blocks on demand.

    Retains two blocks, and the counts at the start of each block, so that going back costs one block.
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
        """The number of the first `count` samples that come from each dataset, int64."""
        out = np.zeros(self.shares.size, dtype=np.int64)
        for first in range(0, count, self.BLOCK):
            out = core.blend(self.shares, first, min(self.BLOCK, count - first), out)[2]
        return out

    def positions(self, inner: list[np.ndarray], count: int) -> np.ndarray:
        """Positions in the blend, below `count`, of samples inner[k][j] of dataset k: int64, ascending."""
        taken = np.zeros(self.shares.size, dtype=np.int64)
        found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
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
    """Samples of a run that are blended by one set of weights.

    Attributes:
        first: first sample of the phase, which ends where the next phase begins.
        weights: weights of the datasets.
        taken: number of samples taken from each dataset before the phase.
    """

    first: int
    weights: tuple[float, ...]
    taken: tuple[int, ...]


class PhasedBlend:
    """A blend whose weights changed during the run. Each dataset continues after its last sample.

    Args:
        phases: at least one, ascending by `first`.

    Raises:
        DataError: bad weights, or a sample before the first phase is requested.
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
        """The number of the first `count` samples that come from each dataset, int64."""
        if count == 0:
            return np.zeros_like(self._before[0])
        number = self._number(count)
        return self._before[number] + self._blends[number].taken(count - self._firsts[number])

    def positions(self, inner: list[np.ndarray], count: int) -> np.ndarray:
        """Positions in the run, below `count`, of samples inner[k][j] of dataset k: int64, ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for number, (first, blend) in enumerate(zip(self._firsts, self._blends, strict=True)):
            end = min(count, self._firsts[number + 1]) if number + 1 < len(self._firsts) else count
            if end > first:
                wanted = [
                    samples - before for samples, before in zip(inner, self._before[number].tolist(), strict=True)
                ]
                found.append(first + blend.positions(wanted, end - first))
        return np.concatenate(found)

    def _number(self, sample: int) -> int:
        if sample < self._firsts[0]:
            raise DataError(
                "it is unknown how the sample was read, because the data of the run changed later",
                got=f"sample {sample:,}",
                want=f"{self._firsts[0]:,} or later",
                do="retain a checkpoint from before the change (checkpoint.keep)",
            )
        return bisect_right(self._firsts, sample) - 1


class MixedDataset(Collatable):
    """Several datasets blended by weight. `len` is the sum of their lengths; each is read in order.

    Args:
        datasets: the datasets.
        weights: their weights.
        phases: the phases of the blend; None for one phase with `weights`.
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
        """The location of token `token` of sample `index`: file, document, offset."""
        dataset, inner = self._blend[index]
        return self.parts[dataset].describe(inner, token)

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        dataset, inner = self._blend[index]
        return self.parts[dataset].slices(inner)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        taken = self._blend.taken(count)
        inner = [part.find(prefix, document, given) for part, given in zip(self.parts, taken.tolist(), strict=True)]
        return self._blend.positions(inner, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        return [
            seen
            for part, given in zip(self.parts, self._blend.taken(count).tolist(), strict=True)
            for seen in part.coverage(given)
        ]


class BlendedDataset(MixedDataset):
    """Several datasets blended by weight, which are read many samples at a time."""

    def __init__(
        self, datasets: Sequence[BatchReader], weights: list[float], phases: Sequence[BlendPhase] | None = None
    ):
        super().__init__(list(datasets), weights, phases)
        self._readers = datasets
        self.seq_length = datasets[0].seq_length
        self.document_mask = datasets[0].document_mask

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int:
        """Read sample indices[i] into row rows[i]. Returns the largest id."""
        sources, inner = (
            np.array(numbers, dtype=np.int64)
            for numbers in zip(*(self._blend[index] for index in indices.tolist()), strict=True)
        )
        masks = [(source, sources == source) for source in np.unique(sources).tolist()]
        return max(self._readers[source].read_rows(inner[mask], rows[mask], out) for source, mask in masks)
