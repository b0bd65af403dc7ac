"""Any partition into any other, compared with numpy-style indexing of the complete tensor."""

import itertools
import random

import pytest
import torch

from neox.checkpoint.reshard import (
    check_address,
    check_coverage,
    full_slices,
    logical_boxes,
    overlaps,
    slice_shape,
    split_range,
)
from neox.errors import CheckpointError


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_of_every_range_hold_its_elements_in_order(shape):
    size = torch.Size(shape).numel()
    logical = torch.arange(size).view(shape)
    for start, stop in itertools.combinations(range(size + 1), 2):
        boxes = split_range(shape, start, stop)
        parts = [
            logical[tuple(slice(a, b) for a, b in zip(box.low, box.high, strict=True))].reshape(-1) for box in boxes
        ]
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
def test_copy_of_random_segments_equals_masked_copy(shape):
    generator = random.Random(5)
    logical = torch.arange(torch.Size(shape).numel()).view(shape)
    for _ in range(150):
        (s_slices, s0, s1), (t_slices, t0, t1) = _random_piece(generator, shape), _random_piece(generator, shape)
        pick = lambda box: logical[tuple(slice(a, b) for a, b in box)].reshape(-1)  # noqa: E731
        source, wanted = pick(s_slices)[s0:s1], pick(t_slices)[t0:t1]
        target = torch.full_like(wanted, -1)
        for shared in overlaps(logical_boxes(s_slices, s0, s1), logical_boxes(t_slices, t0, t1)):
            shared.copy(source, target)
            low, high = shared.span(shared.source)
            assert 0 <= low < high <= source.numel()
        expected = torch.where(torch.isin(wanted, source), wanted, -1)
        assert torch.equal(target, expected)


def test_span_covers_what_is_copied():
    source = logical_boxes(full_slices((6, 10)), 0, 60)
    (shared,) = overlaps(source, logical_boxes(((2, 4), (3, 5)), 0, 4))
    assert shared.span(shared.source) == (23, 35)
    assert shared.size == 4


def test_coverage_accepts_exact_cuts_only():
    shape = (4, 6)
    left, right = ((0, 4), (0, 3)), ((0, 4), (3, 6))
    check_coverage("w", "weight", shape, [(left, 0, 5), (left, 5, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match=r"not covered.*got=23 elements; want=24"):
        check_coverage("w", "weight", shape, [(left, 0, 5), (left, 6, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match="segments overlap"):
        check_coverage("w", "weight", shape, [(left, 0, 6), (left, 5, 12), (right, 0, 12)])
    with pytest.raises(CheckpointError, match="slices overlap"):
        check_coverage("w", "weight", shape, [(((0, 4), (0, 4)), 0, 16), (((0, 4), (2, 6)), 0, 16)])


def _is_exact_cover(shape, pieces):
    """Whether the ranges hold every element once, by counting."""
    seen = torch.zeros(shape, dtype=torch.int64)
    for slices, start, stop in pieces:
        held = seen[tuple(slice(low, high) for low, high in slices)]
        flat = held.reshape(-1).clone()
        flat[start:stop] += 1
        held.copy_(flat.view(held.shape))
    return bool((seen == 1).all())


def test_slices_that_overlap_and_leave_as_much_uncovered_are_refused():
    for pieces in ([((0, 4),), ((2, 6),)], [((2, 6),), ((0, 4),)], [((0, 5),), ((2, 4),), ((7, 8),)]):
        with pytest.raises(CheckpointError, match="slices overlap"):
            check_coverage("w", "weight", (8,), [(slices, 0, slices[0][1] - slices[0][0]) for slices in pieces])


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 2, 2)])
def test_coverage_of_random_slices_agrees_with_counting(shape):
    generator = random.Random(3)
    exact = 0
    for _ in range(3000):
        cut = generator.randrange(len(shape))
        at = generator.randint(0, shape[cut])
        halves = [
            tuple((low, high) if dim == cut else (0, size) for dim, size in enumerate(shape))
            for low, high in ((0, at), (at, shape[cut]))
        ]
        pieces = [(slices, 0, torch.Size(slice_shape(slices)).numel()) for slices in halves if generator.random() < 0.9]
        pieces += [_random_piece(generator, shape) for _ in range(generator.choice((0, 0, 1, 2)))]
        pieces = [piece for piece in pieces if piece[1] < piece[2]]
        generator.shuffle(pieces)
        try:
            check_coverage("w", "weight", shape, pieces)
            accepted = True
        except CheckpointError:
            accepted = False
        exact += accepted
        assert not accepted or _is_exact_cover(shape, pieces), pieces
    assert exact > 300


def test_addresses_are_checked():
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        check_address("w", "weight", (4, 6), ((0, 5), (0, 6)), 0, 1)
    with pytest.raises(CheckpointError, match="slice outside the tensor"):
        check_address("w", "weight", (4, 6), ((0, 4),), 0, 1)
    with pytest.raises(CheckpointError, match="flat range outside the slice"):
        check_address("w", "weight", (4, 6), ((0, 4), (0, 6)), 0, 25)


@pytest.mark.parametrize(
    ("slices", "start", "stop", "match"),
    [
        (((-1, 4), (0, 6)), 0, 1, "slice outside"),
        (((3, 2), (0, 6)), 0, 0, "slice outside"),
        (((0, 4), (0, 7)), 0, 1, "slice outside"),
        (((0, 4), (0, 6), (0, 1)), 0, 1, "slice outside"),
        (((1, 3), (2, 4)), 0, 5, "flat range outside the slice; where=weight/w; got=0:5; want=within 0:4"),
        (((0, 4), (0, 6)), -1, 3, "flat range outside"),
        (((0, 4), (0, 6)), 4, 3, "flat range outside"),
    ],
)
def test_each_bound_of_an_address_is_checked(slices, start, stop, match):
    with pytest.raises(CheckpointError, match=match):
        check_address("w", "weight", (4, 6), slices, start, stop)


@pytest.mark.parametrize(
    ("slices", "start", "stop"),
    [(((0, 4), (0, 6)), 0, 24), (((1, 3), (2, 4)), 4, 4), (((4, 4), (0, 6)), 0, 0), (((0, 4), (6, 6)), 0, 0)],
)
def test_addresses_up_to_the_end_are_accepted(slices, start, stop):
    check_address("w", "weight", (4, 6), slices, start, stop)


def test_a_scalar_is_covered_by_one_segment():
    check_coverage("w", "weight", (), [((), 0, 1)])
    check_coverage("w", "weight", (0, 3), [])
    with pytest.raises(CheckpointError, match="got=0 elements; want=1 elements"):
        check_coverage("w", "weight", (), [])
    with pytest.raises(CheckpointError, match="segments overlap; .*got=0:1 after :1"):
        check_coverage("w", "weight", (), [((), 0, 1), ((), 0, 1)])


def test_rows_hold_what_is_shared_and_no_other_row():
    """A target that takes columns 3 and 4 of rows 2 and 3 needs these rows of the source: from element 20 on."""
    source = logical_boxes(((0, 6), (0, 10)), 0, 60)
    (shared,) = overlaps(source, logical_boxes(((2, 4), (3, 5)), 0, 4))
    rows = shared.rows()
    assert (rows.source.low, rows.source.high, rows.source.offset) == ((2, 0), (4, 10), 20)
    assert rows.target == shared.target and rows.size == 4
    (scalar,) = overlaps(logical_boxes((), 0, 1), logical_boxes((), 0, 1))
    assert scalar.rows() == scalar and scalar.size == 1
