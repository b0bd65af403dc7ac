"""`neox data which` and `neox data seen`: which data a run has read."""

from __future__ import annotations

import argparse
from pathlib import Path

from neox.checkpoint.retention import scan
from neox.cli.options import require_at_least
from neox.config.rules import data_parallel_size
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.run_provenance import CheckpointRecord, RunProvenance
from neox.data.store.indexed import IndexedDataset
from neox.errors import ConfigError
from neox.printing import counted, json_line


def provenance_of(args: argparse.Namespace) -> RunProvenance:
    """The provenance of the data of a run, from the checkpoints of its newest branch."""
    manifests = [
        (found.path, found.manifest) for found in scan(Path(args.run) / "checkpoints") if found.manifest is not None
    ]
    newest = manifests[-1][1].lineage if manifests else None
    written = [
        CheckpointRecord(
            one.step, one.state["consumed"], one.config_lock, one.state.get("data"), str(path), one.world_size
        )
        for path, one in manifests
        if newest is not None and newest.includes(one.lineage, one.step) and "consumed" in one.state
    ]
    return RunProvenance(Path(args.run), args.batch, sorted(written, key=lambda one: one.step))


def run_which(args: argparse.Namespace) -> int:
    """neox data which."""
    require_at_least(args, 1, "step", "batch", "world_size")
    require_at_least(args, 0, "document", "rank")
    data = provenance_of(args)
    if args.step is not None:
        show_step(args, data)
    else:
        show_document(args, data)
    return 0


def show_step(args: argparse.Namespace, data: RunProvenance) -> None:
    """Print the samples of a step, with --rank only those of one process."""
    layout = layout_of(data, args.step, args.world_size)
    rows = data.batch_of(args.step, layout)
    if args.rank is not None:
        world_size = layout.tp * layout.cp * layout.dp * data.config_span(args.step).config.parallel.pipeline
        if not 0 <= args.rank < world_size:
            raise ConfigError("no such rank", where="--rank", got=args.rank, want=f"0 to {world_size - 1}")
        rows = [row for row in rows if row.dp_rank == layout.dp_rank(args.rank)]
    if args.json:
        found = [
            {
                "sample": row.sample,
                "micro_batch": row.micro_batch,
                "dp_rank": row.dp_rank,
                "row": row.row,
                "pieces": [part._asdict() for part in row.slices],
            }
            for row in rows
        ]
        print(json_line({"step": args.step, "rows": found}))
        return
    first, last = data.span(args.step)
    print(f"step {args.step}: samples {first:,} to {last - 1:,}")
    for row in rows:
        print(f"sample {row.sample:,}: data-parallel rank {row.dp_rank}, micro-batch {row.micro_batch}, row {row.row}")
        for part in row.slices:
            print(
                f"  {part.source} document {part.document:,} tokens {part.offset:,} to "
                f"{part.offset + part.tokens - 1:,}"
            )


def show_document(args: argparse.Namespace, data: RunProvenance) -> None:
    """Print the steps that read a document."""
    sources = data.sources()
    source = args.source or sources[0]
    if (args.source is None and len(sources) > 1) or source not in sources:
        raise ConfigError(
            "the dataset of the document is unknown",
            where="--source",
            got=args.source,
            want=f"one of {', '.join(sources)}",
        )
    documents = IndexedDataset(source).num_documents
    if args.document >= documents:
        want = f"0 to {documents - 1} in {source}"
        raise ConfigError("no such document", where="--document", got=args.document, want=want)
    steps = data.steps_of(source, args.document)
    if args.json:
        found = [{"step": step, "samples": samples} for step, samples in steps]
        print(json_line({"source": source, "document": args.document, "steps": found}))
        return
    print(
        f"{source} document {args.document:,}: {counted(len(steps), 'step') if steps else 'no step'} of "
        f"{data.last_step:,} read it"
    )
    for step, samples in steps:
        print(f"  step {step}: samples {', '.join(map(str, samples))}")


def run_seen(args: argparse.Namespace) -> int:
    """neox data seen."""
    require_at_least(args, 1, "step", "batch")
    data = provenance_of(args)
    counts = (
        {one.step: one.consumed for one in data.written} if args.step is None else {args.step: data.span(args.step)[1]}
    )
    found = {step: data.config_span(step).dataset.coverage(samples) for step, samples in counts.items()}
    rows = [
        {"step": step, "samples": counts[step], "sources": [seen._asdict() for seen in sources]}
        for step, sources in found.items()
    ]
    if args.json:
        print(json_line(rows))
        return 0
    for row in rows:
        print(f"step {row['step']}: {counted(row['samples'], 'sample')}")
        for seen in row["sources"]:
            print(
                f"  {seen['source']}: {counted(seen['samples'], 'sample')}, {counted(seen['tokens'], 'token')}, "
                f"{seen['epochs']:.3f} epochs"
            )
    return 0


def layout_of(data: RunProvenance, step: int, world_size: int | None) -> BatchLayout:
    """The layout of the batch of a step, from the number of processes given or recorded in a checkpoint.

    Raises:
        ConfigError: the number of processes is unknown, or does not divide the batch.
    """
    span = data.config_span(step)
    config = span.config
    world_size = world_size or span.world_size
    first, last = data.span(step)
    batch = last - first
    train = config.train
    if world_size is not None:
        dp = data_parallel_size(config, world_size)
    elif train.micro_batch_size and train.gradient_accumulation:
        dp = batch // (train.micro_batch_size * train.gradient_accumulation)
    else:
        raise ConfigError(
            "the number of processes is unknown", where=data.run, got="no checkpoint", do="give --world-size"
        )
    micro = train.micro_batch_size or batch // (max(dp, 1) * (train.gradient_accumulation or 1))
    if dp < 1 or micro < 1 or batch % (micro * dp):
        got = f"batch {batch}, micro-batch {micro}, {dp} data-parallel processes"
        want = "a batch that is a multiple of the micro-batch times the data-parallel processes"
        raise ConfigError("the processes cannot share the batch equally", where="--world-size", got=got, want=want)
    return BatchLayout(micro, dp, config.parallel.tensor, config.parallel.context)
