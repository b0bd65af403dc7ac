"""The distribution of a global batch: every sample has one row, and is found there."""

from __future__ import annotations

import pytest

from neox.data.samples.batch_layout import BatchLayout


@pytest.mark.parametrize(("micro_batch_size", "dp", "accumulation"), [(1, 1, 1), (3, 1, 4), (2, 3, 1), (2, 4, 3)])
def test_every_sample_is_in_one_row_and_found_there(micro_batch_size, dp, accumulation):
    layout = BatchLayout(micro_batch_size, dp)
    rows = {
        sample: (micro_batch, dp_rank, row)
        for micro_batch in range(accumulation)
        for dp_rank in range(dp)
        for row, sample in enumerate(layout.samples(micro_batch, dp_rank))
    }
    assert list(rows) == list(range(micro_batch_size * dp * accumulation))
    assert {sample: layout.locate(sample) for sample in rows} == rows


def test_ranks_lie_as_in_the_mesh():
    layout = BatchLayout(2, dp=3, tp=2, cp=2)
    of_one_stage = [0] * 4 + [1] * 4 + [2] * 4
    assert [layout.dp_rank(rank) for rank in range(24)] == of_one_stage * 2
    assert [BatchLayout(2, dp=3).dp_rank(rank) for rank in range(6)] == [0, 1, 2] * 2  # neither is parallel
