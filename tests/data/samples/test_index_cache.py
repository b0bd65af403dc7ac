"""The cache of sample orders: complete or absent, built once, never trusted blindly."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from neox.data.samples.index_cache import NAMES, cache_key, cached_order, load

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
