"""Look at, check or join indexed datasets (PREFIX.bin, PREFIX.idx, PREFIX.json).

example: neox data inspect data/corpus --tokenizer tokenizer.json --samples 3
example: neox data verify data/corpus
example: neox data merge data/a data/b --out data/ab
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import orjson

from neox.data.indexed import IndexedDataset, IndexedWriter
from neox.data.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError

SCAN_TOKENS = 1 << 20
SHOWN_CHARACTERS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="counts, lengths, ids, samples", description="Say what is in a dataset.")
    inspect.add_argument("prefix", metavar="PREFIX", help="path of the dataset, without suffix")
    inspect.add_argument("--tokenizer", metavar="FILE", help="decode the samples with this tokenizer")
    inspect.add_argument("--samples", type=int, default=0, metavar="N", help="show the start of N documents, spread over the dataset")
    inspect.add_argument("--scan", action="store_true", help="read all tokens: range of ids, share of end-of-document tokens")
    inspect.set_defaults(data_run=run_inspect)
    verify = actions.add_parser("verify", help="check structure and checksums", description="Check every byte against the index and the checksums.")
    verify.add_argument("prefix", nargs="+", metavar="PREFIX", help="paths of datasets, without suffix")
    verify.add_argument("--vocab-size", type=int, metavar="V", help="also check that every id is below V")
    verify.set_defaults(data_run=run_verify)
    merge = actions.add_parser("merge", help="join datasets", description="Join datasets of one token type and tokenizer, in the order given.")
    merge.add_argument("prefix", nargs="+", metavar="PREFIX", help="paths of datasets, without suffix")
    merge.add_argument("--out", required=True, metavar="PREFIX", help="path of the result, without suffix")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    merge.set_defaults(data_run=run_merge)
    for action in (inspect, verify, merge):
        action.add_argument("--json", action="store_true", help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return args.data_run(args)


def show(result: dict[str, object], as_json: bool) -> None:
    """Print a result: as one JSON object, or a line per entry."""
    if as_json:
        print(orjson.dumps(result).decode())
        return
    for name, value in result.items():
        if isinstance(value, list):
            print(f"{name}:", *(f"  {entry}" for entry in value), sep="\n")
        else:
            print(f"{name}: {f'{value:,}' if isinstance(value, int) else value}")


def run_inspect(args: argparse.Namespace) -> int:
    """neox data inspect."""
    dataset = IndexedDataset(args.prefix)
    sidecar = dataset.sidecar
    result: dict[str, object] = {
        "prefix": args.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "bytes": dataset.num_tokens * dataset.dtype.itemsize,
        "sidecar": "there, and belongs to the files" if sidecar else "none: only the structure can be checked",
    }
    if sidecar is not None:
        result |= {"tokenizer_hash": sidecar.tokenizer_hash, "vocab_size": sidecar.vocab_size, "eod_id": sidecar.eod_id, "largest_id": sidecar.largest_id}
    if dataset.num_documents:
        ends = np.concatenate([[0], np.cumsum(dataset.sizes, dtype=np.int64)])[dataset.documents]
        lengths = np.diff(ends)
        result["document_tokens"] = describe_lengths(lengths)
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if args.scan:
        result |= scan(dataset, tokenizer.eod_id if tokenizer else sidecar.eod_id if sidecar else None)
    if args.samples:
        result["samples"] = list(samples(dataset, args.samples, tokenizer))
    show(result, args.json)
    return 0


def describe_lengths(lengths: np.ndarray) -> str:
    """Quantiles of the tokens per document, in one line."""
    low, median, high = np.percentile(lengths, [10, 50, 90])
    quantiles = f"10 % below {low:,.0f}, median {median:,.0f}, 90 % below {high:,.0f}"
    return f"shortest {lengths.min():,}, {quantiles}, longest {lengths.max():,}, mean {lengths.mean():,.1f}"


def scan(dataset: IndexedDataset, eod_id: int | None) -> dict[str, object]:
    """Range of ids, how many ids occur, and the share of documents that end in `eod_id`. Reads all of .bin."""
    smallest, largest, eod = None, None, 0
    for first in range(0, dataset.num_tokens, SCAN_TOKENS):
        tokens, _ = dataset.read(first, min(SCAN_TOKENS, dataset.num_tokens - first))
        smallest = int(tokens.min()) if smallest is None else min(smallest, int(tokens.min()))
        largest = int(tokens.max()) if largest is None else max(largest, int(tokens.max()))
        eod += 0 if eod_id is None else int((tokens == eod_id).sum())
    result: dict[str, object] = {"smallest_id_found": smallest, "largest_id_found": largest}
    return result if eod_id is None else {**result, "eod_tokens": eod, "eod_per_document": round(eod / max(dataset.num_documents, 1), 4)}


def samples(dataset: IndexedDataset, count: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The start of `count` documents spread over the dataset: text with a tokenizer, else ids."""
    for document in np.unique(np.linspace(0, dataset.num_documents - 1, min(count, dataset.num_documents)).astype(int)).tolist():
        first = dataset.first_token_of_document(document)
        length = dataset.first_token_of_document(document + 1) - first
        ids = dataset.read(first, min(length, SHOWN_CHARACTERS))[0].tolist()
        shown = repr(tokenizer.decode(ids)[:SHOWN_CHARACTERS]) if tokenizer else " ".join(map(str, ids[:20]))
        yield f"document {document} ({length:,} tokens): {shown}"


