from __future__ import annotations

import hashlib

import pytest
import torch

from neox.parallel.mesh import Mesh
from neox.parallel.rng import derive_seed, seed_default_generators, tensor_parallel_stream


def member(tp_rank: int = 0, dp_rank: int = 0, pp_rank: int = 0) -> Mesh:
    return Mesh(tp=2, dp=2, pp=2, rank=(pp_rank * 2 + dp_rank) * 2 + tp_rank)


def test_seeds_depend_on_every_part_of_the_path_and_never_change():
    assert derive_seed(1234, "init", "norm.weight") == 5054581300190458121
    seeds = {derive_seed(seed, *path) for seed in (1, 2) for path in (("a", 1), ("a", 11), ("a", "1", 1), ("b", 1))}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def first_draw(mesh: Mesh) -> float:
    seed_default_generators(7, mesh)
    return torch.rand(()).item()


def test_dropout_is_equal_over_the_tensor_group_only():
    assert first_draw(member(tp_rank=0)) == first_draw(member(tp_rank=1))
    assert len({first_draw(member(dp_rank=dp, pp_rank=pp)) for dp in (0, 1) for pp in (0, 1)}) == 4


def draws(tp_rank: int, inside: int = 1) -> tuple[float, float]:
    mesh = member(tp_rank=tp_rank)
    seed_default_generators(7, mesh)
    with tensor_parallel_stream(mesh, torch.device("cpu")):
        within = torch.rand(inside)[0].item()
    return within, torch.rand(()).item()


def test_stream_differs_over_the_tensor_group_and_the_default_does_not():
    (within0, after0), (within1, after1) = draws(0), draws(1, inside=1000)
    assert within0 != within1
    assert after0 == after1
    assert draws(0) == (within0, after0)


def test_one_process_draws_from_the_default_generator():
    torch.manual_seed(3)
    want = torch.rand(())
    torch.manual_seed(3)
    with tensor_parallel_stream(Mesh.single(), torch.device("cpu")):
        assert torch.rand(()) == want


def test_equal_streams_draw_and_save_nothing(monkeypatch):
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a state was saved"))
    seed_default_generators(7, member())
    want = torch.rand(())
    seed_default_generators(7, member())
    with tensor_parallel_stream(member(tp_rank=1), torch.device("cpu"), differs=False):
        assert torch.rand(()) == want


def test_dropout_differs_over_the_context_group():
    assert len({first_draw(Mesh(cp=2, dp=2, rank=rank)) for rank in range(4)}) == 4


def test_a_seed_is_the_hash_of_its_path():
    """Written out, so that no release changes the masks of a run."""
    for seed, path in ((0, ()), (7, ("a",)), (7, ("a", 3, "b"))):
        digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
        assert derive_seed(seed, *path) == int.from_bytes(digest[:8], "little") // 2


@pytest.mark.parametrize(
    ("mesh", "path"),
    [
        (member(dp_rank=1, pp_rank=1), ("dropout", 1, 1)),
        (member(tp_rank=1), ("dropout", 0, 0)),
        (member(pp_rank=1), ("dropout", 1, 0)),
        (Mesh(cp=2, dp=2, rank=3), ("dropout", 0, 1, 1)),
    ],
)
def test_the_default_generator_is_seeded_by_the_coordinates_in_the_mesh(mesh, path):
    seed_default_generators(7, mesh)
    assert torch.initial_seed() == derive_seed(7, *path)


def test_a_stream_advances_the_default_generator_by_one_draw_and_ends_on_errors():
    torch.manual_seed(5)
    drawn = int(torch.randint(2**62, (1,)))
    want = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(KeyError), tensor_parallel_stream(Mesh(tp=3, rank=2), torch.device("cpu")):
        assert torch.initial_seed() == derive_seed(drawn, "tensor", 2)
        torch.rand(10)
        raise KeyError
    assert torch.equal(torch.rand(3), want)
