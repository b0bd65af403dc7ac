"""Inspect, verify, merge or compare indexed datasets, and report which data a run has read.

example: neox data inspect data/corpus --tokenizer tokenizer.json --samples 3
example: neox data verify data/corpus
example: neox data merge data/a data/b --out data/ab
example: neox data overlap data/train data/heldout
example: neox data which --run runs/default --step 1200 --rank 3
example: neox data seen --run runs/default
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from neox.cli.options import require_at_least
from neox.config.load import load_config
from neox.data.samples.builder import documents_of_parts
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.store.sidecar import Sidecar
from neox.data.store.statistics import DocumentStatistics, document_statistics, duplicates, histogram, overlap
from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError
from neox.files import JsonObject
from neox.printing import counted, json_line

SCANNED_BYTES = 1 << 30  # of .bin; a larger one is read only with --scan
SHOWN_CHARACTERS = 200
Result = JsonObject  # what --json prints
BAR = 40  # characters of the longest bar of a histogram


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_inspect(actions)
    add_verify(actions)
    add_merge(actions)
    add_overlap(actions)
    add_which(actions)
    add_seen(actions)
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_inspect(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `inspect`."""
    action = actions.add_parser(
        "inspect", help="counts, lengths, ids, samples", description="Report the content of a dataset."
    )
    action.add_argument("prefix", metavar="PREFIX", help="path of the dataset, without suffix")
    action.add_argument("--tokenizer", metavar="FILE", help="decode the samples with this tokenizer")
    action.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show the start of N documents, evenly spaced"
    )
    help_scan = (
        "read all tokens: range of ids, share of end-of-document tokens, duplicate documents (default: if .bin is "
        "below 1 GiB)"
    )
    action.add_argument("--scan", action=argparse.BooleanOptionalAction, help=help_scan)
    action.set_defaults(data_run=run_inspect)


