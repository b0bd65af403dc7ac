"""Assignment of segments to ranks: every element once, replicas distributed evenly."""

import dataclasses
import random

import pytest
import torch

from neox.checkpoint.assignment import (
    Assignment,
    Offer,
    assign,
    check_assignment,
    decode_offers,
    encode_offers,
    tensor_table,
)
from neox.checkpoint.reshard import full_slices
from neox.errors import CheckpointError
from tests.checkpoint.builders import cut_fragments, make_state


def _offer(start, stop, name="w", size=10):
    return Offer("weight", name, "F32", (size,), full_slices((size,)), start, stop)


def _stored(offers, assigned):
    out = {}
    for rank, (local, taken) in enumerate(zip(offers, assigned, strict=True)):
        for one in taken:
            for index in range(one.start, one.stop):
                out.setdefault((local[one.offer].name, index), []).append(rank)
    return out


def test_replicas_are_stored_once_and_distributed():
    offers = [[_offer(0, 10, name) for name in "abcdefgh"]] * 4
    assigned = assign(offers)
    assert all(len(ranks) == 1 for ranks in _stored(offers, assigned).values())
    assert [sum(one.stop - one.start for one in local) for local in assigned] == [20, 20, 20, 20]
    check_assignment(tensor_table(offers), offers, assigned)


def test_the_load_of_a_rank_is_in_bytes():
    dtypes = {"a": "F32", "b": "BF16", "c": "BF16"}
    local = [dataclasses.replace(_offer(0, 10, name), dtype=dtype) for name, dtype in dtypes.items()]
    assigned = assign([local] * 2)
    assert [[local[one.offer].name for one in taken] for taken in assigned] == [["a"], ["b", "c"]]


def test_what_is_stored_is_trimmed_and_counted_as_trimmed():
    """Of w, rank 1 stores 4 elements of its 9: less than rank 0, so that the tensor that both hold goes to it."""
    offers = [[_offer(0, 6), _offer(0, 10, "b")], [_offer(1, 10), _offer(0, 10, "b")]]
    assert assign(offers) == [[Assignment(0, 0, 6)], [Assignment(0, 6, 10), Assignment(1, 0, 10)]]


def test_nothing_is_stored_for_a_range_without_a_new_element():
    offers = [[_offer(0, 6), _offer(3, 3, "b")], [_offer(2, 6), _offer(1, 5), _offer(6, 10)]]
    assert assign(offers) == [[Assignment(0, 0, 6)], [Assignment(2, 6, 10)]]


def test_the_first_of_equally_loaded_ranks_stores():
    offers = [[], [_offer(0, 10)], [_offer(0, 10)]]
    assert assign(offers) == [[], [Assignment(0, 0, 10)], []]


def test_kinds_and_slices_of_a_tensor_are_assigned_separately():
    left, right = (dataclasses.replace(_offer(0, 5), slices=slices) for slices in (((0, 5),), ((5, 10),)))
    state = dataclasses.replace(left, kind="exp_avg")
    assert assign([[left, right, state]]) == [[Assignment(0, 0, 5), Assignment(1, 0, 5), Assignment(2, 0, 5)]]


def test_overlapping_ranges_are_trimmed():
    generator = random.Random(3)
    for _ in range(100):
        offers = [[_offer(*sorted(generator.sample(range(11), 2))) for _ in range(3)] for _ in range(3)]
        covered = {index for local in offers for offer in local for index in range(offer.start, offer.stop)}
        stored = _stored(offers, assign(offers))
        assert {index for _, index in stored} == covered
        assert all(len(ranks) == 1 for ranks in stored.values())


def test_holes_are_refused_and_every_tensor_is_named():
    offers = [[_offer(0, 4), _offer(0, 9, "b")], [_offer(5, 10)]]
    with pytest.raises(CheckpointError) as caught:
        check_assignment(tensor_table(offers), offers, assign(offers))
    assert "weight/w: tensor is not covered, have 9 elements, want 10" in caught.value.line()
    assert "weight/b" in caught.value.line()


def test_ranks_that_disagree_are_refused():
    with pytest.raises(CheckpointError, match=r"ranks disagree.*rank 1: weight/w.*got=.*\(11,\).*want=.*\(10,\)"):
        tensor_table([[_offer(0, 10)], [_offer(0, 11, size=11)]])
    with pytest.raises(CheckpointError, match=r"ranks disagree.*rank 2: weight/w"):
        tensor_table([[], [_offer(0, 10)], [_offer(0, 10, "b"), dataclasses.replace(_offer(0, 10), dtype="F64")]])


def test_offers_round_trip_through_json():
    fragments = cut_fragments(make_state(), tp=2, tp_rank=1, dp=2, dp_rank=1, zero=True)
    offers = decode_offers(encode_offers(fragments))
    assert [(one.kind, one.name, one.shape, one.slices, one.start, one.stop) for one in offers] == [
        (one.kind, one.name, one.shape, one.slices, one.start, one.stop) for one in fragments
    ]
    assert {one.dtype for one in offers if one.kind == "exp_avg_sq"} == {"BF16"}
    assert torch.bfloat16 in {one.data.dtype for one in fragments}
