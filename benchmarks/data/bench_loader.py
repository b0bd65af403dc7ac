"""Tokens per CPU second of the loader in the caller's thread, against plain numpy: a slice of the memory map, a copy to
int64, a stack of the rows.

The dataset has documents of lognormal lengths, unless --dataset names another one. One epoch is read before the timing,
which verifies checksums and loads the pages. A step has four batches of 16 samples of 2,048 tokens. Both sides compare
every id with the vocabulary.

Two more rows compare the time to read the batches of a step of the demo (configs/demo.yml) with a hundredth of its
training step, both in CPU time of one thread, and the memory of the process after ten epochs with that after the first.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, cost_row, median_over_rounds, new_parser, rate_row, report

from neox.config.load import load_config
from neox.data.samples.loader import Loader
from neox.data.samples.order import EpochDataset
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

SEQ_LENGTH, MICRO_BATCH, ACCUMULATION = 2048, 16, 4
VOCABULARY = 50_432


def write_dataset(prefix: Path, tokens: int) -> None:
    """Write a dataset of about that many tokens."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, "uint16") as writer:
        while writer.num_tokens < tokens:
            sizes = np.minimum(random.lognormal(6.4, 1.0, 4096), 1e6).astype(np.int32)
            writer.add_documents(random.integers(0, VOCABULARY, int(sizes.sum()), dtype=np.uint16), sizes)


def numpy_batches(
    dataset: IndexedDataset, order: EpochDataset, steps: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The batches of each step, by plain numpy code."""
    tokens = np.memmap(dataset.bin_path, dtype=dataset.dtype, mode="r")
    first = order._order.first_token
    for step in range(steps):
        batches = []
        for m in range(ACCUMULATION):
            samples = range((step * ACCUMULATION + m) * MICRO_BATCH, (step * ACCUMULATION + m + 1) * MICRO_BATCH)
            rows = np.stack([tokens[first(i) : first(i) + SEQ_LENGTH + 1].astype(np.int64) for i in samples])
            if rows.max() >= VOCABULARY or rows.min() < 0:
                raise SystemExit("an id is outside the vocabulary")
            batches.append((torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())))
        yield batches


def tokens_per_cpu_second(read: Callable[[], object], steps: int) -> float:
    """Millions of tokens per CPU second over that many steps."""
    started = time.process_time()
    for _ in range(steps):
        read()
    return steps * ACCUMULATION * MICRO_BATCH * SEQ_LENGTH / 1e6 / (time.process_time() - started)


def loader_rows(dataset: IndexedDataset, rounds: int) -> Iterator[Row]:
    """Compare the loader with numpy, with and without the document mask, which numpy does not compute."""
    orders = {mask: EpochDataset(dataset, (0, dataset.num_documents), SEQ_LENGTH, 1, mask) for mask in (False, True)}
    steps = len(orders[False]) // (MICRO_BATCH * ACCUMULATION)
    loaders = {
        mask: Loader(
            order, micro_batch_size=MICRO_BATCH, gradient_accumulation=ACCUMULATION, prefetch=0, vocab_size=VOCABULARY
        )
        for mask, order in orders.items()
    }
    expected = next(numpy_batches(dataset, orders[False], 1))
    for mask, loader in loaders.items():
        for batch, (tokens, targets) in zip(next(loader), expected, strict=True):
            if not (torch.equal(batch.tokens, tokens) and torch.equal(batch.targets, targets)):
                raise SystemExit(f"batches of the loader and of numpy differ; where=document mask {mask}")
        tokens_per_cpu_second(partial(next, loader), steps)  # warm-up

    def numpy_rate() -> float:
        return tokens_per_cpu_second(partial(next, numpy_batches(dataset, orders[False], steps)), steps)

    rates = median_over_rounds(
        {
            "plain": partial(tokens_per_cpu_second, partial(next, loaders[False]), steps),
            "document mask": partial(tokens_per_cpu_second, partial(next, loaders[True]), steps),
            "numpy": numpy_rate,
        },
        rounds,
    )
    size = f"{dataset.num_tokens / 1e6:.0f} M tokens"
    for name, setting in (("plain", size), ("document mask", f"{size}, document mask")):
        yield rate_row("loader, warm", setting, rates[name], rates["numpy"], "numpy", "M tokens/cpu-s")


def demo_row(dataset: IndexedDataset, rounds: int) -> Row:
    """Compare the time to read the two batches of 8 x 256 tokens of a step of the demo with a hundredth of the step:
    forward, backward, fused AdamW.
    """
    vocabulary, length = 4096, 256
    overrides = [f"model.vocab_size={vocabulary}", "tokenizer.file=null"]
    model = GPT(load_config("demo.yml", overrides=overrides).model, Mesh.single())
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
    return cost_row("loader, demo", "2 x 8 x 256, document mask", ours, step / 100, "step/100", "ms")


def memory_row(dataset: IndexedDataset) -> Row:
    """Compare resident memory after ten epochs with that after one, without pages of mapped files."""
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
    setting = f"10 epochs of {dataset.num_tokens / 1e6:.0f} M tokens"
    return cost_row("loader, memory", setting, used[-1], used[0], "1 epoch", "MB")


def rows(prefix: str | None, quick: bool) -> Iterator[Row]:
    """All rows, on a dataset in a temporary folder unless there is a prefix."""
    rounds = 3 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        if prefix is None:
            write_dataset(Path(folder) / "data", 8_000_000 if quick else 40_000_000)
        dataset = IndexedDataset(prefix or Path(folder) / "data")
        yield from loader_rows(dataset, rounds)
        yield demo_row(dataset, rounds)
        yield memory_row(dataset)


def main() -> None:
    """Parse the command line and print the rows."""
    parser = new_parser(__doc__, "a small dataset and fewer rounds")
    parser.add_argument("--dataset", help="prefix of a dataset to read instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report(rows(args.dataset, args.quick), Options(json=args.json, quick=args.quick))


if __name__ == "__main__":
    main()
