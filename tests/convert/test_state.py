"""State dicts of pickles: names, dense numbers, and the same of them on every rank."""

from __future__ import annotations

import warnings

import pytest
import torch

from neox.convert.state import check_ranks, check_tensor, named_tensors
from neox.errors import CheckpointError

GOOD = torch.arange(6.0).view(2, 3)


def test_values_that_are_no_tensors_are_left_out():
    assert named_tensors({"a": GOOD, "b": None, "c": 3}, "x.pt").keys() == {"a"}
    for content in (None, [GOOD], {1: GOOD}, {("a",): GOOD}, {"a" * 9: GOOD, None: GOOD}):
        with pytest.raises(CheckpointError, match=r"where=x.pt"):
            named_tensors(content, "x.pt")


@pytest.mark.parametrize(
    "good",
    [GOOD, GOOD.t(), GOOD.half(), GOOD.bfloat16(), GOOD.double(), GOOD[:0], torch.nn.Parameter(GOOD.clone()), GOOD[1:]],
)
def test_dense_tensors(good):
    check_tensor(good, "a")


@pytest.mark.filterwarnings("ignore")  # torch is about to drop quantized tensors
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: GOOD.to_sparse(), "sparse_coo"),
        (lambda: GOOD.to("meta"), "a meta tensor"),
        (lambda: GOOD.int(), "int32"),
        (lambda: GOOD.bool(), "bool"),
        (lambda: GOOD.to(torch.float8_e5m2), "float8_e5m2"),
        (lambda: torch.quantize_per_tensor(GOOD, 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.zeros(1).expand(1 << 30, 1 << 10), "over 4 bytes"),
    ],
)
def test_what_is_not_dense_numbers(make, got):
    with pytest.raises(CheckpointError, match=f"where=a; got=.*{got}"):
        check_tensor(make(), "a")


def test_ranks_hold_the_same_names_and_shapes():
    check_ranks([{"a": GOOD}, {"a": GOOD + 1}], "layer 2")
    with pytest.raises(CheckpointError, match=r"where=layer 2: b; got=missing on rank 0"):
        check_ranks([{"a": GOOD}, {"a": GOOD, "b": GOOD}], "layer 2")
    with pytest.raises(CheckpointError, match=r"where=layer 2: b; got=missing on rank 1"):
        check_ranks([{"a": GOOD, "b": GOOD}, {"a": GOOD}], "layer 2")
    with pytest.raises(CheckpointError, match=r"\(2, 3\) on rank 0, \(3, 2\) on rank 1"):
        check_ranks([{"a": GOOD}, {"a": GOOD.t()}], "layer 2")
    with pytest.raises(CheckpointError, match=r"where=layer 2: b; got=missing on rank 2"):
        check_ranks([{"a": GOOD, "b": GOOD}, {"a": GOOD, "b": GOOD}, {"a": GOOD}], "layer 2")
    with pytest.raises(CheckpointError, match=r"where=layer 2: b; got=\(2, 3\) on rank 0, \(3, 2\) on rank 2"):
        check_ranks([{"a": GOOD, "b": GOOD}] * 2 + [{"a": GOOD, "b": GOOD.t()}], "layer 2")
    with pytest.raises(CheckpointError, match=r"where=layer 2, rank 1: b; got=int32"):
        check_ranks([{"a": GOOD, "b": GOOD}, {"a": GOOD, "b": GOOD.int()}], "layer 2")
    check_ranks([], "layer 2")


def test_a_nested_tensor_is_not_dense():
    with pytest.raises(CheckpointError, match="got=nested"), warnings.catch_warnings(action="ignore"):
        check_tensor(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a")


def test_a_part_of_a_larger_memory_is_read():
    check_tensor(torch.zeros(10)[3:5], "a")
    check_tensor(torch.zeros(2, 3), "exactly as large as its memory")
    with pytest.raises(CheckpointError, match=r"got=shape \(2, 2\) over 12 bytes"):
        check_tensor(torch.zeros(3).as_strided((2, 2), (1, 1)), "a")
