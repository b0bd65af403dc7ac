"""`neox evaluate`: loss, perplexity and bits per byte on held-out documents, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.reader import Checkpoint
from neox.cli.generate import run_tokenizer, usable_device
from neox.cli.layout import add_layout_arguments, join_layout
from neox.cli.options import require_at_least
from neox.config.load import loads
from neox.config.schema import ModelConfig
from neox.data.store.indexed import IndexedDataset
from neox.errors import ConfigError
from neox.evaluate.harness import run_tasks
from neox.evaluate.perplexity import evaluate
from neox.generate.generate import load_model
from neox.model.dtypes import DTYPES
from neox.printing import counted

EXAMPLE = """example:
  neox evaluate --checkpoint runs/mine --data data/heldout
  neox evaluate --checkpoint runs/mine/checkpoints/step_00000300 --data data/heldout --max-documents 100 --json
  neox evaluate --checkpoint pythia --tasks lambada_openai,blimp --batch-size 16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `neox evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--checkpoint", required=True, help="run folder (its newest checkpoint), or one checkpoint folder"
    )
    parser.add_argument("--data", help="prefix of an indexed dataset (PREFIX.bin, PREFIX.idx)")
    parser.add_argument(
        "--tasks", metavar="A,B", help="tasks or groups of lm-evaluation-harness (pip install neox-train[eval])"
    )
    parser.add_argument(
        "--task-files", metavar="DIR", help="folder of additional task YAML files; tasks in it need no network"
    )
    parser.add_argument(
        "--num-fewshot", type=int, help="examples before each question (default: as defined by the task)"
    )
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument("--tokenizer", help="tokenizer file; default: tokenizer.file of the run")
    parser.add_argument("--seq-length", type=int, help="tokens per window (default: data.seq_length of the run)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or texts per forward pass (default 8)")
    parser.add_argument("--max-documents", type=int, help="maximum number of documents")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the weights (default fp32)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if available)",
    )
    add_layout_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show_progress(done: int, total: int) -> None:
    """Print the number of windows, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} windows" + ("\n" if done == total else ""))
        sys.stderr.flush()


def run(args: argparse.Namespace) -> int:
    """Evaluate and print. Return the exit code."""
    require_at_least(args, 1, "seq_length", "batch_size", "max_documents", "limit")
    require_at_least(args, 0, "num_fewshot")
    usable_device(args.device)
    if (args.data is None) == (args.tasks is None):
        raise ConfigError(
            "specify either data or tasks",
            where="neox evaluate",
            got="neither" if args.data is None else "both",
            want="exactly one of --data PREFIX and --tasks A,B",
        )
    if args.task_files is not None and not Path(args.task_files).is_dir():
        raise ConfigError("no such folder", where="--task-files", got=args.task_files, want="a folder of YAML files")
    if args.tasks is not None:
        return run_on_tasks(args)
    checkpoint = resolve(args.checkpoint)
    tokenizer = run_tokenizer(checkpoint, args.tokenizer)
    dataset = IndexedDataset(args.data)
    dataset.check_tokenizer(tokenizer.hash, tokenizer.file)
    seq_length = args.seq_length or loads(Checkpoint(checkpoint).config_lock).data.seq_length
    mesh = join_layout(args, ModelConfig(**Checkpoint(checkpoint).model_config))
    model = load_model(checkpoint, dtype=DTYPES[args.dtype], mesh=mesh)
    progress = show_progress if mesh.rank == 0 else None
    result = evaluate(
        model,
        dataset,
        seq_length=seq_length,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        max_documents=args.max_documents,
        on_batch=progress,
    )
    if mesh.rank > 0:
        return 0
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    size = "" if result.bytes is None else f", {counted(result.bytes, 'byte')}"
    amount = f"{counted(result.documents, 'document')}, {counted(result.tokens, 'token')}{size}"
    print(f"{checkpoint} on {args.data}: {amount}")
    bits = "" if result.bits_per_byte is None else f"  bits per byte {result.bits_per_byte:.4f}"
    print(f"loss {result.loss:.4f}  perplexity {result.perplexity:.3f}{bits}")
    return 0


def run_on_tasks(args: argparse.Namespace) -> int:
    """Evaluate on tasks of lm-evaluation-harness and print the results as a table or as JSON."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("no task", where="--tasks", got=args.tasks, want="names, separated by commas")
    checkpoint = resolve(args.checkpoint)
    tokenizer = run_tokenizer(checkpoint, args.tokenizer)
    mesh = join_layout(args, ModelConfig(**Checkpoint(checkpoint).model_config))
    model = load_model(checkpoint, dtype=DTYPES[args.dtype], mesh=mesh)
    found = run_tasks(
        model,
        tokenizer,
        names,
        task_files=args.task_files,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    if mesh.rank > 0:
        return 0
    if args.json:
        print(json.dumps(found, default=str))
        return 0
    print(table(found["results"], found.get("n-samples", {})))
    return 0


def table(results: dict, counts: dict) -> str:
    """Format the results of tasks as a table: task, metric, value, standard error, questions."""
    rows = [("task", "metric", "value", "stderr", "questions")]
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, (int, float)) else ""
            rows.append((task, metric, f"{value:.4f}", shown, str(counts.get(task, {}).get("effective", ""))))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
