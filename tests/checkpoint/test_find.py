"""The choice of the checkpoint to resume from."""

import logging
import os
import shutil

import pytest

from neox.checkpoint.find import find, listing, resolve
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.retention import start_lineage
from neox.errors import CheckpointError
from tests.checkpoint.builders import flip_bit, save_one


def test_find_auto_takes_the_newest_valid_one(tmp_path, caplog):
    assert find(tmp_path / "nothing", "auto") is None
    old, new = save_one(tmp_path, 99999), save_one(tmp_path, 100000)
    assert find(tmp_path, "auto") == new
    (shard,) = new.glob("*.safetensors")
    flip_bit(shard, 8 * os.path.getsize(shard) - 1)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "auto") == old
    assert "skipped checkpoint" in caplog.text
    assert shard.name in caplog.text
    (tmp_path / "step_00000001").mkdir()  # a save that did not finish
    with pytest.raises(CheckpointError, match=r"; do=valid by their manifests: step_00099999$"):
        find(tmp_path, str(new))


def test_a_folder_is_listed_up_to_twenty_names(tmp_path):
    (tmp_path / "lock").touch()
    assert listing(tmp_path) == f"{tmp_path} holds nothing"
    for number in range(20, 0, -1):
        (tmp_path / f"{number:02d}").touch()
    assert listing(tmp_path) == f"{tmp_path} holds {', '.join(f'{n:02d}' for n in range(1, 21))}"
    (tmp_path / "21").touch()
    assert listing(tmp_path).endswith(", 19, 20 and 1 more")


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("damage", ["no manifest", "garbage manifest", "no shard", "no folder"])
def test_a_lost_checkpoint_never_means_step_0(tmp_path, resume, damage):
    path = save_one(tmp_path)
    if damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "garbage manifest":
        (path / "manifest.json").write_bytes(b"\x00" * 100)
    elif damage == "no shard":
        next(path.glob("*.safetensors")).unlink()
    else:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="step_00000100"):
        find(tmp_path, resume)


@pytest.mark.parametrize("hint", [b"", b"garbage\xff", b"step_00000777\n"])
def test_the_hint_decides_nothing(tmp_path, hint):
    path = save_one(tmp_path)
    (tmp_path / "latest").write_bytes(hint)
    assert find(tmp_path, "auto") == path


