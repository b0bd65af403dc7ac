from __future__ import annotations

import pytest

from tests.distributed import run_ranks


@pytest.mark.distributed
def test_forward_and_backward_over_two_processes(tmp_path):
    run_ranks("tests.parallel.collectives_by_hand:collectives", 2, tmp_path)
