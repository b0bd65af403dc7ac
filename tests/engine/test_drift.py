"""Replicas that have drifted apart are found, and named, over real processes."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from neox.engine.drift import SMALL, check_replicas, checksum, checksums, largest, replicated
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
