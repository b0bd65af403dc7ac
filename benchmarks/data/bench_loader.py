"""Tokens per processor second of the loader, warm, in the caller's thread, against plain numpy: a view of the map, a
copy to int64, a stack of the rows.

The dataset has documents of lognormal lengths; it is read once before, so that checksums are done and the pages are
there. With
--dataset PREFIX that dataset is read. Batches are of 16 samples of 2,048 tokens, four to a step, and every id is
compared with the vocabulary.

Two more rows: a step's batches of the demo (configs/demo.yml) against a hundredth of its training step, both in
processor time of one thread, and the memory that the process has after ten epochs against that after the first.
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
import psutil
import torch

from neox.config.schema import ModelConfig
from neox.data.samples.loader import Loader
from neox.data.samples.order import EpochDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

SEQ_LENGTH, MICRO_BATCH, ACCUMULATION = 2048, 16, 4
VOCABULARY = 50_432


def write(prefix: Path, tokens: int) -> None:
    """A dataset of about that many tokens."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, "uint16") as writer:
        while writer.num_tokens < tokens:
            sizes = np.minimum(random.lognormal(6.4, 1.0, 4096), 1e6).astype(np.int32)
            writer.add_documents(random.integers(0, VOCABULARY, int(sizes.sum()), dtype=np.uint16), sizes)


def plain(
    dataset: IndexedDataset, order: EpochDataset, steps: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
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
        mask: Loader(
            order, micro_batch_size=MICRO_BATCH, gradient_accumulation=ACCUMULATION, prefetch=0, vocab_size=VOCABULARY
        )
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
        yield entry("loader, warm", setting, ours, peer, "numpy", ours / peer, "M tokens/cpu-s")


def entry(
    name: str, setting: str, ours: float, peer: float, peer_name: str, ratio: float, unit: str
) -> dict[str, object]:
    """A row of the table."""
    return {
        "name": name,
        "setting": setting,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ratio,
        "unit": unit,
    }


def demo_step(dataset: IndexedDataset, rounds: int) -> dict[str, object]:
    """Reading a step's batches of the demo against a hundredth of the step: two micro-batches of 8 x 256, forward,
    backward, fused AdamW.
    """
    vocabulary, length = 4096, 256
    shape = {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "rotary_pct": 0.25,
        "parallel_residual": True,
    }
    model = GPT(ModelConfig(**shape, max_position_embeddings=length, vocab_size=vocabulary), Mesh.single())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loader = Loader(
        EpochDataset(dataset, (0, dataset.num_documents), length, 1, True),
        micro_batch_size=8,
        gradient_accumulation=2,
        prefetch=0,
    )
    reading, training = [], []
    for _ in range(10 * rounds):
        begin = time.thread_time()
        batches = next(loader)
        read = time.thread_time()
        for batch in batches:
            tokens = batch.tokens % vocabulary
            model(
                tokens, batch.targets % vocabulary, segment_ids=batch.segment_ids, position_ids=batch.position_ids
            ).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reading.append(read - begin)
        training.append(time.thread_time() - read)
    ours, step = statistics.median(reading) * 1e3, statistics.median(training) * 1e3
    return entry("loader, demo", "2 x 8 x 256, document mask", ours, step / 100, "step/100", step / 100 / ours, "ms")


def ten_epochs(dataset: IndexedDataset) -> dict[str, object]:
    """Resident memory after ten epochs and after one, the files' own pages left out."""
    order = EpochDataset(dataset, (0, dataset.num_documents), SEQ_LENGTH, 1, True)
    epoch = order._order.samples_per_epoch // (MICRO_BATCH * ACCUMULATION)
    loader = Loader(
        order, micro_batch_size=MICRO_BATCH, gradient_accumulation=ACCUMULATION, prefetch=2, vocab_size=VOCABULARY
    )
    used = []
    for _ in range(10):
        for _ in range(epoch):
            next(loader)
        memory = psutil.Process().memory_full_info()
        used.append((memory.rss - memory.shared) / 1e6)
    loader.close()
    return entry(
        "loader, memory",
        f"10 epochs of {dataset.num_tokens / 1e6:.0f} M tokens",
        used[-1],
        used[0],
        "1 epoch",
        used[0] / used[-1],
        "MB",
    )


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
        dataset, rounds = IndexedDataset(prefix), 3 if args.quick else 7
        table = [*rows(dataset, rounds), demo_step(dataset, rounds), ten_epochs(dataset)]
    if args.json:
        print(json.dumps(table))
        return
    for one in table:
        print("{name:14} {setting:28} {ours:8.2f} {peer:8.2f} {unit:15} {peer_name:8} {ratio:6.2f}x".format(**one))


if __name__ == "__main__":
    main()
