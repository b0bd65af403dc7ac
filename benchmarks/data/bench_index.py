"""Sample index, blending, and opening a corpus of 20 million documents, against plain C++ loops (plain_index.cpp).
Equal arrays are a condition.

Documents have lognormal lengths and are visited in a random order, as in a shuffled epoch; every visit is a cache miss
of its own. The loops are built with the same compiler and -O3, without fused multiply-add, which would blend otherwise.
Every call makes the arrays that it fills, ours and theirs, as the functions of GPT-NeoX do: the kernel's zeroing of
fresh memory is half of our time for a blend of few datasets.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from neox._native import core
from neox.data.samples.blend import normalise_weights
from neox.data.samples.order import EpochDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter

SEQ_LENGTH = 2048


def plain_loops(folder: str) -> ctypes.CDLL:
    """The peer, built."""
    library = Path(folder) / "plain_index.so"
    source = Path(__file__).with_name("plain_index.cpp")
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            "-O3",
            "-std=c++17",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            source,
            "-o",
            library,
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Address of an array's content."""
    return ctypes.c_void_p(array.ctypes.data)


def seconds(*calls: Callable[[], object], rounds: int) -> list[float]:
    """Median wall seconds of each call over interleaved rounds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in times]


def row(name: str, setting: str, work: float, ours: float, peer: float, peer_name: str, unit: str) -> dict[str, object]:
    """One row of the table: `work` units done in `ours` and `peer` seconds."""
    return {
        "name": name,
        "setting": setting,
        "ours": work / ours,
        "peer": work / peer,
        "peer_name": peer_name,
        "ratio": peer / ours,
        "unit": unit,
    }


def sample_index_rows(loops: ctypes.CDLL, documents: int, rounds: int) -> Iterator[dict[str, object]]:
    """One thread and two."""
    random = np.random.default_rng(1)
    sizes = np.minimum(random.lognormal(6.4, 1.0, documents), 1e6).astype(np.int32)
    order = random.permutation(documents).astype(np.int32)
    rows = int((sizes.sum(dtype=np.int64) - 1) // SEQ_LENGTH) + 1

    def peer() -> np.ndarray:
        out = np.empty((rows, 2), dtype=np.int32)
        loops.plain_sample_index(
            pointer(sizes), pointer(order), ctypes.c_int64(SEQ_LENGTH), ctypes.c_int64(rows), pointer(out)
        )
        return out

    def ours(threads: int) -> np.ndarray:
        return core.sample_index(sizes, order, SEQ_LENGTH, rows, False, threads)

    theirs = peer()
    for threads in (1, 2):
        if not np.array_equal(ours(threads), theirs):
            raise SystemExit("sample indices differ")
    one, two, plain = seconds(lambda: ours(1), lambda: ours(2), peer, rounds=rounds)
    setting = f"{documents / 1e6:g} M documents"
    yield row("sample index, 1 thread", setting, documents / 1e6, one, plain, "plain loop", "M documents/s")
    yield row("sample index, 2 threads", setting, documents / 1e6, two, plain, "plain loop", "M documents/s")


def blend_rows(loops: ctypes.CDLL, size: int, rounds: int) -> Iterator[dict[str, object]]:
    """A few datasets, as many as the Pile has, and many."""
    for count in (4, 22, 128):
        weights = normalise_weights(np.random.default_rng(count).lognormal(0, 1, count))
        zeros = np.zeros(count, dtype=np.int64)

        def peer(weights=weights, count=count) -> tuple[np.ndarray, ...]:
            out = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int64), np.empty(count, dtype=np.int64)
            loops.plain_blend(pointer(weights), ctypes.c_int64(count), ctypes.c_int64(size), *map(pointer, out))
            return out

        def ours(weights=weights, zeros=zeros) -> tuple[np.ndarray, ...]:
            return core.blend(weights, 0, size, zeros)

        if not all(np.array_equal(one, other) for one, other in zip(ours(), peer(), strict=True)):
            raise SystemExit("blends differ")
        fast, plain = seconds(ours, peer, rounds=rounds)
        yield row("blend", f"{count} datasets", size / 1e6, fast, plain, "plain loop", "M samples/s")


def open_rows(folder: str, documents: int, rounds: int) -> Iterator[dict[str, object]]:
    """Opening with the full structural check, and the order of an epoch. The peer is the bar of half a second for 20
    million documents.
    """
    prefix = Path(folder) / "large"
    random = np.random.default_rng(2)
    with IndexedWriter(prefix, "uint16") as writer:
        for _ in range(20):
            sizes = random.integers(1, 12, documents // 20).astype(np.int32)
            writer.add_documents(np.zeros(int(sizes.sum()), dtype=np.uint16), sizes)
    Path(f"{prefix}.json").unlink()  # as data from elsewhere: nothing but the structure is known

    def opened() -> None:
        dataset = IndexedDataset(prefix)
        EpochDataset(dataset, (0, dataset.num_documents), SEQ_LENGTH, 1)[0]

    opened()
    (time_to_open,) = seconds(opened, rounds=rounds)
    yield row(
        "open and index, order: epoch",
        f"{documents / 1e6:g} M documents",
        documents / 1e6,
        time_to_open,
        documents / 20e6 * 0.5,
        "0.5 s",
        "M documents/s",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer rounds")
    args = parser.parse_args()
    documents, rounds = (2_000_000, 3) if args.quick else (20_000_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        loops = plain_loops(folder)
        rows = [
            *sample_index_rows(loops, documents, rounds),
            *blend_rows(loops, documents // 4, rounds),
            *open_rows(folder, documents, rounds),
        ]
    if args.json:
        print(json.dumps(rows))
        return
    for entry in rows:
        print("{name:30} {setting:18} {ours:9.1f} {peer:9.1f} {unit:14} {peer_name:12} {ratio:6.2f}x".format(**entry))


if __name__ == "__main__":
    main()
