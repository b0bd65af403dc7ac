"""Turn text into an indexed dataset: OUT.bin (tokens), OUT.idx (documents), OUT.json (provenance and checksums).

--input takes files and folders. Files ending in .jsonl, .ndjson, .jl, .jsonlines or .json hold one JSON object per
line; so does a file without a suffix whose first line is one. Any other file is one document. --format overrides this
for all files. Each file may be compressed (.gz, .zst, .bz2, .xz). From folders, JSON lines (but not .json without
compression) and .txt files are taken, unless --suffix names others. Hidden files are left out, and each file is read
once.

--chat reads conversations instead, {"messages": [{"role": "user", "content": "..."}, ...]} per line, and also writes
OUT_labels: only the answers of the assistant are learned. --chat --pairs reads {"chosen": [...], "rejected": [...]} and
writes OUT_chosen and OUT_rejected, each with its labels.

example: neox preprocess --input corpus/ more.jsonl.zst --tokenizer tokenizer.json --out data/corpus --bad-lines skip
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from neox.cli.options import require_at_least
from neox.data.text.chat import MESSAGES, PAIR, TEMPLATES, ChatEncoding, ChatSummary, find_template, preprocess_chat
from neox.data.text.encoding import BOS_NAMES, Encoding
from neox.data.text.input_files import FOLDER_SUFFIXES, FORMS, find_files
from neox.data.text.preprocess import BAD_LINES, Options, Summary, preprocess
from neox.data.text.tokenizer import EOD_NAMES
from neox.errors import ConfigError
from neox.printing import counted, json_line

# Arguments of glibc's allocator for worker processes. Without them a sixth of the time of a worker is page faults.
LARGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=33554432:glibc.malloc.mmap_threshold=268435456"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files and folders to read, in this order"
    )
    help_suffix = "suffix of files to take from folders, such as .py; may be repeated (default: .txt and JSON lines)"
    parser.add_argument("--suffix", action="append", metavar="S", help=help_suffix)
    help_format = (
        "how to read all files: jsonl, one JSON object per line; txt, one document per file (default: auto, by name "
        "and first line)"
    )
    parser.add_argument("--format", choices=FORMS, default="auto", help=help_format)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="`tokenizers` JSON file")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="path of the dataset, without suffix")
    parser.add_argument(
        "--json-key", metavar="KEY", help="key of the text in a JSON line (default: text; with --chat: messages)"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token",
    )
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help=f"end-of-document token (default: the first of {', '.join(EOD_NAMES)})"
    )
    help_bos = "begin each document with the beginning-of-sequence token, as Llama's tokenizer does (default: no)"
    parser.add_argument("--prepend-bos", action=argparse.BooleanOptionalAction, default=False, help=help_bos)
    parser.add_argument(
        "--bos-token",
        metavar="TOKEN",
        help=f"beginning-of-sequence token (default: the first of {', '.join(BOS_NAMES)})",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("match", "text"),
        default="match",
        help="special tokens in the text: match encodes them as their ids, as GPT-NeoX does; text encodes them as "
        "text (default: match)",
    )
    add_chat_arguments(parser)
    help_workers = "threads that encode; 0 encodes in the thread that reads (default: one per CPU)"
    parser.add_argument("--workers", type=int, default=None, metavar="N", help=help_workers)
    help_bad = (
        "lines that give no document: fail stops, skip counts them, quarantine also stores them in "
        "PREFIX.quarantine.jsonl (default: fail)"
    )
    parser.add_argument("--bad-lines", choices=BAD_LINES, default="fail", help=help_bad)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    help_resume = "continue an interrupted run with the same input and options; the result is the same"
    parser.add_argument("--resume", action="store_true", help=help_resume)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options for conversations."""
    parser.add_argument("--chat", action="store_true", help="read conversations, and write labels too")
    parser.add_argument(
        "--pairs", action="store_true", help="with --chat: a chosen and a rejected conversation per line"
    )
    help_template = f"Jinja file, or one of {', '.join(TEMPLATES)} (default: the template next to the tokenizer)"
    parser.add_argument("--chat-template", metavar="FILE", help=help_template)
    parser.add_argument(
        "--last-only", action="store_true", help="with --chat: learn only the last answer of the assistant"
    )


