"""The sample index and blending against plain C++ loops (plain_index.cpp), and opening a corpus of 20 million
documents. Both sides must give the same arrays.

Documents have lognormal lengths and are visited in a random order, as in a shuffled epoch, so that every visit is a
cache miss. The loops are compiled with the same compiler and -O3, without fused multiply-add, which would change the
blend. Every call allocates the arrays that it fills, as GPT-NeoX's functions do. With few datasets the kernel's zeroing
of that memory is half of neox's time for a blend.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, counted, median_over_rounds, new_parser, rate_row, report, seconds_per_call

from neox._native import core
from neox.data.samples.blend import normalise_weights
from neox.data.samples.order import EpochDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter

SEQ_LENGTH = 2048


def plain_loops(folder: str) -> ctypes.CDLL:
    """Compile and load the peer."""
    library = Path(folder) / "plain_index.so"
    source = Path(__file__).with_name("plain_index.cpp")
    flags = ("-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")
    subprocess.run([*shlex.split(os.environ.get("CXX", "g++")), *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Address of an array's content."""
    return ctypes.c_void_p(array.ctypes.data)


def speed_row(name: str, setting: str, work: float, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A row of rates: neox does the work in `ours` seconds, the peer in `peer` seconds."""
    return rate_row(name, setting, work / ours, work / peer, peer_name, unit)


def median_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call over interleaved rounds."""
    return median_over_rounds({name: partial(seconds_per_call, call) for name, call in calls.items()}, rounds)


def sample_index_rows(loops: ctypes.CDLL, documents: int, rounds: int) -> Iterator[Row]:
    """The sample index with one thread and with two."""
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

    expected = peer()
    for threads in (1, 2):
        if not np.array_equal(ours(threads), expected):
            raise SystemExit(f"sample indices differ; where={counted(threads, 'thread')}")
    seconds = median_times({"1 thread": partial(ours, 1), "2 threads": partial(ours, 2), "peer": peer}, rounds)
    setting, work = f"{documents / 1e6:g} M documents", documents / 1e6
    for threads in ("1 thread", "2 threads"):
        times = seconds[threads], seconds["peer"]
        yield speed_row(f"sample index, {threads}", setting, work, *times, "plain loop", "M documents/s")


def blend_rows(loops: ctypes.CDLL, size: int, rounds: int) -> Iterator[Row]:
    """Blending of 4 datasets, of 22 as in the Pile, and of 128."""
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
            raise SystemExit(f"blends differ; where={count} datasets")
        seconds = median_times({"ours": ours, "peer": peer}, rounds)
        times = seconds["ours"], seconds["peer"]
        yield speed_row("blend", f"{count} datasets", size / 1e6, *times, "plain loop", "M samples/s")


def open_rows(folder: str, documents: int, rounds: int) -> Iterator[Row]:
    """Opening with the full structural check, and the order of an epoch. The peer is a target: half a second for 20
    million documents.
    """
    prefix = Path(folder) / "large"
    random = np.random.default_rng(2)
    with IndexedWriter(prefix, "uint16") as writer:
        for _ in range(20):
            sizes = random.integers(1, 12, documents // 20).astype(np.int32)
            writer.add_documents(np.zeros(int(sizes.sum()), dtype=np.uint16), sizes)
    Path(f"{prefix}.json").unlink()  # as for a dataset of another program, which has no sidecar

    def open_and_index() -> None:
        dataset = IndexedDataset(prefix)
        EpochDataset(dataset, (0, dataset.num_documents), SEQ_LENGTH, 1)[0]

    open_and_index()  # warm-up
    seconds = median_times({"ours": open_and_index}, rounds)["ours"]
    setting, work, target = f"{documents / 1e6:g} M documents", documents / 1e6, documents / 20e6 * 0.5
    yield speed_row("open and index, order: epoch", setting, work, seconds, target, "0.5 s", "M documents/s")


def rows(documents: int, rounds: int) -> Iterator[Row]:
    """All rows, with the peer and the corpus in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        loops = plain_loops(folder)
        yield from sample_index_rows(loops, documents, rounds)
        yield from blend_rows(loops, documents // 4, rounds)
        yield from open_rows(folder, documents, rounds)


def main() -> None:
    """Parse the command line and print the rows."""
    args = new_parser(__doc__, "smaller and fewer rounds").parse_args()
    size = (2_000_000, 3) if args.quick else (20_000_000, 7)
    report(rows(*size), Options(json=args.json, quick=args.quick))


if __name__ == "__main__":
    main()