def run_verify(args: argparse.Namespace) -> int:
    """neox data verify. Raises DataError after the result is printed if anything is wrong."""
    results = [verify(prefix, args.vocab_size) for prefix in args.prefix]
    for result in results if not args.json else []:
        print(f"{result['prefix']}: {result['state']}")
    if args.json:
        print(orjson.dumps(results).decode())
    bad = [result for result in results if not result["ok"]]
    if bad:
        raise DataError("dataset is damaged", where=bad[0]["prefix"], got=bad[0]["state"], do="restore the file or preprocess the corpus again")
    return 0


def verify(prefix: str, vocab_size: int | None) -> dict[str, object]:
    """Check one dataset: structure, checksums where there is a sidecar, and ids if `vocab_size` is given."""
    try:
        dataset = IndexedDataset(prefix)
        damaged = dataset.verify()
        bad = None if vocab_size is None or damaged else dataset.find_bad_token(vocab_size)
    except DataError as error:
        return {"prefix": prefix, "ok": False, "state": error.line(), "damaged": []}
    if damaged:
        state = f"{len(damaged)} blocks of {dataset.bin_path} differ from their checksums, first bytes {damaged[0][0]} to {damaged[0][1]}"
    elif bad is not None:
        document, offset = dataset.locate(bad)
        state = f"id {dataset.read(bad, 1)[0][0]} in document {document} offset {offset} is outside a vocabulary of {vocab_size}"
    elif dataset.sidecar is None:
        state = "structure is whole; no sidecar, so no checksums to compare"
    else:
        state = "whole"
    return {"prefix": prefix, "ok": not damaged and bad is None, "state": state, "damaged": damaged}


def run_merge(args: argparse.Namespace) -> int:
    """neox data merge."""
    datasets = [IndexedDataset(prefix) for prefix in args.prefix]
    with IndexedWriter(args.out, datasets[0].dtype.name, overwrite=args.overwrite, **common_tokenizer(datasets, args.out)) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
    merged = IndexedDataset(args.out)
    result = {"out": args.out, "datasets": len(datasets), "documents": merged.num_documents, "tokens": merged.num_tokens, "dtype": merged.dtype.name}
    show(result, args.json)
    return 0


def common_tokenizer(datasets: Sequence[IndexedDataset], out: str) -> dict[str, object]:
    """What the sidecars say of the tokenizer, if all say the same; nothing if one does not say.

    Raises:
        DataError: two datasets were made with different tokenizers.
        ConfigError: the result would replace one of its inputs.
    """
    for dataset in datasets:
        if dataset.prefix == out:
            raise ConfigError("a dataset cannot be merged into itself", where="--out", got=out)
    known = [dataset for dataset in datasets if dataset.sidecar is not None and dataset.sidecar.tokenizer_hash is not None]
    for dataset in known[1:]:
        if dataset.sidecar.tokenizer_hash != known[0].sidecar.tokenizer_hash:
            got, want = f"tokenizer hash {dataset.sidecar.tokenizer_hash[:16]}", f"{known[0].sidecar.tokenizer_hash[:16]} as {known[0].prefix}"
            raise DataError("datasets were made with different tokenizers", where=dataset.prefix, got=got, want=want)
    if len(known) < len(datasets):
        return {}
    sidecar = known[0].sidecar
    return {"tokenizer_hash": sidecar.tokenizer_hash, "vocab_size": sidecar.vocab_size, "eod_id": sidecar.eod_id}
