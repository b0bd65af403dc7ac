"""Blending: upstream's sequence, exact counts, hostile weights."""

from __future__ import annotations

import numpy as np
import pytest

from neox.data.samples.blend import Blend, BlendedDataset, blend_indices
from neox.data.samples.order import EpochDataset
from neox.errors import DataError
from tests.data.samples.gpt_neox_arrays import GPT_NEOX, assert_equal


def plain_blend(weights, size):
    """The definition, in Python floats."""
    shares = (np.asarray(weights) / np.sum(weights)).tolist()
    taken, dataset, sample = [0] * len(shares), [], []
    for i in range(size):
        lags = [share * float(max(i, 1)) - taken[k] if share > 0 else -np.inf for k, share in enumerate(shares)]
        best = lags.index(max(lags))
        dataset.append(best)
        sample.append(taken[best])
        taken[best] += 1
    return dataset, sample


def test_equals_upstream():
    wanted = GPT_NEOX["blend"]
    dataset, sample = blend_indices(wanted["weights"], wanted["size"])
    assert_equal({"dataset_index": dataset, "dataset_sample_index": sample}, wanted["arrays"])


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.1, 0.7, 0.2], [3, 0, 1e-9, 5], [0, 1], [0, 0, 2, 2]])
def test_equals_its_definition(weights):
    dataset, sample = blend_indices(weights, 500)
    assert (dataset.tolist(), sample.tolist()) == plain_blend(weights, 500)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 300])
def test_no_dataset_number_wraps(count):
    weights = np.arange(1, count + 1, dtype=float)
    dataset, sample = blend_indices(weights, 20_000)
    counts = np.bincount(dataset, minlength=count)
    assert np.abs(counts - 20_000 * weights / weights.sum()).max() <= 1.0
    for k in (0, count // 2, count - 1):
        assert np.array_equal(sample[dataset == k], np.arange(counts[k]))


def test_forty_thousand_datasets():
    dataset, sample = blend_indices(np.ones(40_000), 40_100)
    assert sorted(dataset[:40_000].tolist()) == list(range(40_000)) and sample[40_000:].tolist() == [1] * 100


def test_weight_zero_never_gives_a_sample():
    """At sample 1 of [0, 1] both lag by exactly 0, and the first would win the tie."""
    assert blend_indices([0, 1, 0], 100)[0].tolist() == [1] * 100


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, float("nan")], "bad weight of a dataset; where=dataset 1; got=nan"),
        ([1, 2, -0.5], "dataset 2; got=-0.5"),
        ([float("inf")], "dataset 0; got=inf"),
        ([0, 0], "is not positive and finite"),
        ([1e308, 1e308], "is not positive and finite"),
        ([], "needs a list of weights"),
        ([[1, 2]], "needs a list of weights"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(DataError, match=message), np.errstate(over="ignore"):
        blend_indices(weights, 10)


def test_unbounded_blend_equals_the_array_in_any_order_of_access():
    weights = [0.61, 0.3, 0.09]
    size = 3 * Blend.BLOCK + 100
    dataset, sample = blend_indices(weights, size)
    for visit in (
        np.arange(0, size, 4999),
        np.arange(size - 1, -1, -9973),
        np.random.default_rng(0).integers(0, size, 50),
    ):
        blend = Blend(weights)
        for i in visit.tolist():
            assert blend[i] == (dataset[i], sample[i])


def test_what_was_taken_and_where_it_stands():
    """Over several blocks, and one that is cut off."""
    weights, count = [0.2, 0.5, 0.0, 0.3], 2 * Blend.BLOCK + 1000
    dataset, sample = blend_indices(weights, count)
    blend = Blend(weights)
    assert (
        blend.taken(count).tolist() == np.bincount(dataset, minlength=4).tolist() and blend.taken(0).tolist() == [0] * 4
    )
    inner = [np.array([0, 7, 20_000]), np.arange(30_000, 30_010), np.array([0]), np.empty(0, dtype=np.int64)]
    wanted = [i for i in range(count) if sample[i] in inner[dataset[i]].tolist()]
    assert blend.positions(inner, count).tolist() == wanted and len(wanted) == 13


def test_blended_dataset_takes_each_source_in_its_own_order(make_dataset):
    sources = [EpochDataset(make_dataset([np.arange(200) + 1000 * k], name=str(k)), (0, 1), 8, 1) for k in range(3)]
    blended = BlendedDataset(sources, [0.5, 0.0, 0.5])
    taken = [0, 0, 0]
    for i in range(200):
        which, inner = blended._blend[i]
        assert inner == taken[which]
        taken[which] += 1
        assert np.array_equal(blended[i].tokens, sources[which][inner].tokens)
    assert taken == [100, 0, 100]
    assert blended.describe(1, 0).startswith(sources[2]._dataset.bin_path)
