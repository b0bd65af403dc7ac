"""The plan beside what a run measured."""

from __future__ import annotations

from neox.train.planned import Comparison


def test_both_are_told():
    lines = Comparison(3, 1, (1.1e9, 1.0e9), (2.0, 2.5)).lines()
    assert lines == ["memory: 1.100 GB planned, 1.000 GB measured (+10.0 %) on rank 3, stage 1", "step: 2 s planned, 2.5 s measured, median (-20.0 %)"]
    assert Comparison(0, 0, (1.0, None), (None, 1.0)).lines() == []
