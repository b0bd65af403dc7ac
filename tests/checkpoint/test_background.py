"""Saving in a thread: the bytes of the call, one writer, failures handed on, nothing lost at the end."""

from __future__ import annotations

import errno
import gc
import logging
import threading
import time
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neox.checkpoint.background import HostBlock, Saver, Snapshot, padded_bytes
from neox.checkpoint.find import find
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.verify import digest, verify
from neox.errors import CheckpointError, DiskError
from tests.checkpoint.builders import LINEAGE, full_fragments, make_state, save_one
from tests.checkpoint.faults import CountingStorage, FailingStorage
from tests.distributed import run_ranks

REST = {"config_lock": "", "model_config": {}, "layout": {}}


class HeldStorage(CountingStorage):
    """A disk that takes nothing until `go` is set, and records which thread writes what."""

    def __init__(self):
        self.go = threading.Event()
        self.writers: list[tuple[str, str]] = []

    def before(self, name):
        if name in ("create", "write") and threading.current_thread() is not threading.main_thread():
            assert self.go.wait(20)
            self.writers.append((threading.current_thread().name, name))


def saver(root, storage, **changes):
    return Saver(root, **{"keep": 0, "lineage": LINEAGE, "storage": storage, **changes})


def begin(saver, step, state):
    return saver.save(
        step, full_fragments(state), state={"step": step}, rng={"cpu": torch.arange(5, dtype=torch.uint8)}, **REST
    )


def test_the_saved_bytes_are_those_of_the_call_while_training_continues(tmp_path):
    storage = HeldStorage()
    saves = saver(tmp_path / "a", storage)
    state = make_state()
    begin(saves, 7, state)
    for value in state.values():
        value.zero_()
    assert saves.outcomes() == []
    storage.go.set()
    assert saves.join(20)
    (outcome,) = saves.outcomes()
    assert (outcome.step, outcome.folder, outcome.error) == (7, tmp_path / "a" / "step_00000007", None)
    assert digest(outcome.folder) == digest(save_one(tmp_path / "b", 7))
    assert {name for name, _ in storage.writers} == {"neox-checkpoint"}


def test_a_synchronous_save_is_complete_on_return(tmp_path):
    saves = saver(tmp_path, CountingStorage(), background=False)
    begin(saves, 7, make_state())
    (outcome,) = saves.outcomes()
    verify(outcome.folder)


