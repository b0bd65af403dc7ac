"""The cache of sample orders: complete or absent, built once, never trusted blindly."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest
import xxhash

from neox.data.samples.index_cache import NAMES, PACKING_NAMES, cache_key, cached_order, load, store

ARRAYS = (np.arange(5, dtype=np.int32), np.arange(8, dtype=np.int64).reshape(4, 2), np.arange(3, dtype=np.uint32))


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.calls += 1
        return ARRAYS


def same(found: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, ARRAYS, strict=True))


def test_built_once_and_mapped_afterwards(tmp_path):
    build = Builder()
    for _ in range(3):
        found = cached_order([tmp_path / "c"], "key", build)
        assert same(found) and all(isinstance(array, np.memmap) for array in found)
    assert build.calls == 1
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["key", "key.lock"]


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in NAMES), "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_cache_is_rebuilt(tmp_path, name, damage):
    build = Builder()
    cached_order([tmp_path], "key", build)
    path = tmp_path / "key" / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-2])
    elif damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert same(cached_order([tmp_path], "key", build)) and build.calls == 2
    assert same(load(tmp_path / "key"))


def test_a_folder_left_by_a_killed_builder_is_no_cache(tmp_path):
    (tmp_path / "key.partial.abc").mkdir()
    (tmp_path / "key").mkdir()
    np.save(tmp_path / "key" / "doc_idx.npy", ARRAYS[0])
    assert load(tmp_path / "key") is None
    assert same(cached_order([tmp_path], "key", Builder()))


def test_racing_builders_build_once(tmp_path):
    build, found = Builder(), []
    threads = [threading.Thread(target=lambda: found.append(cached_order([tmp_path], "key", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1 and len(found) == 4 and all(same(arrays) for arrays in found)


def test_folders_that_cannot_be_written_are_passed_over_with_a_notice(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    blocked = tmp_path / "file" / "cache"
    assert same(cached_order([blocked, tmp_path / "second"], "key", Builder()))
    assert (tmp_path / "second" / "key").is_dir() and "cannot store the sample order" in caplog.text
    assert same(cached_order([blocked], "key", Builder())) and "in memory" in caplog.text


def test_key_covers_every_setting():
    settings = {"idx": 1, "first": 0, "last": 5, "seq_length": 8, "num_samples": 3, "seed": 1}
    keys = {cache_key(**settings)} | {cache_key(**{**settings, name: 99}) for name in settings}
    assert len(keys) == 7
    assert Path(cache_key(**settings)).name == cache_key(**settings)


def test_a_folder_that_has_the_arrays_comes_before_those_that_could(tmp_path):
    build = Builder()
    cached_order([tmp_path / "second"], "key", build)
    assert same(cached_order([tmp_path / "first", tmp_path / "second"], "key", build)) and build.calls == 1
    assert not (tmp_path / "first").exists()
    assert same(cached_order([tmp_path / "first", tmp_path / "second"], "other", build)) and build.calls == 2
    assert (tmp_path / "first" / "other").is_dir() and not (tmp_path / "second" / "other").exists()


def test_arrays_are_stored_under_their_names(tmp_path):
    names = ("firsts", "sizes", "starts")
    cached_order([tmp_path], "key", Builder(), names)
    assert {path.name for path in (tmp_path / "key").iterdir()} == {*(f"{name}.npy" for name in names), "manifest.json"}
    assert same(load(tmp_path / "key", names)) and names == PACKING_NAMES
    sums = orjson.loads((tmp_path / "key" / "manifest.json").read_bytes())
    files = {name: (tmp_path / "key" / f"{name}.npy").read_bytes() for name in names}
    assert sums == {name: f"{xxhash.xxh64(content).intdigest():016x}" for name, content in files.items()}


def test_arrays_of_other_names_are_no_cache(tmp_path, caplog):
    cached_order([tmp_path], "key", Builder())
    assert load(tmp_path / "key", PACKING_NAMES) is None and "is damaged and is rebuilt" in caplog.text
    caplog.clear()
    assert load(tmp_path / "none") is None and not caplog.records


def test_the_name_of_arrays_is_pinned():
    """A change makes every run build its arrays again."""
    wanted = hashlib.sha256(b'["neox-order-1",{"a":2,"idx":1}]').hexdigest()[:24]
    assert cache_key(idx=1, a=2) == cache_key(a=2, idx=1) == wanted


def test_arrays_are_durable_before_they_have_their_name(tmp_path, monkeypatch):
    calls: list[object] = []
    rename = os.rename
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    )
    monkeypatch.setattr("neox.data.samples.index_cache.sync_dir", lambda folder: calls.append(folder))

    def noted(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "key":
            calls.append("rename")
        rename(source, target)

    monkeypatch.setattr("os.rename", noted)
    store(tmp_path / "key", ARRAYS)
    files = [call for call in calls if isinstance(call, str) and call.endswith(".npy")]
    assert files == [f"{name}.npy" for name in NAMES] and calls[-2:] == ["rename", tmp_path]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_store_that_fails_leaves_nothing_and_an_earlier_cache_alone(tmp_path, monkeypatch):
    store(tmp_path / "key", ARRAYS)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", refuse)
    with pytest.raises(OSError, match="No space left"):
        store(tmp_path / "key", ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["key"] and same(load(tmp_path / "key"))


def test_arrays_that_read_back_differently_stay_in_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("neox.data.samples.index_cache.load", lambda *_: None)
    found = cached_order([tmp_path], "key", Builder())
    assert found[0] is ARRAYS[0] and "the cache reads back differently" in caplog.text
    assert "set data.index_cache to a writable folder" in caplog.text
