"""What a process computes of a micro-batch."""

import dataclasses

import pytest
import torch

from neox.data.samples.loader import Batch
from neox.engine.batch import context_slice, to_device
from neox.engine.objective import TokenLoss
from neox.parallel.mesh import Mesh
from neox.targets import IGNORED


def make_batch() -> Batch:
    tokens = torch.arange(24).view(2, 12)
    targets = tokens.clone()
    targets[0, :5] = IGNORED
    return Batch(tokens, targets, torch.ones(2, 12, dtype=torch.int32), tokens % 12, torch.tensor([3, 4]))


def test_ignored_targets_do_not_count():
    assert TokenLoss().count(make_batch()) == 19


def test_a_batch_that_is_there_is_not_copied():
    batch = make_batch()
    assert to_device(batch, torch.device("cpu")) is batch
    moved = to_device(batch, torch.device("meta"))
    assert moved.sample_ids is batch.sample_ids
    assert moved.position_ids.device.type == "meta"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_sequence_is_sharded_over_the_context_group_except_for_segment_ids(size):
    batch = make_batch()
    single = Mesh.single()
    assert context_slice(batch, single) is batch
    parts = [context_slice(batch, Mesh(**{**vars(single), "cp": size, "rank": rank})) for rank in range(size)]
    for name in ("tokens", "targets", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
        assert all(getattr(part, name).shape == (2, 12 // size) for part in parts)
    assert all(part.segment_ids is batch.segment_ids for part in parts)


def test_every_tensor_moves_except_for_the_ids():
    batch = dataclasses.replace(make_batch(), ends=torch.tensor([3, 4]), reference=torch.rand(2))
    moved = to_device(batch, torch.device("meta"))
    for name in ("tokens", "targets", "segment_ids", "position_ids", "ends", "reference"):
        before, after = getattr(batch, name), getattr(moved, name)
        assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype), name
    assert moved.sample_ids is batch.sample_ids
    bare = Batch(batch.tokens, batch.targets, None, None, batch.sample_ids)
    moved = to_device(bare, torch.device("meta"))
    assert moved.segment_ids is moved.position_ids is moved.ends is moved.reference is None


def test_a_slice_of_the_sequence_is_contiguous_and_keeps_what_has_no_positions():
    batch = dataclasses.replace(make_batch(), position_ids=None, ends=torch.tensor([3, 4]), reference=torch.rand(2))
    part = context_slice(batch, dataclasses.replace(Mesh.single(), cp=3, tp=2, rank=3))  # the second of three
    assert torch.equal(part.tokens, batch.tokens[:, 4:8]) and torch.equal(part.targets, batch.targets[:, 4:8])
    assert part.tokens.is_contiguous() and part.targets.is_contiguous()
    assert part.position_ids is None and part.ends is batch.ends and part.reference is batch.reference
    assert part.sample_ids is batch.sample_ids
