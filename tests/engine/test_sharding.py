"""A model under every ZeRO stage; tests/engine/test_optimizer_state.py has what is written and read back."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neox.engine.sharding import copy_to_host
from neox.parallel.mesh import Mesh
from tests.engine.toy import gathered, make_config, make_engine


def test_the_weights_before_rounding_wait_on_the_host():
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(3, device="cuda"))
        assert copy_to_host([("a", parameter, None)])["a"].is_cpu
    parameter = torch.nn.Parameter(torch.ones(3))
    copy = copy_to_host([("a", parameter, None)])["a"]
    assert torch.equal(copy, parameter)
    assert copy.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_master_weights_are_those_before_rounding(dtype, stage):
    want = gathered(make_engine(make_config(), Mesh.single()))
    engine = make_engine(make_config(precision={"dtype": dtype}, zero={"stage": stage}), Mesh.single())
    got = gathered(engine)
    for name, value in want.items():
        if name.startswith("weight/"):
            assert torch.equal(got[name], value), name
    assert all(p.dtype == engine.deepspeed.get_data_types()[0] for _, p, _ in engine.trained)
