"""Tokens per processor second of the loader, warm, in the caller's thread, against plain numpy: a view of the map, a copy to int64, a stack of the rows.

The dataset has documents of lognormal lengths; it is read once before, so that checksums are done and the pages are there. With
--dataset PREFIX an own one is read. Batches are of 16 samples of 2,048 tokens, four to a step, and every id is compared with the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from neox.data.indexed import IndexedDataset, IndexedWriter
from neox.data.loader import Loader
from neox.data.sampling import EpochDataset

SEQ_LENGTH, MICRO_BATCH, ACCUMULATION = 2048, 16, 4
VOCABULARY = 50_432


def write(prefix: Path, tokens: int) -> None:
    """A dataset of about so many tokens."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, "uint16") as writer:
        while writer.num_tokens < tokens:
            sizes = np.minimum(random.lognormal(6.4, 1.0, 4096), 1e6).astype(np.int32)
            writer.add_documents(random.integers(0, VOCABULARY, int(sizes.sum()), dtype=np.uint16), sizes)


def plain(dataset: IndexedDataset, order: EpochDataset, steps: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The same batches as numpy code makes them."""
    tokens = np.memmap(dataset.bin_path, dtype=dataset.dtype, mode="r")
    first = order._order.first_token
    for step in range(steps):
        batches = []
        for m in range(ACCUMULATION):
            samples = range((step * ACCUMULATION + m) * MICRO_BATCH, (step * ACCUMULATION + m + 1) * MICRO_BATCH)
            rows = np.stack([tokens[first(i) : first(i) + SEQ_LENGTH + 1].astype(np.int64) for i in samples])
            if rows.max() >= VOCABULARY or rows.min() < 0:
                raise SystemExit("id outside the vocabulary")
            batches.append((torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())))
        yield batches


def rate(read: Callable[[], object], steps: int) -> float:
    """M tokens per processor second of `steps` steps."""
    started = time.process_time()
    for _ in range(steps):
        read()
    return steps * ACCUMULATION * MICRO_BATCH * SEQ_LENGTH / 1e6 / (time.process_time() - started)


def rows(dataset: IndexedDataset, rounds: int) -> Iterator[dict[str, object]]:
    """With and without the document mask; the peer has none."""
    orders = {mask: EpochDataset(dataset, (0, dataset.num_documents), SEQ_LENGTH, 1, mask) for mask in (False, True)}
    steps = len(orders[False]) // (MICRO_BATCH * ACCUMULATION)
    found: dict[object, list[float]] = {False: [], True: [], "plain": []}
    loaders = {
        mask: Loader(order, micro_batch_size=MICRO_BATCH, gradient_accumulation=ACCUMULATION, prefetch=0, vocab_size=VOCABULARY)
        for mask, order in orders.items()
    }
    theirs = next(plain(dataset, orders[False], 1))
    for mask, loader in loaders.items():
        for batch, (tokens, targets) in zip(next(loader), theirs, strict=True):
            if not (torch.equal(batch.tokens, tokens) and torch.equal(batch.targets, targets)):
                raise SystemExit(f"batches differ, document mask {mask}")
        rate(lambda loader=loader: next(loader), steps)  # warm
    for _ in range(rounds):
        for mask, loader in loaders.items():
            found[mask].append(rate(lambda loader=loader: next(loader), steps))
        peer = plain(dataset, orders[False], steps)
        found["plain"].append(rate(lambda peer=peer: next(peer), steps))
    middle = {name: statistics.median(values) for name, values in found.items()}
    for mask in (False, True):
        setting = f"{dataset.num_tokens / 1e6:.0f} M tokens{', document mask' if mask else ''}"
        ours, peer = middle[mask], middle["plain"]
        yield {"name": "loader, warm", "setting": setting, "ours": ours, "peer": peer, "peer_name": "numpy", "ratio": ours / peer, "unit": "M tokens/cpu-s"}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="a small dataset and fewer rounds")
    parser.add_argument("--dataset", help="prefix of a dataset to read instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = args.dataset or Path(folder) / "made"
        if args.dataset is None:
            write(prefix, 8_000_000 if args.quick else 40_000_000)
        table = list(rows(IndexedDataset(prefix), 3 if args.quick else 7))
    if args.json:
        print(json.dumps(table))
        return
    for entry in table:
        print("{name:14} {setting:28} {ours:8.1f} {peer:8.1f} {unit:15} {peer_name:8} {ratio:6.2f}x".format(**entry))


if __name__ == "__main__":
    main()
