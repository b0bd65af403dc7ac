"""Saving from several real processes: one checkpoint, one outcome on every rank."""

import json
import os
import re

import pytest
import torch

from neox.checkpoint.find import find
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.save import check_fragment, group_into_shards
from neox.checkpoint.verify import digest, verify
from neox.errors import CheckpointError
from tests.checkpoint.builders import full_fragments, make_state, save_one
from tests.distributed import run_ranks, start_ranks

pytestmark = pytest.mark.distributed
WORKERS = "tests.checkpoint.workers:"


LAYOUTS = ["1x2x0", "1x2x1", "2x1x0"]  # tp x dp x zero


def test_two_processes_save_and_load_any_layout(tmp_path):
    results = run_ranks(WORKERS + "save_layouts", 2, tmp_path, [tmp_path, ",".join(LAYOUTS)])
    assert all(result.output.count("equal") == 9 for result in results)
    reference = digest(save_one(tmp_path / "one"))
    for layout in LAYOUTS:
        path = find(tmp_path / layout, "must")
        assert digest(path) == reference
        with Checkpoint(path) as checkpoint:
            assert checkpoint.world_size == 2
            assert checkpoint.state == {"step": 100, "rank": 0}
            assert [int(checkpoint.rng(rank)["cpu"][0]) for rank in (0, 1)] == [0, 1]
            data = sum(
                segment.stop - segment.start
                for _, segment in checkpoint.manifest.segments()
                if segment.kind == "weight"
            )
            assert data == 19 * 6 + 12 * 5 + 7 + 1, "each element is stored once"
            sizes = [file.size - file.header for file in checkpoint.manifest.files]
            assert len(sizes) == 2
            assert max(sizes) < 2 * min(sizes), "both ranks take part"


def test_one_process_saves_and_two_load(tmp_path):
    save_one(tmp_path / "checkpoints")
    results = run_ranks(WORKERS + "load_layouts", 2, tmp_path, [tmp_path / "checkpoints", ",".join(LAYOUTS)])
    assert all(result.output.count("equal") == 3 for result in results)


def test_an_error_on_one_rank_is_the_same_error_on_all(tmp_path):
    root = tmp_path / "checkpoints"
    old = save_one(root)
    want = {
        "create": r"error\[5\] cannot write; where=rank 1: .*shard_.*ENOSPC",
        "write": r"error\[5\] cannot write; where=rank 1: .*shard_.*ENOSPC.*want=\d+ bytes",
        "sync": r"error\[5\] cannot write; where=rank 1: .*shard_.*ENOSPC",
        "sync_dir": r"error\[5\] cannot write; where=rank 1: .*step_00000200.*ENOSPC",
        "manifest": r"error\[5\] cannot write; where=rank 0: .*manifest.json.*EIO",
        "hole": r"error\[4\] .*tensors are not covered exactly once; where=rank 0",
        "state": r"error\[4\] not plain JSON; where=rank 0: state.x",
        "bug": r"error\[1\] KeyError: 'planted'; where=rank 1",
    }
    outputs = [result.output for result in run_ranks(WORKERS + "fail", 2, tmp_path, [root, ",".join(want)])]
    for case, match in want.items():
        lines = [re.search(rf"^ERROR {case} (.*)$", output, re.MULTILINE)[1] for output in outputs]
        assert lines[0] == lines[1]
        assert re.search(match, lines[0]), lines[0]
    assert sorted(os.listdir(root)) == ["latest", old.name, "step_00000300"]
    verify(old)
    assert find(root, "must").name == "step_00000300"


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    root = tmp_path / "checkpoints"
    old = save_one(root)
    results = start_ranks(WORKERS + "lose_a_rank", 2, tmp_path, [root]).results(60)
    assert [result.returncode for result in results] == [13, 9]
    assert "error[13] a rank was lost during a checkpoint" in results[0].output
    assert find(root, "auto") == old


def test_ranks_agree_about_damage_that_one_of_them_finds(tmp_path):
    root = tmp_path / "checkpoints"
    old = save_one(root, 99)
    path = save_one(root, 100, shard_bytes=500)
    manifest = json.loads((path / "manifest.json").read_text())["body"]
    shard = path / manifest["files"][1]["name"]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 128
    shard.write_bytes(raw)
    outputs = [result.output for result in run_ranks(WORKERS + "find_newest", 2, tmp_path, [root])]
    assert all(f"FOUND {old}" in output for output in outputs)
    assert all(shard.name in output for output in outputs)


def test_inconsistent_fragments_are_refused(tmp_path):
    good = full_fragments(make_state())
    one = good[0]
    cases = {
        "data does not fill its range of the tensor": Fragment(
            one.name, one.kind, one.shape, one.slices, 0, 5, one.data
        ),
        "slice outside the tensor": Fragment(one.name, one.kind, one.shape, ((0, 99), (0, 6)), 0, 5, one.data),
        "name cannot be stored": Fragment("../x", one.kind, one.shape, one.slices, one.start, one.stop, one.data),
        "kind without / and other than rng": Fragment(
            one.name, "rng", one.shape, one.slices, one.start, one.stop, one.data
        ),
        "ranks disagree": Fragment(one.name, one.kind, one.shape, one.slices, one.start, one.stop, one.data.double()),
        "slices overlap": Fragment(one.name, one.kind, one.shape, ((0, 3), (0, 6)), 0, 18, one.data[:18]),
        "elements of": Fragment(
            one.name, one.kind, one.shape, one.slices, one.start, one.stop, one.data.to(torch.complex64)
        ),
    }
    for match, fragment in cases.items():
        with pytest.raises(CheckpointError, match=match):
            save_one(tmp_path, fragments=[*good, fragment])
        assert list(tmp_path.glob("*")) == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("weight", name) for name in ("", "/x", "a/../x", "a\\x", "a\0x", "x[0:2]")),
        *((kind, "x") for kind in ("", "a/b", "a[b", "rng")),
    ],
)
def test_names_that_cannot_be_stored_are_refused(kind, name):
    """A bracket starts the address in a shard's table, the others would leave the folder or end the name."""
    one = full_fragments(make_state())[0]
    with pytest.raises(CheckpointError, match="name cannot be stored"):
        check_fragment(Fragment(name, kind, one.shape, one.slices, one.start, one.stop, one.data))


def test_large_fragments_are_split():
    fragment = Fragment("w", "weight", (10,), ((0, 10),), 2, 10, torch.arange(8.0))
    small = Fragment("b", "weight", (1,), ((0, 1),), 0, 1, torch.ones(1, dtype=torch.int64))
    shards = group_into_shards([fragment, small], 12)
    assert [[(piece.name, piece.start, piece.stop) for piece in shard] for shard in shards] == [
        [("b", 0, 1)],
        [("w", 2, 5)],
        [("w", 5, 8)],
        [("w", 8, 10)],
    ]
    assert torch.equal(torch.cat([piece.data for shard in shards[1:] for piece in shard]), fragment.data)


def test_the_saved_bytes_are_those_of_the_call(tmp_path):
    state = make_state()
    fragments = full_fragments(state)
    path = save_one(tmp_path, fragments=fragments)
    for fragment in fragments:
        fragment.data.zero_()
    assert digest(path) == digest(save_one(tmp_path / "again", state=make_state()))