def run(args: argparse.Namespace) -> int:
    """Preprocess and print the summary."""
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    require_at_least(args, 0, "workers")
    files = find_files(args.input, tuple(args.suffix or FOLDER_SUFFIXES))
    with large_pages(), progress_bar() as progress:
        options = Options(workers, args.bad_lines, args.overwrite, args.resume)
        if args.chat:
            summary = preprocess_chat(files, args.out, chat_encoding(args), options, progress)
        else:
            summary = preprocess(files, args.out, text_encoding(args), options, progress)
    print(json_line(asdict(summary)) if args.json else report(summary))
    return 0


@contextlib.contextmanager
def large_pages() -> Iterator[None]:
    """Set LARGE_PAGES for the processes that are started inside, unless the user has set arguments."""
    if "GLIBC_TUNABLES" in os.environ:
        yield
        return
    os.environ["GLIBC_TUNABLES"] = LARGE_PAGES
    try:
        yield
    finally:
        del os.environ["GLIBC_TUNABLES"]


def text_encoding(args: argparse.Namespace) -> Encoding:
    """The encoding of text.

    Raises:
        ConfigError: an option needs another one that is missing.
    """
    alone = [name for name in ("pairs", "last_only", "chat_template") if vars(args)[name]]
    if alone:
        raise ConfigError("option needs --chat", where=f"--{alone[0].replace('_', '-')}", do="add --chat")
    if args.bos_token is not None and not args.prepend_bos:
        raise ConfigError("option needs --prepend-bos", where="--bos-token", do="add --prepend-bos")
    return Encoding(
        tokenizer=args.tokenizer,
        eod_token=args.eod_token,
        append_eod=args.append_eod,
        json_key="text" if args.json_key is None else args.json_key,
        specials_as_text=args.special_tokens == "text",
        form=args.format,
        prepend_bos=args.prepend_bos,
        bos_token=args.bos_token,
    )


def chat_encoding(args: argparse.Namespace) -> ChatEncoding:
    """The encoding of conversations.

    Raises:
        ConfigError: an option does not apply to conversations, or there is no template.
    """
    given = {
        "--resume": args.resume,
        "--special-tokens text": args.special_tokens == "text",
        "--prepend-bos": args.prepend_bos,
        "--bos-token": args.bos_token,
    }
    excluded = [name for name, value in given.items() if value]
    if excluded:
        raise ConfigError(
            "option does not apply to conversations",
            where=excluded[0],
            do="leave it out" + ("" if args.resume else ", because the chat template adds the special tokens"),
        )
    keys = PAIR if args.pairs else (MESSAGES[0] if args.json_key is None else args.json_key,)
    return ChatEncoding(
        args.tokenizer,
        args.eod_token,
        find_template(args.chat_template, args.tokenizer),
        keys,
        args.append_eod,
        args.last_only,
        args.format,
    )


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Summary], None] | None]:
    """A function that shows a summary on the terminal; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # takes 0.1 s to import, and only a terminal needs it
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda summary: live.update(Text(progress_line(summary)), refresh=True)


def progress_line(summary: Summary) -> str:
    """The line that a terminal shows during the run."""
    rate = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    bad = f", {summary.bad_lines:,} bad" if summary.bad_lines else ""
    return (
        f"{counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')}, "
        f"{summary.text_bytes / 1e6:,.0f} MB ({rate:.1f} MB/s){bad}"
    )


def report(summary: Summary) -> str:
    """The summary as text."""
    rate = summary.text_bytes / 1e6 / max(summary.seconds, 1e-9)
    lines = [
        f"{summary.out}: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')} "
        f"({summary.dtype}) from {counted(summary.files, 'file')}",
        f"{summary.text_bytes / 1e6:,.1f} MB in {summary.seconds:.1f} s: {rate:.1f} MB/s, encoder: {summary.encoder}",
        f"left out: {summary.bad_lines:,} bad, {summary.blank_lines:,} blank, {summary.empty_documents:,} empty",
    ]
    if isinstance(summary, ChatSummary):
        lines.append(f"learned: {summary.learned:,} of {counted(summary.tokens, 'token')}")
    lines += [f"  {count:,} x {reason}" for reason, count in sorted(summary.bad_reasons.items())]
    lines += [f"  {example['where']}: {example['reason']}" for example in summary.bad_examples]
    if summary.quarantine:
        lines.append(f"bad lines are stored in {summary.quarantine}")
    return "\n".join(lines)
