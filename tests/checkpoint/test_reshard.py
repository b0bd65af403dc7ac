"""Any cut into any other, against numpy-style indexing of the whole tensor."""

import itertools
import random

import pytest
import torch

from neox.checkpoint.reshard import check_address, check_coverage, full_slices, overlaps, placed_boxes, slice_shape, split_range
from neox.errors import CheckpointError


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_of_every_range_hold_its_elements_in_order(shape):
    size = torch.Size(shape).numel()
    logical = torch.arange(size).view(shape)
    for start, stop in itertools.combinations(range(size + 1), 2):
        boxes = split_range(shape, start, stop)
        parts = [logical[tuple(slice(a, b) for a, b in zip(box.low, box.high, strict=True))].reshape(-1) for box in boxes]
        assert torch.cat(parts).tolist() == list(range(start, stop))
        assert [box.offset for box in boxes] == [int(part[0]) - start for part in parts]
        assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_empty_range_has_no_boxes():
    assert split_range((3, 4), 5, 5) == []
    assert split_range((0, 4), 0, 0) == []


def _random_piece(generator, shape):
    slices = tuple(tuple(sorted(generator.sample(range(size + 1), 2))) for size in shape)
    size = torch.Size(slice_shape(slices)).numel()
    start, stop = sorted((generator.randint(0, size), generator.randint(0, size)))
    return slices, start, stop


@pytest.mark.parametrize("shape", [(9,), (5, 7), (3, 4, 5)])
def test_copy_of_random_pieces_equals_masked_copy(shape):
    generator = random.Random(5)
    logical = torch.arange(torch.Size(shape).numel()).view(shape)
    for _ in range(150):
        (s_slices, s0, s1), (t_slices, t0, t1) = _random_piece(generator, shape), _random_piece(generator, shape)
        pick = lambda box: logical[tuple(slice(a, b) for a, b in box)].reshape(-1)  # noqa: E731
        source, wanted = pick(s_slices)[s0:s1], pick(t_slices)[t0:t1]
        target = torch.full_like(wanted, -1)
        for shared in overlaps(placed_boxes(s_slices, s0, s1), placed_boxes(t_slices, t0, t1)):
            shared.copy(source, target)
            low, high = shared.span(shared.source)
            assert 0 <= low < high <= source.numel()
        expected = torch.where(torch.isin(wanted, source), wanted, -1)
        assert torch.equal(target, expected)


def test_span_covers_what_is_copied():
    source = placed_boxes(full_slices((6, 10)), 0, 60)
    (shared,) = overlaps(source, placed_boxes(((2, 4), (3, 5)), 0, 4))
    assert shared.span(shared.source) == (23, 35)
    assert shared.size == 4


def test_coverage_accepts_exact_cuts_only():
    shape = (4, 6)
    left, right = ((0, 4), (0, 3)), ((0, 4), (3, 6))
    check_coverage("w", "weight", shape, [(left, 0, 5), (left, 5, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match=r"not covered.*got=23 elements; want=24"):
        check_coverage("w", "weight", shape, [(left, 0, 5), (left, 6, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match="pieces overlap"):
        check_coverage("w", "weight", shape, [(left, 0, 6), (left, 5, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match="slices overlap"):
        check_coverage("w", "weight", shape, [(((0, 4), (0, 4)), 0, 16), (((0, 4), (2, 6)), 0, 16)])


def test_addresses_are_checked():
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        check_address("w", "weight", (4, 6), ((0, 5), (0, 6)), 0, 1)
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        check_address("w", "weight", (4, 6), ((0, 4),), 0, 1)
    with pytest.raises(CheckpointError, match="flat range outside the slice"):
        check_address("w", "weight", (4, 6), ((0, 4), (0, 6)), 0, 25)
