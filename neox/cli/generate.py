"""`neox generate`: continue prompts from the command line or a file, generate unconditionally, or hold a dialogue."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.reader import Checkpoint
from neox.cli.layout import add_layout_arguments, join_layout
from neox.cli.options import require_at_least
from neox.config.load import loads
from neox.config.schema import ModelConfig
from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError, DiskError, StoppedBySignal
from neox.evaluate.scoring import truncate
from neox.files import LARGEST_FILE, read_text
from neox.generate.generate import check_prompts, generate, load_model
from neox.generate.prompts import AnswerText, TextStream, encode_prompt
from neox.generate.sampling import SamplingParams
from neox.generate.session import Session
from neox.model.dtypes import DTYPES
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.printing import printable
from neox.runtime.signals import StopSignals

EXAMPLE = """example:
  neox generate --checkpoint runs/demo/run --prompt "def main():" --max-new-tokens 100 --temperature 0.8 --top-p 0.95
  neox generate --checkpoint runs/demo/run --prompt-file prompts.txt --temperature 0 --jsonl --out answers.jsonl
  neox generate --checkpoint runs/demo/run --unconditional 10
  neox generate --checkpoint runs/demo/run --interactive --stop "\\n"
  torchrun --nproc-per-node 4 -m neox.cli.main generate --checkpoint runs/big --prompt "Once" --tensor 2 --pipeline 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `neox generate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--checkpoint", required=True, help="run folder (its newest checkpoint), or one checkpoint folder"
    )
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be repeated")
    parser.add_argument(
        "--prompt-file",
        help="UTF-8 file with one prompt per line; only \\n and \\r\\n end a line; empty lines are left out",
    )
    parser.add_argument(
        "--unconditional", type=int, metavar="N", help="N texts that start after the end-of-document token"
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="answer each input line, with the dialogue as context; /reset clears it, /quit exits",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text (\\n is a line feed); may be repeated",
    )
    parser.add_argument(
        "--no-bos", action="store_true", help="omit the tokens that the tokenizer adds to a text, such as a leading <s>"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per batch (default 8)")
    parser.add_argument("--tokenizer", help="tokenizer file; default: tokenizer.file of the run")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="maximum number of new tokens per prompt (default 64)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 selects the most likely token (default 1)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens with this total probability")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sampling (default 1234)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the weights (default fp32)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if available)",
    )
    add_layout_arguments(parser)
    parser.add_argument(
        "--no-cache", action="store_true", help="recompute all tokens in every step (slow; to verify the cache)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list of {prompt, text, tokens}")
    parser.add_argument("--jsonl", action="store_true", help="print one such object per line, batch by batch")
    parser.add_argument("--out", metavar="FILE", help="write to FILE instead of the terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")


def usable_device(name: str) -> str:
    """Return the device if it can be used.

    Raises:
        ConfigError: torch does not know the device, or this machine does not have it.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "device cannot be used",
            where="--device",
            got=f"{name}: {reason}",
            want="cpu, or cuda on a machine with a GPU",
        ) from error
    return name


def run_tokenizer(checkpoint: Path, file: str | None) -> Tokenizer:
    """Return the tokenizer of a file or, without one, the tokenizer of the run.

    A note on stderr reports a tokenizer other than the one that the training data was encoded with.

    Raises:
        ConfigError: neither exists, or the file has more ids than the model.
    """
    stored = Checkpoint(checkpoint)
    config = loads(stored.config_lock)
    section = config.tokenizer
    ends = () if section.special_ids is None else section.special_ids.ends()
    if file is not None:
        tokenizer = Tokenizer(file, end_ids=ends)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                "tokenizer ids exceed the vocabulary of the model",
                where=f"--tokenizer {file}",
                got=tokenizer.vocab_size,
                want=f"at most {config.model.vocab_size}",
                do="pass the tokenizer that the model was trained with",
            )
        note_other_tokenizer(stored, tokenizer)
        return tokenizer
    if section.file is None:
        raise ConfigError("the run has no tokenizer", where=f"{checkpoint}: tokenizer.file", do="pass --tokenizer FILE")
    if not Path(section.file).is_file():
        raise ConfigError(
            "tokenizer of the run is missing",
            where=f"{checkpoint}: tokenizer.file",
            got=section.file,
            do="start in the working folder of the run, or pass --tokenizer FILE",
        )
    tokenizer = Tokenizer(section.file, section.eod_token, end_ids=ends)
    note_other_tokenizer(stored, tokenizer)
    return tokenizer


def note_other_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Report on stderr if the training data was encoded with another tokenizer: ids may mean other tokens."""
    data = checkpoint.state.get("data")
    settings = data.get("settings") if isinstance(data, dict) else None
    trained = settings.get("tokenizer.file") if isinstance(settings, dict) else None
    if trained not in (None, tokenizer.hash) and os.environ.get("RANK", "0") == "0":
        file = printable(tokenizer.file)
        print(f"note: {file} is not the tokenizer of the training data: its ids may mean other tokens", file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line and of the prompt file.

    Raises:
        ConfigError: there are none, or the file cannot be read.
    """
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            # Not splitlines, which would split at U+2028 and form feeds.
            lines = read_text(args.prompt_file, LARGEST_FILE).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                "cannot read the prompts",
                where=args.prompt_file,
                got=reason,
                want="a UTF-8 text file, one prompt per line",
            ) from error
        refuse_json_lines(args.prompt_file, lines)
        prompts += [line for line in lines if line]
    if not prompts:
        raise ConfigError(
            "no prompt",
            where="neox generate",
            want="--prompt TEXT, --prompt-file FILE, --unconditional N or --interactive",
        )
    return prompts


def refuse_json_lines(name: str, lines: list[str]) -> None:
    """Refuse a file of JSON objects by its suffix: each line would become a prompt with its braces and quotes.

    Raises:
        ConfigError: the name ends in .jsonl, .ndjson or .json, and the first line is an object.
    """
    if Path(name).suffix.lower() in (".jsonl", ".ndjson", ".json") and lines[0].lstrip().startswith("{"):
        raise ConfigError(
            "the prompts are JSON",
            where=f"--prompt-file {name}",
            got=lines[0][:80],
            want="a text file, one prompt per line",
            do="write the prompts alone, such as with jq -r .prompt",
        )


class Writer:
    """Generates and writes texts. A signal stops it after the current token; texts of completed batches are written.

    Args:
        args: arguments of the command line.
        source: model, tokenizer and sampling parameters.
        out: file to write to.
        signals: checked after every token.
    """

    def __init__(
        self, args: argparse.Namespace, source: tuple[GPT, Tokenizer, SamplingParams], out: TextIO, signals: StopSignals
    ):
        self.args = args
        self.model, self.tokenizer, self.params = source
        self.out = out
        self.signals = signals
        self.stops = [stop.replace("\\n", "\n") for stop in args.stop]
        self.written, self.total = 0, 0

    def write(self, prompts: list[str], encoded: list[list[int]]) -> None:
        """Continue all prompts.

        Raises:
            StoppedBySignal: a signal arrived.
        """
        self.total = len(prompts)
        if len(prompts) > 1 or self.args.json or self.args.jsonl:
            self._write_all(self._answers(prompts, encoded))
        elif self.stops:  # printed only after the end of the text is known
            print(prompts[0] + next(self._answers(prompts, encoded))["text"], file=self.out)
        else:
            self._stream(prompts[0], encoded[0])

    def _check_signals(self) -> None:
        received = self.signals.received
        if received is not None:
            got = f"{received.name}; {self.written} of {self.total} texts are written"
            raise StoppedBySignal("generation stopped by a signal", where=self.args.out or "standard output", got=got)

    def _answers(self, prompts: list[str], encoded: list[list[int]]) -> Iterator[dict]:
        """Yield {prompt, text, tokens} of each prompt, in order. The tokens do not depend on the batch."""
        for start in range(0, len(prompts), self.args.batch_size):
            batch = encoded[start : start + self.args.batch_size]
            texts = [AnswerText(self.tokenizer, prompt) for prompt in batch]
            is_done = (
                (lambda row, tokens, texts=texts: truncate(texts[row].decode(tokens), self.stops)[1])
                if self.stops
                else None
            )
            rows = generate(
                self.model,
                batch,
                self.params,
                **self._options(),
                is_done=is_done,
                streams=range(start, start + len(batch)),
                on_token=lambda *_: self._check_signals(),
            )
            for prompt, text, tokens in zip(prompts[start : start + len(batch)], texts, rows, strict=True):
                yield {"prompt": prompt, "text": truncate(text.decode(tokens), self.stops)[0], "tokens": tokens}

    def _options(self) -> dict:
        return {"eod_id": self.tokenizer.end_ids, "use_cache": not self.args.no_cache}

    def _write_all(self, rows: Iterator[dict]) -> None:
        """Write texts, a JSON list, or JSON lines."""
        listed, stopped = [], None
        try:
            for row in rows:
                if self.args.json:
                    listed.append(row)
                else:
                    line = (
                        json.dumps(row, ensure_ascii=False) if self.args.jsonl else f"--- {row['prompt']}{row['text']}"
                    )
                    print(line, file=self.out, flush=self.args.jsonl)
                self.written += 1
        except StoppedBySignal as signal:  # after any other error the list is not written
            stopped = signal
        if self.args.json:
            print(json.dumps(listed, ensure_ascii=False), file=self.out)
        if stopped is not None:
            raise stopped

    def _stream(self, prompt: str, encoded: list[int]) -> None:
        """Print one text while it is generated."""
        self.out.write(prompt)
        printer = TextStream(self.tokenizer, lambda text: (self.out.write(text), self.out.flush()), encoded)

        def on_token(_: int, token: int) -> None:
            printer.add(token)
            self._check_signals()

        try:
            generate(self.model, [encoded], self.params, **self._options(), on_token=on_token)
        finally:
            print(file=self.out)


def run(args: argparse.Namespace) -> int:
    """Generate and print. Return the exit code.

    Raises:
        StoppedBySignal: a signal arrived; the texts of all completed batches are written. A dialogue stops at an
            interrupt.
    """
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    require_at_least(args, 1, "unconditional", "batch_size")
    modes = [bool(args.prompt or args.prompt_file), args.unconditional is not None, args.interactive]
    if sum(modes) > 1:
        raise ConfigError(
            "conflicting options",
            where="neox generate",
            want="exactly one of --prompt (or --prompt-file), --unconditional, --interactive",
        )
    refuse_unused(args)
    if args.out is not None:
        check_output(args.out, overwrite=args.overwrite)  # before minutes of generation
    prompts = [] if args.interactive else [""] * args.unconditional if args.unconditional else read_prompts(args)
    # an interrupt raises KeyboardInterrupt while it waits for a line
    with contextlib.nullcontext(None) if args.interactive else StopSignals() as signals:
        usable_device(args.device)
        checkpoint = resolve(args.checkpoint)
        tokenizer = run_tokenizer(checkpoint, args.tokenizer)
        config = ModelConfig(**Checkpoint(checkpoint).model_config)
        encoded = [
            first_tokens(tokenizer, bos=not args.no_bos)
            if args.unconditional
            else encode_prompt(tokenizer, prompt, bos=not args.no_bos)
            for prompt in prompts
        ]
        check_prompts(config, encoded, params)  # before the model is loaded
        mesh = join_or_stop(args, config, signals)
        model = load_model(checkpoint, dtype=DTYPES[args.dtype], mesh=mesh)
        if signals is None:
            if mesh.world_size > 1:
                got = f"{mesh.world_size} processes"
                raise ConfigError(
                    "a dialogue runs on one process",
                    where="--interactive, --tensor, --pipeline",
                    got=got,
                    want="one process",
                )
            return converse(
                Session(
                    model, tokenizer, params, [stop.replace("\\n", "\n") for stop in args.stop], bos=not args.no_bos
                )
            )
        name = args.out if mesh.rank == 0 else os.devnull  # every process has the texts; one writes them
        with contextlib.nullcontext(sys.stdout) if name is None else open_output(name) as out:
            Writer(args, (model, tokenizer, params), out, signals).write(prompts, encoded)
    return 0


def refuse_unused(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: an option does not apply to a dialogue, or two formats are given.
    """
    given = [f"--{name}" for name in ("json", "jsonl", "out") if vars(args)[name]]
    if args.interactive and given:
        raise ConfigError("option does not apply to a dialogue", where=given[0], do="omit it, or omit --interactive")
    if args.overwrite and not args.out:
        raise ConfigError("option has no effect", where="--overwrite", want="--out FILE", do="omit it")
    if args.json and args.jsonl:
        raise ConfigError("conflicting options", where="neox generate", want="--json or --jsonl")


def join_or_stop(args: argparse.Namespace, config: ModelConfig, signals: StopSignals | None) -> Mesh:
    """Call `join_layout`, and exit on a signal: while this process waits for the others, nothing has been written."""

    def stop(received: signal.Signals) -> None:  # called on a thread, because the main thread is in torch
        error = StoppedBySignal(
            "stopped by a signal before all processes joined",
            where="neox generate",
            got=received.name,
            do="start again",
        )
        with contextlib.suppress(OSError):  # stderr may be closed
            print(error.line(), file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    if signals is None or args.tensor * args.pipeline == 1:
        return join_layout(args, config)
    signals.end_at_once(stop)
    try:
        return join_layout(args, config)
    finally:
        signals.end_at_once(None)


def first_tokens(tokenizer: Tokenizer, *, bos: bool = True) -> list[int]:
    """Return the tokens before a text without a prompt: those that the tokenizer adds, else end-of-document.

    Raises:
        ConfigError: the tokenizer has no end-of-document token.
    """
    if bos and tokenizer.template_tokens[0]:
        return list(tokenizer.template_tokens[0])
    if tokenizer.eod_id is None:
        raise ConfigError(
            "no start token",
            where=tokenizer.file,
            want="an end-of-document token",
            do="pass --prompt, or set tokenizer.eod_token",
        )
    return [tokenizer.eod_id]


def check_output(name: str, *, overwrite: bool) -> None:
    """Check that a file can be created, and that it would not replace one that has content.

    Raises:
        ConfigError: the file exists.
        DiskError: the folder is missing or cannot be written.
    """
    path = Path(name)
    if path.is_file() and path.stat().st_size and not overwrite:
        raise ConfigError("file already exists", where=f"--out {name}", do="choose another --out, or pass --overwrite")
    folder = path.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)) and not path.exists():
        got = f"{folder} cannot be written" if folder.is_dir() else f"{folder} does not exist"
        raise DiskError("cannot write the texts", where=name, got=got, do="choose another --out")


@contextlib.contextmanager
def open_output(name: str) -> Iterator[TextIO]:
    """Open a file for writing, for the body of a `with`.

    Raises:
        DiskError: the file cannot be created or written.
    """
    try:
        with open(name, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise DiskError("cannot write the texts", where=name, got=error.strerror, do="choose another --out") from error


def converse(session: Session) -> int:
    """Answer input lines until /quit or the end of the input.

    Raises:
        ConfigError: the input is not UTF-8.
    """
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            got = f"byte {error.object[error.start]:#04x}"
            raise ConfigError("input is not UTF-8", where="standard input", got=got, want="text in UTF-8") from error
        if not line or line.strip() == "/quit":
            return 0
        if line.strip() == "/reset":
            session.reset()
            continue
        session.respond(line, lambda text: (sys.stdout.write(text), sys.stdout.flush()))
        print(flush=True)
