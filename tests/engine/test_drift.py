"""Replicas that have drifted apart are found, and named, over real processes."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from neox.engine.drift import (
    SMALL,
    check_replicas,
    checksum,
    checksums,
    differing,
    find_non_finite,
    gather_findings,
    largest,
    replicated,
)
from neox.errors import ReplicaDrift
from neox.parallel.mesh import Mesh, create_mesh
from neox.parallel.shard_spec import ShardSpec
from tests.distributed import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_flipped_bit_changes_the_checksum(dtype):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = values.view(torch.uint8)
    want = checksum(values)
    for bit in range(0, raw.numel() * 8, 97):
        raw[bit // 8] ^= 1 << bit % 8
        assert checksum(values) != want
        raw[bit // 8] ^= 1 << bit % 8
    assert checksum(values) == want
    assert checksum(torch.full((3,), float("nan"), dtype=dtype)) == checksum(
        torch.full((3,), float("nan"), dtype=dtype)
    )


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += not function.is_view and function.overloadpacket.__name__ != "detach"
        return function(*args, **(kwargs or {}))


def test_small_tensors_of_one_size_are_summed_in_one_launch():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape, dtype=torch.float32: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))  # noqa: E731
    layer = lambda: [draw(64), draw(64), draw(192, 64), draw(64, dtype=torch.bfloat16), draw(192), draw(SMALL + 1)]  # noqa: E731
    counts = []
    for layers in (2, 20):
        tensors = [tensor for _ in range(layers) for tensor in layer()]
        with Launches() as launches:
            mine = checksums(tensors)
        assert mine.tolist() == [int(checksum(tensor)) for tensor in tensors]
        counts.append(launches.seen)
    # two for each of four sizes, one per large tensor, and one for all
    assert counts == [2 * 4 + 2 + 1, 2 * 4 + 20 + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_of_all_parameters_take_a_few_launches(dtype):
    counts = []
    for number in (2, 20):
        named = [
            (str(i), torch.nn.Parameter(torch.full((i + 1,), -float(i), dtype=dtype)), ShardSpec.replicated(i + 1))
            for i in range(number)
        ]
        with Launches() as launches:
            found = largest(named)
        assert found.dtype == torch.float32
        assert found.tolist() == list(range(number))
        counts.append(launches.seen)
    assert counts[0] == counts[1] <= 3  # the norms, their stack, and its dtype


def test_alone_there_is_nothing_to_compare():
    named = [("a", torch.nn.Parameter(torch.ones(3)), ShardSpec.replicated(3))]
    assert replicated(named, Mesh.single()) == []
    check_replicas(named, Mesh.single(), 1)


def parameter(*values: float, dtype=torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def test_every_parameter_that_is_not_finite_is_named_also_where_stage_3_has_sharded_it():
    held = {
        "good": parameter(1.0, -2.0),
        "nan": parameter(1.0, math.nan),
        "plus": parameter(math.inf, 0.0),
        "minus": parameter(0.0, -math.inf, dtype=torch.bfloat16),
        "large": parameter(-3e38),
        "sharded": parameter(),
        "sharded nan": parameter(),
    }
    vars(held["sharded"])["ds_tensor"] = torch.tensor([-5.0])
    vars(held["sharded nan"])["ds_tensor"] = torch.tensor([1.0, math.nan])
    named = [(name, p, ShardSpec.replicated(2)) for name, p in held.items()]
    assert find_non_finite(named) == ["nan", "plus", "minus", "sharded nan"]
    assert largest(named)[[0, 5]].tolist() == [2.0, 5.0]
    assert find_non_finite([]) == []
    assert gather_findings(["b", "a", "b"], Mesh.single()) == ["a", "b", "b"]


def test_what_has_replicas_is_compared_in_its_group():
    """All but shards of stage 3 over the replicas; over the tensor group what is not sharded there."""
    held = {name: parameter(1.0) for name in ("norm", "matrix", "kept", "given away")} | {"empty": parameter()}
    vars(held["kept"])["ds_persist"] = True
    vars(held["given away"])["ds_persist"] = False
    specs = {"matrix": ShardSpec.sharded((2,), 0, 0, 1)}
    named = [(name, p, specs.get(name, ShardSpec.replicated(1))) for name, p in held.items()]
    mesh = dataclasses.replace(Mesh.single(), tp=2, dp=2, replica_group="replicas", tp_group="tensor")
    got = {group: [name for name, _ in rows] for group, rows in replicated(named, mesh)}
    assert got == {"replicas": ["norm", "matrix", "kept"], "tensor": ["norm", "kept"]}
    assert replicated(named[1:2], dataclasses.replace(mesh, replica_group=None)) == []
    ((group, rows),) = replicated(named[:1], dataclasses.replace(mesh, tp_group=None))
    assert group == "replicas" and rows == [("norm", held["norm"])]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((7, 7, 7, 7), None),
        ((7, 7, 5, 7), "w on rank 6"),
        ((5, 7, 7, 7), "w on rank 2"),
        ((5, 7, 6, 7), "w on rank 2, 6"),
        ((5, 5, 7, 7), "w on rank 2, 4, 6, 8"),
        ((1, 2, 3, 4), "w on rank 2, 4, 6, 8"),
    ],
)
def test_the_ranks_outside_the_majority_are_named(values, line, monkeypatch):
    def gather(out, mine, group):
        assert group == "group"
        for one, value in zip(out, values, strict=True):
            one.copy_(torch.tensor([3, value]))

    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [2, 4, 6, 8])
    monkeypatch.setattr(dist, "all_gather", gather)
    assert differing(["same", "w"], torch.tensor([3, values[0]]), "group") == ([] if line is None else [line])


def test_a_checksum_is_the_sum_of_the_bits_as_integers():
    assert int(checksum(torch.tensor([1.0, -0.0]))) == 0x3F800000 - (1 << 31)
    assert int(checksum(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))) == 2 * 0x3F80
    many = torch.full((1 << 16,), 1.0)
    assert int(checksum(many)) == int(checksums([many, many])[1]) == 0x3F800000 << 16, "beyond 32 bits"
    assert checksums([torch.tensor([], dtype=torch.float32), many]).tolist() == [0, 0x3F800000 << 16]


def drift_on(out: str) -> None:
    """Entry of a process of tp 2 x dp 2: injects one difference after the other and records the result of the check."""
    dist.init_process_group("gloo")
    mesh = create_mesh(2)
    answers = {}
    for name, (tensor, ranks) in CASES.items():
        generator = torch.Generator().manual_seed(mesh.tp_rank)
        named = [
            ("norm", torch.nn.Parameter(torch.ones(5)), ShardSpec.replicated(5)),
            (
                "matrix",
                torch.nn.Parameter(torch.randn(4, 3, generator=generator)),
                ShardSpec.sharded((8, 3), 0, 4 * mesh.tp_rank, 4 * mesh.tp_rank + 4),
            ),
        ]
        if mesh.rank in ranks:
            {key: p for key, p, _ in named}[tensor].data.view(torch.int32).view(-1)[1] ^= 1
        try:
            check_replicas(named, mesh, 7)
            answers[name] = "same"
        except ReplicaDrift as error:
            answers[name] = error.line()
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


# name -> (tensor, ranks on which its lowest bit is flipped); tensor groups are (0, 1) and (2, 3), replicas (0, 2) and
# (1, 3)
CASES = {
    "none": ("norm", ()),
    "a cut matrix": ("matrix", (3,)),
    "a norm of one tensor group's member": ("norm", (1, 3)),
    "all replicas": ("norm", (0, 1, 2, 3)),
}


@pytest.mark.distributed
def test_what_differs_is_named_on_every_process(tmp_path):
    run_ranks("tests.engine.test_drift:drift_on", 4, tmp_path, [tmp_path / "out"])
    answers = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(4)]
    assert all(answer == answers[0] for answer in answers)
    got = answers[0]
    assert got["none"] == got["all replicas"] == "same"
    assert got["a cut matrix"].startswith(
        "error[11] replicas have drifted apart; where=step 7; got=matrix on rank 1, 3;"
    )
    assert "got=norm on rank 0, 1, norm on rank 2, 3;" in got["a norm of one tensor group's member"]
