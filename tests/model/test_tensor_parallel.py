from __future__ import annotations

import pytest

from tests.distributed import run_ranks


@pytest.mark.distributed
def test_tensor_parallel_models_equal_models_on_one_process(tmp_path):
    run_ranks("tests.model.tensor_parallel:models", 2, tmp_path)
