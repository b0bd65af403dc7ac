"""What may be removed: by lineage and number, ours only, never what resume would need."""

import os
import shutil

import pytest

from neox.checkpoint.find import find
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.retention import (
    collect_leftovers,
    folder_name,
    folder_step,
    read_latest,
    remove_checkpoint,
    remove_superseded,
    retain,
    scan,
    start_lineage,
    write_latest,
)
from neox.checkpoint.verify import verify
from neox.errors import CheckpointError, DiskError
from tests.checkpoint.builders import LINEAGE, save_one
from tests.checkpoint.faults import RecordingStorage


def steps(root):
    return sorted(one.step for one in scan(root) if one.manifest)


def test_folder_names():
    assert folder_name(100) == "step_00000100"
    assert folder_step("step_00000100") == 100
    assert folder_step(folder_name(10**9)) == 10**9
    for foreign in (
        "step_100",
        "step_00000100.bak",
        "xstep_00000100",
        "step_000000100",
        "step_0000010a",
        "global_step100",
        "latest",
    ):
        assert folder_step(foreign) is None


def test_the_newest_are_retained_by_step(tmp_path):
    for step in (9, 10, 99999, 100000, 99_999_999, 100_000_000):
        path = save_one(tmp_path, step, keep=3)
        os.utime(path, (0, 0))
    assert steps(tmp_path) == [100000, 99_999_999, 100_000_000]


def test_keep_0_retains_all(tmp_path):
    for step in (1, 2, 3):
        save_one(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3]


def test_after_a_rollback_the_checkpoint_just_written_survives(tmp_path):
    for step in (10, 20, 30):
        save_one(tmp_path, step, lineage=Lineage("aa" * 16, 0))
    lineage = start_lineage(tmp_path, tmp_path / folder_name(10))
    save_one(tmp_path, 15, keep=2, lineage=lineage)
    assert steps(tmp_path) == [10, 15, 20, 30]
    assert find(tmp_path, "auto") == tmp_path / folder_name(15)
    save_one(tmp_path, 20, keep=2, lineage=lineage)
    assert find(tmp_path, "auto") == tmp_path / folder_name(20)
    for step in (25, 30, 35):
        save_one(tmp_path, step, keep=2, lineage=lineage)
    assert steps(tmp_path) == [10, 30, 35], "the one resumed from stays, and the newest two"


def test_the_next_start_frees_the_old_parent(tmp_path):
    save_one(tmp_path, 10, lineage=start_lineage(tmp_path))
    for step in (20, 30, 40):
        save_one(tmp_path, step, keep=1, lineage=start_lineage(tmp_path, find(tmp_path, "auto")))
        assert steps(tmp_path) == [step - 10, step]
    found = scan(tmp_path)[-1].manifest.lineage
    assert [step for _, step in found.ancestors] == [30, 20, 10]
    assert found.generation == 3


def test_only_complete_checkpoints_of_the_lineage_are_removed(tmp_path):
    for step in (1, 2, 3):
        save_one(tmp_path, step)
    next((tmp_path / folder_name(3)).glob("*.safetensors")).unlink()
    os.symlink(save_one(tmp_path / "elsewhere", 0), tmp_path / folder_name(0))
    (tmp_path / "step_00000001.bak").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / folder_name(2) / "notes.txt").write_text("mine")
    save_one(tmp_path, 4, keep=2)
    assert (tmp_path / folder_name(3) / "manifest.json").exists(), "damaged: evidence, not counted, not removed"
    assert not (tmp_path / folder_name(1)).exists()
    save_one(tmp_path, 5, keep=1)
    assert os.listdir(tmp_path / folder_name(2)) == ["notes.txt"]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [
            "elsewhere",
            "latest",
            "notes.txt",
            "step_00000001.bak",
            folder_name(0),
            folder_name(2),
            folder_name(3),
            folder_name(5),
        ]
    )
    verify(tmp_path / folder_name(0))


def test_names_with_spaces_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save_one("run ö/step_00000007/", step, keep=2)
    assert steps(tmp_path / "run ö" / "step_00000007") == [2, 3]


def test_saving_a_step_again_replaces_it(tmp_path):
    first = {file.name for file in save_one(tmp_path, 5).iterdir()}
    path = save_one(tmp_path, 5, content={"again": 1})
    assert {file.name for file in path.iterdir()} & first == {"manifest.json"}
    assert len(os.listdir(path)) == 2
    verify(path)


