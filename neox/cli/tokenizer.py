"""Train a byte-level BPE tokenizer on text.

It encodes every text without loss and has the end-of-document token <|endoftext|>.

example: neox tokenizer train --input corpus/ --suffix .py --vocab-size 8192 --out tokenizer.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from neox.data.text.input_files import FOLDER_SUFFIXES, FORMS, find_files
from neox.data.text.reading import BadLine, bad_line_error, parse, read_blocks
from neox.data.text.tokenizer import EOD_NAMES, train_tokenizer
from neox.errors import DataError
from neox.printing import counted, json_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser(
        "train", help="train a tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    train.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files and folders to read (as in neox preprocess)"
    )
    train.add_argument(
        "--suffix",
        action="append",
        metavar="S",
        help="suffix of files to take from folders; may be repeated (default: JSON lines and .txt)",
    )
    train.add_argument(
        "--format", choices=FORMS, default="auto", help="how to read all files, as in neox preprocess (default: auto)"
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="number of ids, including the 256 bytes and the end-of-document token",
    )
    train.add_argument("--out", required=True, metavar="FILE", help="`tokenizers` JSON file to write")
    train.add_argument(
        "--eod-token", default=EOD_NAMES[0], metavar="TOKEN", help="end-of-document token (default: <|endoftext|>)"
    )
    help_special = "another token that is never split, such as <|fim_prefix|>; may be repeated"
    train.add_argument("--special-token", action="append", default=[], metavar="TOKEN", help=help_special)
    train.add_argument(
        "--json-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)"
    )
    help_bad = "lines that give no document: fail stops, skip leaves them out (default: fail)"
    train.add_argument("--bad-lines", choices=("fail", "skip"), default="fail", help=help_bad)
    train.add_argument(
        "--overwrite", action="store_true", help="replace an existing file; datasets built with it no longer match"
    )
    train.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train a tokenizer and print the result."""
    if os.path.lexists(args.out) and not args.overwrite:
        raise DataError("tokenizer already exists", where=args.out, do="choose another --out, or pass --overwrite")
    files = find_files(args.input, tuple(args.suffix or FOLDER_SUFFIXES))
    texts = documents(files, args.json_key, args.bad_lines, args.format)
    tokenizer = train_tokenizer(
        texts,
        args.vocab_size,
        args.out,
        eod_token=args.eod_token,
        special_tokens=args.special_token,
        show_progress=sys.stderr.isatty(),
    )
    result = {
        "out": args.out,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "hash": tokenizer.hash,
        "files": len(files),
    }
    if args.json:
        print(json_line(result))
    else:
        print(
            f"{args.out}: {tokenizer.vocab_size:,} tokens from {counted(len(files), 'file')}, {tokenizer.eod_token} is "
            f"{tokenizer.eod_id}"
        )
        if tokenizer.vocab_size < args.vocab_size:
            print(f"the text gave only {tokenizer.vocab_size:,} of the {args.vocab_size:,} requested tokens")
    return 0


def documents(files: Sequence[str], key: str, bad_lines: str, form: str = "auto") -> Iterator[str]:
    """The documents of the files.

    Raises:
        DataError: a bad line under "fail".
    """
    for block in read_blocks(files, form=form):
        for item in block:
            if isinstance(item, BadLine):
                bad = [item]
            else:
                parsed = parse(item, key)
                yield from parsed.texts
                bad = parsed.bad
            if bad and bad_lines == "fail":
                raise bad_line_error(bad[0], "skip")
