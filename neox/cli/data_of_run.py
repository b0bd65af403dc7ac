"""`neox data which` and `neox data seen`: the data of a run, looked up afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path

from neox.checkpoint.retention import scan
from neox.config.validate import data_parallel_size
from neox.data.which import Layout, RunData
from neox.errors import ConfigError
from neox.files import json_line


def run_which(args: argparse.Namespace) -> int:
    """neox data which."""
    data = RunData(Path(args.run), args.batch)
    if args.step is not None:
        show_step(args, data)
    else:
        show_document(args, data)
    return 0


def show_step(args: argparse.Namespace, data: RunData) -> None:
    """Print the samples of a step, those of one process if --rank names it."""
    layout = layout_of(data, args.world_size)
    rows = data.batch_of(args.step, layout)
    if args.rank is not None:
        world_size = layout.tp * layout.cp * layout.dp * data.config.parallel.pipeline
        if not 0 <= args.rank < world_size:
            raise ConfigError("no such process", where="--rank", got=args.rank, want=f"0 to {world_size - 1}")
        rows = [row for row in rows if row.dp_rank == layout.dp_rank(args.rank)]
    if args.json:
        found = [{**vars(row), "pieces": [piece._asdict() for piece in row.pieces]} for row in rows]
        print(json_line({"step": args.step, "rows": found}))
        return
    first, last = data.span(args.step)
    print(f"step {args.step}: samples {first:,} to {last - 1:,}")
    for row in rows:
        print(f"sample {row.sample:,}: data-parallel rank {row.dp_rank}, micro-batch {row.micro_batch}, row {row.row}")
        for piece in row.pieces:
            print(f"  {piece.source} document {piece.document:,} tokens {piece.offset:,} to {piece.offset + piece.tokens - 1:,}")


def show_document(args: argparse.Namespace, data: RunData) -> None:
    """Print the steps that saw a document."""
    sources = data.sources()
    source = args.source or sources[0]
    if (args.source is None and len(sources) > 1) or source not in sources:
        raise ConfigError("the document's dataset is not known", where="--source", got=args.source, want=f"one of {', '.join(sources)}")
    steps = data.steps_of(source, args.document)
    if args.json:
        found = [{"step": step, "samples": samples} for step, samples in steps]
        print(json_line({"source": source, "document": args.document, "steps": found}))
        return
    print(f"{source} document {args.document:,}: {'no step' if not steps else f'{len(steps):,} steps'} of {data.last_step:,} saw it")
    for step, samples in steps:
        print(f"  step {step}: samples {', '.join(map(str, samples))}")


def run_seen(args: argparse.Namespace) -> int:
    """neox data seen."""
    data = RunData(Path(args.run), args.batch)
    if args.step is not None:
        counts = {args.step: data.span(args.step)[1]}
    else:
        manifests = [found.manifest for found in scan(data.run / "checkpoints") if found.manifest is not None]
        counts = {manifest.step: manifest.state["consumed"] for manifest in manifests if "consumed" in manifest.state}
    rows = [{"step": step, "samples": samples, "sources": [seen._asdict() for seen in data.dataset.seen(samples)]} for step, samples in counts.items()]
    if args.json:
        print(json_line(rows))
        return 0
    for row in rows:
        print(f"step {row['step']}: {row['samples']:,} samples")
        for seen in row["sources"]:
            print(f"  {seen['source']}: {seen['samples']:,} samples, {seen['tokens']:,} tokens, {seen['epochs']:.3f} epochs")
    return 0


def layout_of(data: RunData, world_size: int | None) -> Layout:
    """How the batch was shared out: by the number of processes, given or of the newest checkpoint.

    Raises:
        ConfigError: it cannot be known, or does not fit the batch.
    """
    config = data.config
    if world_size is None:
        complete = [found.manifest for found in scan(data.run / "checkpoints") if found.manifest is not None]
        world_size = max(complete, key=lambda manifest: manifest.step).world_size if complete else None
    train = config.train
    if world_size is not None:
        dp = data_parallel_size(config, world_size)
    elif train.micro_batch_size and train.gradient_accumulation:
        dp = data.batch // (train.micro_batch_size * train.gradient_accumulation)
    else:
        raise ConfigError("the number of processes is not known", where=data.run, got="no checkpoint", do="give --world-size")
    micro = train.micro_batch_size or data.batch // (dp * (train.gradient_accumulation or 1))
    if dp < 1 or data.batch % (micro * dp):
        got = f"batch {data.batch}, micro-batch {micro}, {dp} data-parallel processes"
        raise ConfigError("the batch cannot be shared out so", where="--world-size", got=got, want="a multiple")
    return Layout(micro, dp, config.parallel.tensor, config.parallel.context)
