"""Turn text into an indexed dataset: OUT.bin (tokens), OUT.idx (documents), OUT.json (what made it, checksums).

--input takes files and folders. .jsonl, .ndjson, .jl, .jsonlines and .json files hold one JSON object per line, and so does a file without a suffix
whose first line is one; any other file is one document. --format sets it for all. Each may be compressed (.gz, .zst, .bz2, .xz). From folders, files
of JSON lines (a plain .json is not taken) and .txt files are, unless --suffix names others; hidden ones are left out, and a file is read once.

--chat takes conversations instead, {"messages": [{"role": "user", "content": "..."}, ...]} per line, and also writes OUT_labels, which say what is to be
learned: what the assistant says. --chat --pairs takes {"chosen": [...], "rejected": [...]} and writes OUT_chosen and OUT_rejected with theirs.

example: neox preprocess --input corpus/ more.jsonl.zst --tokenizer tokenizer.json --out data/corpus --workers 8 --bad-lines skip
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from neox.data.text.chat import MESSAGES, PAIR, TEMPLATES, ChatEncoding, ChatSummary, find_template, preprocess_chat
from neox.data.text.encoding import Encoding
from neox.data.text.input_files import FOLDER_SUFFIXES, FORMS, find_files
from neox.data.text.preprocess import BAD_LINES, Summary, preprocess
from neox.errors import ConfigError
from neox.printing import json_line

LARGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=33554432:glibc.malloc.mmap_threshold=268435456"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files and folders to read, in this order")
    parser.add_argument("--suffix", action="append", metavar="S", help="files to take from folders, such as .py; may be repeated (default: .txt, JSON lines)")
    help_format = "how all files are read: jsonl, one JSON object per line; txt, one document per file (default: auto, by name and first line)"
    parser.add_argument("--format", choices=FORMS, default="auto", help=help_format)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="`tokenizers` JSON file")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="path of the dataset, without suffix")
    parser.add_argument("--json-key", metavar="KEY", help="key of the text in a JSON line (default: text; with --chat: messages)")
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with the end-of-document token")
    parser.add_argument("--eod-token", metavar="TOKEN", help="end-of-document token (default: found by name)")
    parser.add_argument(
        "--special-tokens",
        choices=("match", "text"),
        default="match",
        help="special tokens that occur in the text: match gives their ids, as upstream does; text encodes them as plain text (default: match)",
    )
    parser.add_argument("--chat", action="store_true", help="the input is conversations; make labels too")
    parser.add_argument("--pairs", action="store_true", help="with --chat: a chosen and a rejected conversation per line")
    help_template = f"Jinja file, or one of {', '.join(TEMPLATES)} (default: the one beside the tokenizer)"
    parser.add_argument("--chat-template", metavar="FILE", help=help_template)
    parser.add_argument("--last-only", action="store_true", help="with --chat: learn the last answer of the assistant only")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="threads that encode; 0: none but the one that reads (default: one per CPU)")
    help_bad = "a line that gives no document: fail stops, skip counts it, quarantine also keeps it in PREFIX.quarantine.jsonl (default: fail)"
    parser.add_argument("--bad-lines", choices=BAD_LINES, default="fail", help=help_bad)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--resume", action="store_true", help="go on where a run of the same input and options was ended; the result is the same")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Preprocess and print the summary."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy is loaded while threads encode; its own would spin for a tenth of a second on their processors
    os.environ.setdefault("GLIBC_TUNABLES", LARGE_PAGES)  # of the processes that this one starts: without it they fault pages in for a sixth of their time
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 0:
        raise ConfigError("bad number of workers", where="--workers", got=workers, want="0 or more")
    files = find_files(args.input, tuple(args.suffix or FOLDER_SUFFIXES))
    with progress_bar() as progress:
        options = {"workers": workers, "bad_lines": args.bad_lines, "overwrite": args.overwrite, "progress": progress}
        if args.chat:
            summary = preprocess_chat(files, args.out, chat_encoding(args), **options)
        else:
            summary = preprocess(files, args.out, text_encoding(args), resume=args.resume, **options)
    print(json_line(asdict(summary)) if args.json else report(summary))
    return 0


def text_encoding(args: argparse.Namespace) -> Encoding:
    """How plain text is encoded.

    Raises:
        ConfigError: options of --chat without it.
    """
    alone = [name for name in ("pairs", "last_only", "chat_template") if vars(args)[name]]
    if alone:
        raise ConfigError("option without --chat", where=f"--{alone[0].replace('_', '-')}", do="add --chat")
    return Encoding(args.tokenizer, args.eod_token, args.append_eod, args.json_key or "text", args.special_tokens == "text", args.format)


def chat_encoding(args: argparse.Namespace) -> ChatEncoding:
    """How conversations are encoded.

    Raises:
        ConfigError: an option that they don't have, or no template.
    """
    if args.resume or args.special_tokens == "text":
        raise ConfigError("option that conversations don't have", where="--resume" if args.resume else "--special-tokens text", do="leave it out with --chat")
    keys = PAIR if args.pairs else (args.json_key or MESSAGES[0],)
    return ChatEncoding(args.tokenizer, args.eod_token, find_template(args.chat_template, args.tokenizer), keys, args.append_eod, args.last_only, args.format)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Summary], None] | None]:
    """A function that shows a summary on the terminal; None where there is none."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # takes as long to import as the rest of this command
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda summary: live.update(Text(progress_line(summary)), refresh=True)


def progress_line(summary: Summary) -> str:
    """What a terminal shows while it runs."""
    rate = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    bad = f", {summary.bad_lines:,} bad" if summary.bad_lines else ""
    return f"{summary.documents:,} documents, {summary.tokens:,} tokens, {summary.text_bytes / 1e6:,.0f} MB ({rate:.1f} MB/s){bad}"


def report(summary: Summary) -> str:
    """The summary as text."""
    rate = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    lines = [
        f"{summary.out}: {summary.documents:,} documents, {summary.tokens:,} tokens ({summary.dtype}) from {summary.files:,} files",
        f"{summary.text_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s: {rate:.1f} MB/s, encoder: {summary.encoder}",
        f"left out: {summary.bad_lines:,} bad, {summary.blank_lines:,} blank, {summary.empty_documents:,} empty",
    ]
    if isinstance(summary, ChatSummary):
        lines.append(f"learned: {summary.learned:,} of {summary.tokens:,} tokens")
    lines += [f"  {count:,} x {reason}" for reason, count in sorted(summary.bad_reasons.items())]
    lines += [f"  {example['where']}: {example['reason']}" for example in summary.bad_examples]
    if summary.quarantine:
        lines.append(f"bad lines are kept in {summary.quarantine}")
    return "\n".join(lines)
