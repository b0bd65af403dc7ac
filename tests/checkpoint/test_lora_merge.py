"""Checkpoints with adapters, read without them."""

from __future__ import annotations

import pytest
import torch

from neox.checkpoint.lora_merge import MergedCheckpoint, open_weights
from neox.checkpoint.reader import Checkpoint
from neox.errors import CheckpointError
from tests.checkpoint.builders import save_one


@pytest.fixture
def saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.mlp.up.weight": (10, 6),
        "layers.0.mlp.up.lora_a": (2, 6),
        "layers.0.mlp.up.lora_b": (10, 2),
        "norm.weight": (6,),
    }
    state = {(name, "weight"): torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["layers.0.mlp.up.lora_a", "exp_avg"] = torch.zeros(2, 6)
    path = save_one(tmp_path, state=state, model_config={"num_layers": 1, "lora": {"rank": 2, "alpha": 5.0}})
    return path, {name: tensor for (name, kind), tensor in state.items() if kind == "weight"}


def test_adapters_are_merged_and_other_weights_unchanged(saved):
    path, tensors = saved
    with open_weights(path) as checkpoint:
        assert (
            checkpoint.names() == ["layers.0.mlp.up.weight", "norm.weight"] and checkpoint.model_config["lora"] is None
        )
        assert checkpoint.model_config == {"num_layers": 1, "lora": None}
        want = (
            tensors["layers.0.mlp.up.weight"]
            + 2.5 * tensors["layers.0.mlp.up.lora_b"] @ tensors["layers.0.mlp.up.lora_a"]
        )
        torch.testing.assert_close(checkpoint.tensor("layers.0.mlp.up.weight"), want)
        assert torch.equal(checkpoint.tensor("norm.weight"), tensors["norm.weight"])
        part = checkpoint.read("layers.0.mlp.up.weight", slices=((3, 8), (1, 5)), start=6, stop=17)
        torch.testing.assert_close(part, want[3:8, 1:5].flatten()[6:17])
        checkpoint.check([("layers.0.mlp.up.weight", "weight", (10, 6)), ("norm.weight", "weight", (6,))])
        with pytest.raises(CheckpointError, match="tensors do not fit the model; .*got=1 tensor: "):
            checkpoint.check([("layers.0.mlp.up.weight", "weight", (10, 6))])


def test_a_checkpoint_without_adapters_is_opened_as_it_is(tmp_path):
    with open_weights(save_one(tmp_path)) as checkpoint:
        assert type(checkpoint) is Checkpoint is not MergedCheckpoint


def test_a_part_is_read_into_a_tensor_merged(saved):
    path, tensors = saved
    name = "layers.0.mlp.up.weight"
    want = tensors[name] + 2.5 * tensors["layers.0.mlp.up.lora_b"] @ tensors["layers.0.mlp.up.lora_a"]
    with open_weights(path) as checkpoint:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            out = torch.zeros(11, dtype=dtype)
            checkpoint.read_into(out, name, "weight", ((3, 8), (1, 5)), 6, 17)
            torch.testing.assert_close(out.float(), want[3:8, 1:5].flatten()[6:17], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(checkpoint.read(name, start=7), want.flatten()[7:])
        torch.testing.assert_close(checkpoint.read(name, stop=7), want.flatten()[:7])
        out = torch.zeros(2)
        checkpoint.read_into(out, "norm.weight", "weight", ((1, 6),), 1, 3)
        assert torch.equal(out, tensors["norm.weight"][2:4])


def test_what_has_no_adapter_is_read_as_it_is(saved):
    """Also the factors themselves, and optimizer state."""
    path, tensors = saved
    with open_weights(path) as checkpoint:
        assert torch.equal(checkpoint.tensor("layers.0.mlp.up.lora_b"), tensors["layers.0.mlp.up.lora_b"])
        assert torch.equal(checkpoint.tensor("layers.0.mlp.up.lora_a", "exp_avg"), torch.zeros(2, 6))
        assert checkpoint.stored_shapes({"weight"}) == {
            ("weight", "layers.0.mlp.up.weight"): (10, 6),
            ("weight", "norm.weight"): (6,),
        }