def test_leftovers_are_collected_and_evidence_is_not(tmp_path):
    good = save_one(tmp_path, 2)
    shard = next(good.glob("*.safetensors"))
    unfinished = tmp_path / folder_name(3)
    unfinished.mkdir()
    shutil.copy(shard, unfinished / shard.name)
    (unfinished / (shard.name + ".tmp")).write_bytes(b"half")
    shutil.copy(shard, good / ("shard_" + "0" * 16 + "_00000_0000.safetensors"))
    (good / "manifest.json.tmp").write_bytes(b"half")
    lost = save_one(tmp_path, 9)
    (tmp_path / "latest.tmp").write_bytes(b"")
    (tmp_path / ".probe-123").write_bytes(b"")
    (lost / "manifest.json").write_bytes(b"garbage")
    removed = {path.name for path in collect_leftovers(tmp_path)}
    assert len(removed) == 6
    assert sorted(os.listdir(tmp_path)) == ["latest", good.name, lost.name]
    assert len(os.listdir(good)) == 2
    assert len(os.listdir(lost)) == 2
    verify(good)
    assert collect_leftovers(tmp_path) == []


def test_a_checkpoint_that_lost_its_manifest_is_not_a_leftover(tmp_path):
    path = save_one(tmp_path)
    (path / "manifest.json").unlink()
    assert read_latest(tmp_path) == path.name
    assert collect_leftovers(tmp_path) == []
    assert len(os.listdir(path)) == 1


def test_a_thousand_leftovers_are_collected_without_waiting_for_the_disk(tmp_path):
    for step in range(1000):
        (tmp_path / folder_name(step)).mkdir()
        (tmp_path / folder_name(step) / ("shard_" + "0" * 16 + "_00000_0000.safetensors.tmp")).write_bytes(b"half")
    storage = RecordingStorage()
    assert len(collect_leftovers(tmp_path, storage=storage)) == 1000
    assert os.listdir(tmp_path) == []
    assert {call[0] for call in storage.trace} == {"unlink", "remove_dir"}


def test_lineage_of_a_damaged_parent_is_an_error(tmp_path):
    path = save_one(tmp_path)
    (path / "manifest.json").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="not a manifest"):
        start_lineage(tmp_path, path)


def test_a_missing_folder_is_a_disk_error(tmp_path):
    """As between the save of a checkpoint and the retention after it."""
    with pytest.raises(DiskError, match="the folder is missing") as caught:
        remove_superseded(tmp_path / "step_00000003", "a" * 8)
    assert caught.value.exit_code == 5
    with pytest.raises(DiskError):
        remove_checkpoint(tmp_path / "step_00000003")


