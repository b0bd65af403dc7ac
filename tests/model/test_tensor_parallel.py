from __future__ import annotations

import pytest

from tests.distributed import run_ranks


@pytest.mark.distributed
def test_models_cut_over_two_processes_equal_whole_ones(tmp_path):
    run_ranks("tests.model.tensor_parallel:models", 2, tmp_path)