def add_verify(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `verify`."""
    description = "Check the index and compare every byte with the checksums."
    action = actions.add_parser("verify", help="check structure and checksums", description=description)
    action.add_argument("prefix", nargs="+", metavar="PREFIX", help="paths of datasets, without suffix")
    action.add_argument("--vocab-size", type=int, metavar="V", help="also check that every id is below V")
    action.set_defaults(data_run=run_verify)


def add_merge(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `merge`."""
    description = "Concatenate datasets of the same token type and tokenizer."
    action = actions.add_parser("merge", help="concatenate datasets", description=description)
    action.add_argument("prefix", nargs="+", metavar="PREFIX", help="paths of datasets, without suffix")
    action.add_argument("--out", required=True, metavar="PREFIX", help="path of the result, without suffix")
    action.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    action.set_defaults(data_run=run_merge)


def add_overlap(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `overlap`."""
    description = (
        "Find documents of B that are identical to a document of A. With --conf, compare the training, validation and "
        "test data "
        "of a run. Exit code 3 if there are any."
    )
    action = actions.add_parser("overlap", help="documents that occur in two datasets", description=description)
    action.add_argument("prefix", nargs="*", metavar="A B", help="two paths of datasets, without suffix")
    action.add_argument("--conf", nargs="+", metavar="FILE", help="config of a run, whose data.split is applied")
    action.set_defaults(data_run=run_overlap)


def add_which(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `which`."""
    description = "List the documents that a step of a run read, or the steps that read a document."
    action = actions.add_parser("which", help="documents of a step, or steps of a document", description=description)
    choice = action.add_mutually_exclusive_group(required=True)
    help_step = "list the documents and offsets in the batch of step N, past or future"
    choice.add_argument("--step", type=int, metavar="N", help=help_step)
    choice.add_argument("--document", type=int, metavar="ID", help="list the steps that read a document")
    help_source = "with --document: the dataset of the document; required if there are several"
    action.add_argument("--source", metavar="PREFIX", help=help_source)
    action.add_argument("--rank", type=int, metavar="R", help="with --step: only the samples of this rank")
    help_world_size = "processes of the run (default: from its newest checkpoint)"
    action.add_argument("--world-size", type=int, metavar="N", help=help_world_size)
    add_run(action)
    action.set_defaults(data_run=partial(run_of_run, "run_which"))


def add_seen(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `seen`."""
    description = "Report samples, tokens and epochs of each source at the checkpoints of a run."
    action = actions.add_parser("seen", help="tokens read of each source", description=description)
    action.add_argument("--step", type=int, metavar="N", help="at this step instead")
    add_run(action)
    action.set_defaults(data_run=partial(run_of_run, "run_seen"))


def add_run(action: argparse.ArgumentParser) -> None:
    """Declare the options of actions on a run."""
    help_run = "folder of the run; the command must be called from the folder where the run was started"
    action.add_argument("--run", required=True, metavar="DIR", help=help_run)
    help_batch = "samples of a step (default: from the metrics or config of the run)"
    action.add_argument("--batch", type=int, metavar="B", help=help_batch)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return args.data_run(args)


def run_of_run(name: str, args: argparse.Namespace) -> int:
    """Run an action that reads checkpoints. Its module imports torch, which the other actions do not need."""
    return getattr(importlib.import_module("neox.cli.data_of_run"), name)(args)


def show(result: Result, as_json: bool) -> None:
    """Print a result as one JSON object, or as a line per entry."""
    if as_json:
        print(json_line(result))
        return
    for name, value in result.items():
        if name == "histogram":
            print(f"{name}:", *bars(value), sep="\n")
        elif isinstance(value, list):
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        elif isinstance(value, dict):
            print(
                f"{name}:",
                *(f"  {key}: {f'{inner:,}' if isinstance(inner, int) else inner}" for key, inner in value.items()),
                sep="\n",
            )
        else:
            print(f"{name}: {f'{value:,}' if isinstance(value, int) else value}")


def bars(rows: list[dict[str, int]]) -> Iterator[str]:
    """The lines of a histogram of lengths."""
    most = max((row["documents"] for row in rows), default=1)
    for row in rows:
        bar = "#" * -(-row["documents"] * BAR // most)
        yield (
            f"  {row['from']:>13,} to {row['to'] - 1:>13,} tokens {row['documents']:>13,} documents "
            f"{row['tokens']:>15,} tokens  {bar}"
        )


def run_inspect(args: argparse.Namespace) -> int:
    """neox data inspect.

    Raises:
        DataError: the dataset was built with a different tokenizer.
    """
    require_at_least(args, 0, "samples")
    dataset = IndexedDataset(args.prefix)
    sidecar = dataset.sidecar
    size = dataset.num_tokens * dataset.dtype.itemsize
    result: Result = {
        "prefix": args.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "bytes": size,
        "sidecar": "present, and matches the files" if sidecar else "none: only the structure can be checked",
    }
    if sidecar is not None:
        result |= {
            "tokenizer_hash": sidecar.tokenizer_hash,
            "vocab_size": sidecar.vocab_size,
            "eod_id": sidecar.eod_id,
            "largest_id": sidecar.largest_id,
        }
    if dataset.num_documents:
        lengths = np.diff(dataset.document_starts())
        result |= {"document_tokens": describe_lengths(lengths), "histogram": histogram(lengths)}
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None:
        dataset.check_tokenizer(tokenizer.hash, tokenizer.file)
    if args.scan or (args.scan is None and size <= SCANNED_BYTES):
        recorded = sidecar.eod_id if sidecar else None
        result |= scan(dataset, tokenizer.eod_id if recorded is None and tokenizer else recorded)
    elif args.scan is None:
        result["scan"] = "skipped, because .bin is large; --scan reads all of it"
    if args.samples:
        result["samples"] = list(samples(dataset, args.samples, tokenizer))
    show(result, args.json)
    return 0


def describe_lengths(lengths: np.ndarray) -> str:
    """Quantiles of the tokens per document, in one line."""
    low, median, high = np.percentile(lengths, [10, 50, 90])
    quantiles = f"10 % below {low:,.0f}, median {median:,.0f}, 90 % below {high:,.0f}"
    return f"shortest {lengths.min():,}, {quantiles}, longest {lengths.max():,}, mean {lengths.mean():,.1f}"


def scan(dataset: IndexedDataset, eod_id: int | None) -> Result:
    """Range of ids, end-of-document tokens, and duplicate documents. Reads all of .bin."""
    found = document_statistics(dataset, eod_id)
    result: Result = {"smallest_id_found": found.smallest, "largest_id_found": found.largest}
    if eod_id is not None:
        result |= {
            "eod_tokens": found.eod_tokens,
            "eod_share": found.eod_tokens / max(dataset.num_tokens, 1),
            "eod_per_document": round(found.eod_tokens / max(dataset.num_documents, 1), 4),
            "documents_that_end_in_eod": found.ended,
        }
    return result | {"duplicates": duplicates(found)}


def samples(dataset: IndexedDataset, count: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The start of `count` evenly spaced documents, as text with a tokenizer, else as ids."""
    for document in np.unique(
        np.linspace(0, dataset.num_documents - 1, min(count, dataset.num_documents)).astype(int)
    ).tolist():
        first = dataset.first_token_of_document(document)
        length = dataset.first_token_of_document(document + 1) - first
        ids = dataset.read(first, min(length, SHOWN_CHARACTERS))[0].tolist()
        shown = repr(tokenizer.decode(ids)[:SHOWN_CHARACTERS]) if tokenizer else " ".join(map(str, ids[:20]))
        yield f"document {document} ({counted(length, 'token')}): {shown}"


def run_verify(args: argparse.Namespace) -> int:
    """neox data verify.

    Raises:
        DataError: something is wrong; the results are printed first.
    """
    require_at_least(args, 1, "vocab_size")
    checked = [verify(prefix, args.vocab_size) for prefix in args.prefix]
    results = [result for result, _ in checked]
    for result in results if not args.json else []:
        print(f"{result['prefix']}: {result['state']}")
    if args.json:
        print(json_line(results))
    bad = [error for _, error in checked if error is not None]
    if bad:
        raise bad[0]
    return 0


def verify(prefix: str, vocab_size: int | None) -> tuple[Result, DataError | None]:
    """Check one dataset: its structure, checksums if there is a sidecar, and ids if `vocab_size` is given.

    Returns:
        The result to print, and the error if something is wrong.
    """
    try:
        dataset = IndexedDataset(prefix)
        damaged = dataset.verify()
        bad = None if vocab_size is None or damaged else dataset.find_bad_token(vocab_size)
    except DataError as error:
        return {"prefix": prefix, "ok": False, "state": error.line().partition("] ")[2], "damaged": []}, error
    if damaged:
        state = (
            f"{counted(len(damaged), 'block')} with wrong checksums in {dataset.bin_path}, first bytes "
            f"{damaged[0][0]} to {damaged[0][1]}"
        )
    elif bad is not None:
        document, offset = dataset.locate(bad)
        state = (
            f"id {dataset.read(bad, 1)[0][0]} in document {document} offset {offset} is outside a vocabulary of "
            f"{vocab_size}"
        )
    elif dataset.sidecar is None:
        state = "structure is intact; no sidecar, so no checksums to compare"
    else:
        state = "intact"
    wrong = None
    if damaged or bad is not None:
        wrong = DataError(
            "dataset is damaged", where=prefix, got=state, do="restore the file or preprocess the corpus again"
        )
    return {"prefix": prefix, "ok": wrong is None, "state": state, "damaged": damaged}, wrong


def run_overlap(args: argparse.Namespace) -> int:
    """neox data overlap.

    Raises:
        DataError: there is an overlap; the results are printed first.
        ConfigError: not exactly two datasets, or a config.
    """
    if (len(args.prefix) == 2) == bool(args.conf):
        raise ConfigError(
            "specify two datasets, or a config",
            where="neox data overlap",
            got=" ".join(args.prefix) or None,
            want="A B, or --conf",
        )
    if args.conf:
        parts = {
            name: [statistics_of(*place) for place in places]
            for name, places in documents_of_parts(load_config(*args.conf)).items()
        }
        if len(parts) < 2:
            raise ConfigError(
                "no two datasets to compare",
                where=" ".join(args.conf),
                got=f"documents for {', '.join(parts)} only",
                want="validation or test data, named or by data.split",
            )
    else:
        first, second = (IndexedDataset(prefix) for prefix in args.prefix)
        common_tokenizer([first, second], "")
        parts = {dataset.prefix: [statistics_of(dataset, (0, dataset.num_documents))] for dataset in (first, second)}
        parts = (
            parts
            if len(parts) == 2
            else {first.prefix: parts[first.prefix], f"{first.prefix} (second)": parts[first.prefix]}
        )
    results = [
        {"in": ours, "from": theirs, **overlap(parts[ours], parts[theirs])} for ours, theirs in combinations(parts, 2)
    ]
    for result in [] if args.json else results:
        print(
            f"{result['documents']:,} of {result['of']:,} documents of {result['from']} "
            f"({counted(result['tokens'], 'token')}) are in {result['in']}"
        )
        print(*(f"  {example}" for example in result["examples"]), sep="\n", end="\n" if result["examples"] else "")
    if args.json:
        print(json_line(results))
    found = [result for result in results if result["documents"]]
    if found:
        got, do = (
            f"{found[0]['documents']:,} of {found[0]['of']:,} documents",
            "remove them from one of the two before preprocessing",
        )
        raise DataError("datasets overlap", where=f"{found[0]['from']}, {found[0]['in']}", got=got, want="none", do=do)
    return 0


def statistics_of(dataset: IndexedDataset, documents: tuple[int, int]) -> DocumentStatistics:
    """Statistics of documents [first, last), with the end-of-document token of the sidecar."""
    return document_statistics(dataset, dataset.sidecar.eod_id if dataset.sidecar else None, documents)


def run_merge(args: argparse.Namespace) -> int:
    """neox data merge."""
    datasets = [IndexedDataset(prefix) for prefix in args.prefix]
    made_by = common_tokenizer(datasets, args.out)
    with IndexedWriter(args.out, datasets[0].dtype.name, overwrite=args.overwrite) as writer:
        if made_by is not None:
            writer.tokenizer_hash, writer.vocab_size, writer.eod_id = (
                made_by.tokenizer_hash,
                made_by.vocab_size,
                made_by.eod_id,
            )
        for dataset in datasets:
            writer.add_dataset(dataset)
    merged = IndexedDataset(args.out)
    result = {
        "out": args.out,
        "datasets": len(datasets),
        "documents": merged.num_documents,
        "tokens": merged.num_tokens,
        "dtype": merged.dtype.name,
    }
    show(result, args.json)
    return 0


def same_file(first: str, second: str) -> bool:
    """Whether two names lead to the same file, through links too; a missing one does not."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def common_tokenizer(datasets: Sequence[IndexedDataset], out: str) -> Sidecar | None:
    """A sidecar with the tokenizer of all datasets; None if some dataset has no sidecar that names one.

    Raises:
        DataError: two datasets were built with different tokenizers.
        ConfigError: the result would replace one of its inputs.
    """
    for dataset in datasets:
        if same_file(f"{dataset.prefix}.idx", f"{out}.idx"):
            raise ConfigError("a dataset cannot be merged into itself", where="--out", got=out)
    known = [(dataset, dataset.sidecar) for dataset in datasets if dataset.sidecar is not None]
    named = [
        (dataset.prefix, sidecar, sidecar.tokenizer_hash)
        for dataset, sidecar in known
        if sidecar.tokenizer_hash is not None
    ]
    for prefix, _, found in named[1:]:
        first, _, wanted = named[0]
        if found != wanted:
            got, want = f"tokenizer hash {found[:16]}", f"{wanted[:16]} as {first}"
            raise DataError("datasets were built with different tokenizers", where=prefix, got=got, want=want)
    return named[0][1] if len(named) == len(datasets) else None
