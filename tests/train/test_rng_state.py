"""The states of the random generators, and in which layouts they are those of the same rank."""

from __future__ import annotations

import pytest
import torch

from neox.train.rng_state import get_generators, restore_generators, same_ranks

LAYOUT = {"tp": 2, "pp": 3, "dp": 4, "cp": 5, "zero": 1}


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (LAYOUT, True),
        ({**LAYOUT, "zero": 3}, True),  # shards optimizer state; the coordinates stay
        *(({**LAYOUT, axis: 7}, False) for axis in ("tp", "pp", "dp", "cp")),
        *(({key: size for key, size in LAYOUT.items() if key != axis}, False) for axis in ("tp", "pp", "dp", "cp")),
    ],
)
def test_a_rank_is_the_same_where_all_sizes_are(other, same):
    assert same_ranks(LAYOUT, other) == same_ranks(other, LAYOUT) == same


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "cp"])
def test_an_axis_that_a_layout_does_not_name_has_one_process(axis):
    assert same_ranks({}, {axis: 1}) and same_ranks({axis: 1}, {})
    assert not same_ranks({}, {axis: 2}) and not same_ranks({axis: 2}, {})


def test_the_stream_continues_where_the_state_was_taken():
    before = torch.get_rng_state()
    try:
        states = get_generators(torch.device("cpu"))
        assert list(states) == ["torch"]
        drawn = torch.rand(3)
        torch.manual_seed(999)
        restore_generators(states, torch.device("cpu"))
        assert torch.equal(torch.rand(3), drawn)
    finally:
        torch.set_rng_state(before)


def test_a_gpu_has_a_stream_of_its_own(monkeypatch):
    """A checkpoint of a run on CPUs has no state of one."""
    device, calls = torch.device("cuda", 3), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: (calls.append(device), "state")[1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *call: calls.append(call))
    states = get_generators(device)
    assert set(states) == {"torch", "cuda"} and states["cuda"] == "state"
    restore_generators(states, device)
    restore_generators({"torch": states["torch"]}, device)
    restore_generators(states, torch.device("cpu"))
    assert calls == [device, ("state", device)]
