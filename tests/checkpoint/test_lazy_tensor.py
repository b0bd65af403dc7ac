"""Values made when they are written."""

from __future__ import annotations

import pytest
import torch

from neox.checkpoint.lazy_tensor import LazyTensor, lazy_fragment
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.errors import CheckpointError

VALUES = torch.arange(60, dtype=torch.float32).view(5, 12)


def write(root, value: LazyTensor, **options):
    return save(
        root,
        Content(0, {}, start_lineage(root)),
        [lazy_fragment("a", value)],
        **options,
    )


def test_a_tensor_is_computed_once_when_it_is_written(tmp_path):
    made = []
    value = LazyTensor(lambda: made.append(1) or VALUES, (5, 12), torch.float32)
    assert value.numel() == 60 and value[3:9].numel() == 6 and made == []
    with Checkpoint(write(tmp_path, value)) as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), VALUES)
    assert made == [1]


def test_a_tensor_is_split_over_several_files(tmp_path):
    with Checkpoint(write(tmp_path, LazyTensor(lambda: VALUES, (5, 12), torch.float32), shard_bytes=100)) as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), VALUES)
        assert len(checkpoint.manifest.files) > 1


@pytest.mark.parametrize("wrong", [VALUES.t(), VALUES.double()])
def test_a_tensor_must_match_its_declaration(tmp_path, wrong):
    with pytest.raises(CheckpointError, match="differs from its declaration"):
        write(tmp_path, LazyTensor(lambda: wrong, (5, 12), torch.float32))
    assert list(tmp_path.glob("*/manifest.json")) == []


def test_it_is_flat():
    with pytest.raises(ValueError, match="flat"):
        LazyTensor(lambda: VALUES, (5, 12), torch.float32).reshape(5)


def test_a_part_of_a_part():
    value = LazyTensor(lambda: VALUES, (5, 12), torch.float32)
    part = value[3:9][1:4]
    assert part.numel() == 3 and torch.equal(part.to("cpu"), torch.tensor([4.0, 5.0, 6.0]))
    assert torch.equal(value[50:].to("cpu"), torch.arange(50.0, 60.0)) and value[50:].numel() == 10
    assert torch.equal(value.reshape(-1).detach().to("cpu"), VALUES.flatten())


def test_a_fragment_covers_its_tensor():
    value = LazyTensor(lambda: VALUES, (5, 12), torch.float32)
    one = lazy_fragment("a", value)
    assert (one.name, one.kind, one.shape, one.slices) == ("a", "weight", (5, 12), ((0, 5), (0, 12)))
    assert (one.start, one.stop) == (0, 60) and one.data is value
    assert lazy_fragment("a", value, "exp_avg").kind == "exp_avg"


def test_a_wrong_shape_of_as_many_elements_is_named():
    value = LazyTensor(lambda: VALUES.view(12, 5), (5, 12), torch.float32)
    with pytest.raises(CheckpointError, match=r"got=torch.float32 \(12, 5\); want=torch.float32 \(5, 12\)"):
        value.to("cpu")


def test_a_scalar_is_one_element():
    value = LazyTensor(lambda: torch.tensor(3.0), (), torch.float32)
    assert value.numel() == 1 and torch.equal(value.to("cpu"), torch.tensor([3.0]))
    assert value[1:].numel() == 0 and value[0:1].to("cpu").shape == (1,)