def test_a_start_from_another_run_is_newer_than_both(tmp_path):
    """The generation of a new lineage exceeds those in its folder and that of its parent in any folder."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(), elsewhere.mkdir()
    high = save_one(elsewhere, 7, lineage=Lineage("bb" * 16, 9, (("cc" * 16, 3),)))
    assert start_lineage(here).generation == 0
    assert start_lineage(here, high).generation == 10
    assert start_lineage(here, high).ancestors == (("bb" * 16, 7), ("cc" * 16, 3))
    save_one(here, 8, lineage=Lineage("aa" * 16, 4))
    assert start_lineage(here).generation == 5
    assert start_lineage(here, high).generation == 10
    save_one(here, 9, lineage=Lineage("dd" * 16, 12))
    assert start_lineage(here, high).generation == 13


def test_a_truncated_checkpoint_is_not_counted_and_stays(tmp_path):
    for step in (1, 2, 3):
        save_one(tmp_path, step, shard_bytes=500)
    _, shard, *_ = sorted((tmp_path / folder_name(3)).glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    save_one(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [2, 3, 4]


def test_what_was_removed_is_returned_oldest_first(tmp_path):
    lineage = Lineage("aa" * 16, 0)
    paths = [save_one(tmp_path, step, lineage=lineage) for step in (8, 9, 10, 11)]
    assert retain(tmp_path, 0, lineage, 11) == retain(tmp_path, 4, lineage, 11) == []
    assert retain(tmp_path, 1, Lineage("bb" * 16, 1), 11) == [], "another run's"
    assert retain(tmp_path, 2, lineage, 11) == paths[:2]
    assert steps(tmp_path) == [10, 11]


def test_the_hint_is_text_of_at_most_200_characters(tmp_path):
    assert read_latest(tmp_path) is None
    write_latest(tmp_path, "step_00000012")
    assert (tmp_path / "latest").read_bytes() == b"step_00000012\n" and read_latest(tmp_path) == "step_00000012"
    (tmp_path / "latest").write_bytes(b" \xff" + b"x" * 300)
    assert read_latest(tmp_path) == "\ufffd" + "x" * 198
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "nothing")
    assert read_latest(tmp_path) == "", "something is there, so a checkpoint was"


def test_a_scan_is_of_folders_whose_manifest_is_of_their_step(tmp_path):
    save_one(tmp_path, 5).rename(tmp_path / folder_name(6))
    save_one(tmp_path, 4, lineage=Lineage("aa" * 16, 7))
    save_one(tmp_path, 8)
    (tmp_path / folder_name(7)).write_text("a file")
    (tmp_path / folder_name(3)).mkdir()
    found = scan(tmp_path)
    assert [(one.step, one.manifest is None, one.has_manifest) for one in found] == [
        (3, True, False),
        (6, True, True),
        (8, False, True),
        (4, False, True),
    ], "those without a valid manifest first, then by generation and step"
    assert (
        "folder holds another step" in found[1].problem.line() and "got=step 5; want=step 6" in found[1].problem.line()
    )
    assert all((one.manifest is None) != (one.problem is None) for one in found)
    assert scan(tmp_path / "nothing") == []


def test_links_and_folders_with_the_names_of_leftovers_are_not_removed(tmp_path):
    outside = tmp_path / "outside"
    shard = "shard_" + "0" * 16 + "_00000_0000.safetensors"
    (outside / folder_name(1)).mkdir(parents=True)
    (outside / folder_name(1) / shard).write_bytes(b"mine")
    root = tmp_path / "root"
    good = save_one(root, 2)
    (root / folder_name(1)).symlink_to(outside / folder_name(1))
    (good / shard).symlink_to(outside / folder_name(1) / shard)
    (good / (shard + ".tmp")).mkdir()
    (root / ".probe-x").touch(), (root / "latest.tmp.tmp").touch(), (root / ".probe-12.tmp").touch()
    assert collect_leftovers(root) == [root / ".probe-12.tmp"]
    assert (outside / folder_name(1) / shard).read_bytes() == b"mine"
    assert (good / shard).is_symlink() and (good / (shard + ".tmp")).is_dir()
    assert sorted(os.listdir(root)) == [".probe-x", "latest", "latest.tmp.tmp", folder_name(1), good.name]


def test_of_the_files_of_a_step_only_those_of_other_saves_are_superseded(tmp_path):
    path = save_one(tmp_path, 5)
    own = scan(tmp_path)[0].manifest.save_id
    for owner in (own, "0" * 16):
        (path / f"shard_{owner}_00009_0000.safetensors").touch()
    remove_superseded(path, own)
    assert not (path / ("shard_" + "0" * 16 + "_00009_0000.safetensors")).exists()
    assert (path / f"shard_{own}_00009_0000.safetensors").exists() and (path / "manifest.json").exists()


def test_every_start_has_an_id_of_its_own(tmp_path):
    ids = {start_lineage(tmp_path).id for _ in range(20)}
    assert len(ids) == 20 and all(len(one) == 32 and int(one, 16) >= 0 for one in ids)


def test_a_checkpoint_is_removed_manifest_first_and_durably(tmp_path):
    """Through the storage that is given; a crash in between leaves an unfinished save, not a damaged checkpoint."""
    old = save_one(tmp_path, 1, shard_bytes=500)
    shards = sorted(old.glob("*.safetensors"))
    save_one(tmp_path, 2)
    storage = RecordingStorage()
    retain(tmp_path, 1, LINEAGE, 2, storage=storage)
    assert storage.trace == [
        ("unlink", old / "manifest.json"),
        ("sync_dir", old),
        *(("unlink", shard) for shard in shards),
        ("remove_dir", old),
        ("sync_dir", tmp_path),
    ]


def test_a_save_retires_older_ones_through_its_storage(tmp_path):
    old = save_one(tmp_path, 1)
    storage = RecordingStorage()
    path = save_one(tmp_path, 1, keep=1, content={"again": 1}, storage=storage)
    calls = [(name, where) for name, where, *_ in storage.trace]
    superseded = [where for name, where in calls if name == "unlink" and where.suffix == ".safetensors"]
    assert path == old and len(superseded) == 1
    save_one(tmp_path, 2, keep=1, storage=storage)
    assert ("remove_dir", old) in [call[:2] for call in storage.trace]
    hint = [call for call in storage.trace if call[0] == "rename" and call[2].name == "latest"]
    assert len(hint) == 2
