"""Blending: which dataset each sample comes from, by weight (csrc/data/blend.h)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neox.data._native import core
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

    def places(self, inner: list[np.ndarray], count: int) -> np.ndarray:
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