def test_find_must_and_never(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from.*does not exist"):
        find(tmp_path / "nothing", "must")
    assert find(tmp_path, "never") is None
    path = save_one(tmp_path)
    assert find(tmp_path, "must") == path
    with pytest.raises(CheckpointError, match=r"never.*step_00000100"):
        find(tmp_path, "never")


def test_find_explicit_path(tmp_path):
    path = save_one(tmp_path / "run dir é" / "checkpoints", 9)
    newer = save_one(tmp_path / "run dir é" / "checkpoints", 10)
    (tmp_path / "link").symlink_to(tmp_path / "run dir é")
    assert find(tmp_path, str(path) + "/") == path
    assert find(tmp_path, str(newer.parent)) == newer
    assert resolve(newer.parent.parent) == newer
    assert resolve(tmp_path / "link").name == newer.name
    with pytest.raises(CheckpointError, match=r"no checkpoint found.*run dir é"):
        find(tmp_path, str(tmp_path / "wrong" / "path"))


def test_a_path_without_checkpoints_reports_what_is_there(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"got=no such folder; want"):
        resolve(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"got=not a folder; want"):
        resolve(tmp_path / "notes.txt")
    newest = save_one(tmp_path / "run" / "checkpoints", 9)
    with pytest.raises(CheckpointError, match=r"got=no such folder; \S+ holds run; want"):
        resolve(tmp_path / "runn")
    with pytest.raises(CheckpointError, match=r"got=no such folder; \S+ holds step_00000009; want"):
        resolve(newest.parent / "step_9")
    with pytest.raises(CheckpointError, match=r"got=not a folder; .*do=name the folder of a run"):
        resolve(newest.parent / "latest")


def test_a_hugging_face_model_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint found.*do=this may be a Hugging Face model: neox import"):
        resolve(tmp_path)


@pytest.mark.parametrize("hint", [True, False])
def test_a_damaged_newest_is_not_replaced_by_an_older_one(tmp_path, hint):
    """Its manifest has no readable generation: the hint, or its step, shows that it is the newest."""
    old, new = save_one(tmp_path / "checkpoints", 9), save_one(tmp_path / "checkpoints", 10)
    raw = (new / "manifest.json").read_bytes()
    (new / "manifest.json").write_bytes(raw[: len(raw) // 2])
    if not hint:
        (tmp_path / "checkpoints" / "latest").unlink()
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            CheckpointError,
            match=r"not a manifest; where=.*step_00000010.*valid by their manifests: step_00000009; name one of them",
        ):
            resolve(path)
        with pytest.raises(CheckpointError, match="not a manifest"):
            find(tmp_path / "other", str(path))
    assert resolve(old) == old


def test_a_damaged_older_one_is_ignored(tmp_path):
    old, new = save_one(tmp_path, 9), save_one(tmp_path, 10)
    (old / "manifest.json").write_bytes(b"{")
    assert resolve(tmp_path) == new


def test_a_damaged_one_that_the_hint_names_is_the_newest_whatever_its_step(tmp_path):
    """A run that went back to an earlier step and saved there."""
    for step in (9, 10, 8):
        newest = save_one(tmp_path, step)
    (newest / "manifest.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"not a manifest; where=.*step_00000008"):
        resolve(tmp_path)


def test_newest_is_by_lineage_not_by_step(tmp_path):
    first = Lineage("aa" * 16, 0)
    for step in (10, 20, 30):
        save_one(tmp_path, step, lineage=first)
    second = start_lineage(tmp_path, tmp_path / "step_00000010")
    assert second.generation == 1
    assert second.parent == (first.id, 10)
    path = save_one(tmp_path, 15, lineage=second)
    os.utime(path / "manifest.json", (0, 0))
    assert find(tmp_path, "auto") == path


def test_a_damaged_manifest_is_skipped_with_a_warning(tmp_path, caplog):
    old, new = save_one(tmp_path, 9), save_one(tmp_path, 10)
    (new / "manifest.json").write_bytes(b"garbage")
    (tmp_path / "step_00000011").mkdir()  # a save that did not finish
    for resume in ("auto", "must"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find(tmp_path, resume) == old
        (record,) = caplog.records
        assert "skipped checkpoint" in record.getMessage() and "step_00000010/manifest.json" in record.getMessage()


def test_every_damaged_checkpoint_is_listed_where_none_is_left(tmp_path):
    for step in (9, 10):
        flip_bit(next(save_one(tmp_path, step).glob("*.safetensors")), 8 * 100)
    (save_one(tmp_path, 11) / "manifest.json").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="all checkpoints of the run are damaged") as caught:
        find(tmp_path, "auto")
    assert caught.value.where == tmp_path
    assert all(f"step_{step:08d}" in caught.value.got for step in (9, 10, 11))
    assert caught.value.do == "restore one of them, or choose another run.dir"
    # no advice of one of them: it would point to another that is damaged too
    assert caught.value.got.count(" | ") == 2 and "do=" not in caught.value.got and "error[" not in caught.value.got


def test_an_unfinished_save_is_no_reason_not_to_start(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    assert find(tmp_path, "never") is None
    assert find(tmp_path, "auto") is None
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from; .*got=\S+ holds step_00000001; "):
        find(tmp_path, "must")


def test_never_lists_all_that_is_there(tmp_path):
    save_one(tmp_path, 9)
    (save_one(tmp_path, 10) / "manifest.json").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="got=step_00000010, step_00000009; "):
        find(tmp_path, "never")


def test_the_nearest_folder_above_a_wrong_path_is_listed(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="got=no such folder; want"):
        resolve(tmp_path / "a" / "b" / "c")
    for number in range(25):
        (tmp_path / "run" / "checkpoints" / f"step_{number:08d}").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    steps = ", ".join(f"step_{number:08d}" for number in range(5, 25))
    with pytest.raises(CheckpointError, match=f"got=no such folder; {tmp_path}/run/checkpoints holds {steps}; want"):
        resolve(tmp_path / "run" / "checkpoints" / "last")
    with pytest.raises(CheckpointError, match=f"got=no such folder; {tmp_path}/run holds checkpoints; want"):
        resolve(tmp_path / "run" / "checkpoint" / "step_00000024")
    with pytest.raises(CheckpointError, match=f"got=no such folder; {tmp_path} holds run; want"):
        resolve(tmp_path / "rum" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="where=newest; got=no such folder; the working folder holds run; want"):
        resolve("newest")


def test_the_path_of_a_damaged_checkpoint_lists_what_is_valid_besides(tmp_path):
    path = save_one(tmp_path, 10)
    flip_bit(next(path.glob("*.safetensors")), 8 * 100)
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path, str(path))
    assert "valid by" not in str(caught.value.do)
    save_one(tmp_path, 9), save_one(tmp_path, 11)
    with pytest.raises(CheckpointError, match="do=valid by their manifests: step_00000009, step_00000011$"):
        find(tmp_path, str(path))


def test_a_step_folder_without_a_manifest_is_that_checkpoint_and_damaged(tmp_path):
    save_one(tmp_path, 9)
    path = tmp_path / "step_00000010"
    path.mkdir()
    assert resolve(path) == path
    with pytest.raises(CheckpointError, match=r"file is missing; where=.*step_00000010/manifest.json"):
        find(tmp_path, str(path))
