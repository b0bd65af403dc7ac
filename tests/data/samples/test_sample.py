"""Samples and pairs as dicts of their fields, which torch's DataLoader collates."""

from __future__ import annotations

import numpy as np
from torch.utils.data import DataLoader

from neox.data.samples.order import EpochDataset
from neox.data.samples.sample import Pair, Sample, fields_of


def test_the_data_loader_of_torch_collates_samples(corpus):
    for mask in (False, True):
        dataset = EpochDataset(corpus, (0, 101), 16, seed=1, document_mask=mask)
        batches = list(DataLoader(dataset, batch_size=4, drop_last=True))
        assert len(batches) == len(dataset) // 4
        assert set(batches[0]) == ({"tokens", "segment_ids"} if mask else {"tokens"})  # and nothing that is None
        assert batches[1]["tokens"].shape == (4, 17)
        assert (batches[1]["tokens"].numpy() == np.stack([dataset[i].tokens for i in range(4, 8)])).all()


def test_pairs_and_labels_are_nested_fields():
    row = Sample(np.arange(5), None, np.full(5, -100), 3)
    found = fields_of(Pair(row, row._replace(end=4)))
    assert set(found) == {"chosen", "rejected"} and set(found["chosen"]) == {"tokens", "labels", "end"}