@pytest.mark.parametrize("background", [True, False])
def test_a_save_holds_all_that_it_was_given_and_retains_as_many_as_it_should(tmp_path, background):
    saves = saver(tmp_path, CountingStorage(), keep=2, background=background)
    for step in (1, 2, 3):
        state, rng = {"step": step, "consumed": 8}, {"cpu": torch.full((5,), step, dtype=torch.uint8)}
        rest = {"config_lock": "a: 1\n", "model_config": {"num_layers": 1}, "layout": {"tp": 3}}
        saves.save(step, full_fragments(make_state()), state=state, rng=rng, **rest)
    assert saves.join()
    assert [outcome.step for outcome in saves.outcomes()] == [1, 2, 3] and saves.outcomes() == []
    assert sorted(folder.name for folder in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    with Checkpoint(tmp_path / "step_00000003") as saved:
        assert (saved.step, saved.state, saved.config_lock) == (3, {"step": 3, "consumed": 8}, "a: 1\n")
        assert (saved.model_config, saved.layout, saved.world_size) == ({"num_layers": 1}, {"tp": 3}, 1)
        assert saved.manifest.lineage == LINEAGE
        assert torch.equal(saved.rng(0)["cpu"], torch.full((5,), 3, dtype=torch.uint8))


def test_an_error_of_a_synchronous_save_is_an_outcome_too(tmp_path):
    saves = saver(tmp_path, FailingStorage("write", 0, errno.ENOSPC), background=False)
    begin(saves, 4, make_state())
    (outcome,) = saves.outcomes()
    assert (outcome.step, outcome.folder, type(outcome.error)) == (4, None, DiskError)


def test_a_save_waits_for_the_previous_one(tmp_path):
    storage = HeldStorage()
    saves = saver(tmp_path, storage)
    begin(saves, 1, make_state(1))
    threading.Timer(0.5, storage.go.set).start()
    waited = begin(saves, 2, make_state(2))
    assert waited > 0.4
    saves.join()
    assert [outcome.step for outcome in saves.outcomes()] == [1, 2]
    assert digest(tmp_path / "step_00000001") == digest(save_one(tmp_path / "one", 1, make_state(1)))
    assert digest(tmp_path / "step_00000002") == digest(save_one(tmp_path / "two", 2, make_state(2)))


@pytest.mark.parametrize("call", ["create", "write", "sync", "rename"])
def test_an_error_of_the_thread_is_reported_and_the_next_save_succeeds(tmp_path, call):
    storage = FailingStorage(call, 0, errno.ENOSPC)
    saves = saver(tmp_path, storage)
    begin(saves, 1, make_state(1))
    assert saves.join(20)
    (outcome,) = saves.outcomes()
    assert outcome.folder is None
    assert isinstance(outcome.error, DiskError)
    assert "ENOSPC" in outcome.error.line()
    assert find(tmp_path, "auto") is None
    begin(saves, 2, make_state(2))
    saves.join()
    assert [one.error for one in saves.outcomes()] == [None]
    verify(find(tmp_path, "must"))


def test_any_exception_of_the_thread_is_an_outcome(tmp_path):
    class Dying(CountingStorage):
        def before(self, name):
            if name == "write":
                raise SystemExit(3)

    saves = saver(tmp_path, Dying())
    begin(saves, 1, make_state())
    saves.join()
    assert isinstance(saves.outcomes()[0].error, SystemExit)


def test_inconsistent_fragments_are_refused_at_the_call(tmp_path):
    saves = saver(tmp_path, CountingStorage())
    twice = full_fragments(make_state())
    with pytest.raises(CheckpointError, match="slices overlap"):
        half = Fragment("embedding.word.weight", "weight", (19, 6), ((0, 3), (0, 6)), 0, 18, torch.ones(18))
        saves.save(1, [*twice, half], state={}, rng={}, **REST)
    assert saves.outcomes() == []


def test_join_waits_no_longer_than_its_timeout(tmp_path):
    storage = HeldStorage()
    saves = saver(tmp_path, storage)
    begin(saves, 1, make_state())
    start = time.monotonic()
    assert not saves.join(0.2)
    assert time.monotonic() - start < 5
    storage.go.set()
    assert saves.join(20)


def test_a_snapshot_reuses_its_memory_and_follows_changed_fragments():
    snapshot = Snapshot()
    state = make_state()
    first = snapshot.take(full_fragments(state))
    places = {(one.kind, one.name): one.data.data_ptr() for one in first}
    for value in state.values():
        value.add_(1)
    second = snapshot.take(full_fragments(state))
    assert {(one.kind, one.name): one.data.data_ptr() for one in second} == places
    assert all(torch.equal(one.data, state[one.name, one.kind].reshape(-1)) for one in second)
    fewer = snapshot.take(full_fragments({("new", "weight"): torch.ones(3)}))
    assert torch.equal(fewer[0].data, torch.ones(3))


@pytest.mark.parametrize(
    ("count", "dtype", "size"),
    [
        (0, torch.float32, 0),
        (1, torch.uint8, 64),
        (64, torch.uint8, 64),
        (65, torch.uint8, 128),
        (16, torch.float32, 64),
        (17, torch.float32, 128),
        (33, torch.bfloat16, 128),
        (8, torch.int64, 64),
    ],
)
def test_a_copy_takes_complete_cache_lines(count, dtype, size):
    assert padded_bytes(count, dtype) == size


def test_a_block_is_replaced_only_where_it_does_not_serve():
    blocks, freed = [], []

    def allocate(size, locked):
        gc.collect()
        freed.append(all(block() is None for block in blocks))
        block = HostBlock(size, locked=False)
        block.locked = locked
        blocks.append(weakref.ref(block))
        return block

    snapshot = Snapshot(allocate)
    asked = [(100, False), (100, False), (40, False), (101, False), (50, True), (50, False), (50, True), (51, True)]
    made = []
    for size, locked in asked:
        before = len(blocks)
        block = snapshot.reserve(size, locked)
        assert block.memory.numel() >= size and (block.locked or not locked)
        made.append(len(blocks) - before)
        del block
    assert made == [1, 0, 0, 1, 1, 0, 0, 1]
    assert all(freed), "the memory would not hold two"


class Runtime:
    """Stands for CUDA's runtime: notes which memory is locked."""

    def __init__(self, code: int):
        self.code = code
        self.locked: dict[int, int] = {}
        self.unlocked: list[int] = []

    def cudaHostRegister(self, pointer, size, flags):
        if not self.code:
            self.locked[pointer] = size
        return self.code

    def cudaHostUnregister(self, pointer):
        self.unlocked.append(pointer)


def test_pages_are_locked_until_the_block_is_freed(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    HostBlock(100, locked=False), HostBlock(0, locked=True)
    assert runtime.locked == {}
    block = HostBlock(100, locked=True)
    pointer = block.memory.data_ptr()
    assert block.locked and runtime.locked == {pointer: 100}
    assert runtime.unlocked == []
    del block
    gc.collect()
    assert runtime.unlocked == [pointer]


def test_memory_whose_pages_cannot_be_locked_is_used_as_it_is(monkeypatch, caplog):
    runtime = Runtime(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with caplog.at_level(logging.WARNING):
        block = HostBlock(300_000_000, locked=True)  # of address space; no page is touched
    assert block.memory.numel() == 300_000_000 and block.locked, "else every save would try again"
    assert "0.3 GB" in caplog.text and "CUDA error 2" in caplog.text
    del block
    gc.collect()
    assert runtime.unlocked == []


def test_without_cuda_no_page_can_be_locked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: None)
    with pytest.raises(RuntimeError, match="without CUDA"):
        HostBlock(1, locked=True)


class Allocations:
    """Makes blocks of ordinary memory, and notes what was asked for."""

    def __init__(self):
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, size: int, locked: bool) -> HostBlock:
        self.asked.append((size, locked))
        block = HostBlock(size, locked=False)
        block.locked = locked
        return block


def test_a_snapshot_allocates_one_block_and_reallocates_only_a_larger_one():
    """Tensor by tensor, page-locked memory was up to twice as large as what it held."""
    allocations = Allocations()
    snapshot = Snapshot(allocations)
    mixed = [
        torch.arange(count, dtype=dtype)
        for count in (1, 17, 4097, 0)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
    ]
    fragments = [
        Fragment(str(i), "weight", (len(data),), ((0, len(data)),), 0, len(data), data) for i, data in enumerate(mixed)
    ]
    for chosen in (fragments, fragments[::-1], fragments[3:], fragments):
        copies = snapshot.take(chosen)
        assert all(
            torch.equal(copy.data, one.data) and copy.data.dtype == one.data.dtype
            for copy, one in zip(copies, chosen, strict=True)
        )
        assert all(
            copy.data.data_ptr() != one.data.data_ptr()
            for copy, one in zip(copies, chosen, strict=True)
            if one.data.numel()
        )
    ((size, locked),) = allocations.asked
    assert sum(data.nbytes for data in mixed) <= size < sum(data.nbytes for data in mixed) + 64 * len(mixed)
    assert not locked
    snapshot.take([*fragments, fragments[0]])
    assert len(allocations.asked) == 2


def test_the_memory_for_gpu_copies_is_allocated_once_before_the_first_save(tmp_path):
    """The tensors are fake ones: no GPU is needed to ask where they are."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = [Fragment("a", "weight", (100,), ((0, 100),), 0, 100, torch.empty(100, device="cuda"))]
    for background, want in ((True, [(448, True)]), (False, [])):
        saves = saver(tmp_path, CountingStorage(), background=background)
        allocations = Allocations()
        saves._snapshot = Snapshot(allocations)
        saves.reserve(full_fragments(make_state()))
        assert allocations.asked == []  # nothing on a GPU
        saves.reserve(held)
        saves.reserve(held)
        assert allocations.asked == want


@pytest.mark.distributed
def test_two_processes_save_in_the_background_while_they_train(tmp_path):
    results = run_ranks("tests.checkpoint.workers:save_beside_collectives", 2, tmp_path, [tmp_path / "checkpoints"])
    lines = [[line for line in result.output.splitlines() if line.startswith(("done", "failed"))] for result in results]
    assert lines[0] == lines[1]
    assert lines[0][0] == "done 100"
    assert lines[0][1].startswith("failed error[5] cannot write; where=rank 1: ")
    assert lines[0][2] == "done 300"
    assert digest(find(tmp_path / "checkpoints", "must")) == digest(save_one(tmp_path / "one"))
