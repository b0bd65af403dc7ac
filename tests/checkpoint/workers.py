"""What the processes of the distributed checkpoint tests run; started by tests.distributed.start_ranks."""

from __future__ import annotations

import datetime
import errno
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from neox.checkpoint.background import Saver
from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.find import find
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.checkpoint.storage import LOCAL
from neox.errors import NeoxError
from tests.checkpoint.builders import cut_fragments, make_state
from tests.checkpoint.faults import FailingStorage


def _start() -> tuple[int, int]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=30))
    return rank, world_size


def _save(root: str, step: int, layout: str, rank: int, world_size: int, storage=LOCAL, **changes) -> Path:
    tp, dp, zero = (int(part) for part in layout.split("x"))
    held = cut_fragments(make_state(), tp=tp, tp_rank=rank % tp, dp=dp, dp_rank=rank // tp, zero=bool(zero))
    content = Content(
        step, changes.get("state", {"step": step, "rank": rank}), start_lineage(root), layout={"tp": tp, "dp": dp}
    )
    rng = {"cpu": torch.full((9,), rank, dtype=torch.uint8)}
    return save(
        root, content, changes.get("fragments", held), rng=rng, ranks=RankGroup(rank, world_size), storage=storage
    )


def save_layouts(root: str, layouts: str) -> None:
    """Save root/<layout> for each layout "tpxdpxzero" of a list, then read each in every layout; compare bitwise."""
    rank, world_size = _start()
    names = layouts.split(",")
    for name in names:
        _save(f"{root}/{name}", 100, name, rank, world_size)
    for saved in names:
        for name in names:
            _compare(f"{root}/{saved}", name, rank, world_size)
    dist.destroy_process_group()


def load_layouts(root: str, layouts: str) -> None:
    """Reads the checkpoint of one process in each layout and compares bit for bit."""
    rank, world_size = _start()
    for name in layouts.split(","):
        _compare(root, name, rank, world_size)
    dist.destroy_process_group()


def _compare(root: str, layout: str, rank: int, world_size: int) -> None:
    tp, dp, zero = (int(part) for part in layout.split("x"))
    with Checkpoint(find(root, "must", rank=rank, world_size=world_size)) as checkpoint:
        for want in cut_fragments(make_state(), tp=tp, tp_rank=rank % tp, dp=dp, dp_rank=rank // tp, zero=bool(zero)):
            if not torch.equal(checkpoint.read(want.name, want.kind, want.slices, want.start, want.stop), want.data):
                sys.exit(f"{want.kind}/{want.name} differs")
    print("equal", root, layout)


def fail(root: str, cases: str) -> None:
    """For each case a save of step 200 that fails on one rank; prints the error. Afterwards saves step 300."""
    rank, world_size = _start()
    for case in cases.split(","):
        try:
            _save_with_fault(root, case, rank, world_size)
        except NeoxError as error:
            print("ERROR", case, error.line())
    _save(root, 300, "1x2x1", rank, world_size)
    dist.destroy_process_group()


def _save_with_fault(root: str, case: str, rank: int, world_size: int) -> None:
    changes: dict[str, object] = {}
    storage = LOCAL
    if case == "hole" and rank == 1:
        changes["fragments"] = []
    elif case == "bug" and rank == 1:
        changes["fragments"] = _broken()
    elif case == "state" and rank == 0:
        changes["state"] = {"x": float("nan")}
    elif case == "manifest" and rank == 0:
        storage = FailingStorage("rename", 1, errno.EIO)
    elif case in ("create", "write", "sync", "sync_dir") and rank == 1:
        storage = FailingStorage(case, 0, errno.ENOSPC)
    _save(root, 200, "1x2x1", rank, world_size, storage, **changes)


def _broken():
    yield from ()
    raise KeyError("planted")


def lose_a_rank(root: str) -> None:
    """Rank 1 dies while it writes; rank 0 prints what it got."""
    rank, world_size = _start()

    class Dying(FailingStorage):
        def before(self, name: str) -> None:
            if name == "sync":
                os._exit(9)

    try:
        _save(root, 200, "1x2x1", rank, world_size, Dying("any", 0, 0) if rank == 1 else LOCAL)
    except NeoxError as error:
        print("ERROR", error.line(), flush=True)
        os._exit(error.exit_code)


def find_newest(root: str) -> None:
    """Prints the result of `find` on every rank."""
    rank, world_size = _start()
    try:
        print("FOUND", find(root, "auto", rank=rank, world_size=world_size))
    except NeoxError as error:
        print("ERROR", error.line())
    dist.destroy_process_group()


def save_beside_collectives(root: str) -> None:
    """Three saves under a stream of collectives of the default group; the second fails on rank 1."""
    rank, world_size = _start()
    storage = FailingStorage("write", 10_000, errno.ENOSPC)
    saver = Saver(Path(root), keep=0, lineage=start_lineage(root), rank=rank, world_size=world_size, storage=storage)
    for step in (100, 200, 300):
        if step == 200 and rank == 1:
            storage.left = 0
        state = make_state()
        held = cut_fragments(state, tp=1, tp_rank=0, dp=world_size, dp_rank=rank, zero=True)
        saver.save(
            step,
            held,
            state={"step": step},
            rng={"cpu": torch.arange(9, dtype=torch.uint8)},
            config_lock="",
            model_config={},
            layout={},
        )
        for fragment in held:
            fragment.data.zero_()
        busy = torch.ones(1000)
        for _ in range(50):
            dist.all_reduce(busy)
        saver.join()
        for outcome in saver.outcomes():
            print(f"done {outcome.step}" if outcome.error is None else f"failed {outcome.error.line()}", flush=True)
    dist.destroy_process_group()
