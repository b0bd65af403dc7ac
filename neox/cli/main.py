"""Entry point `neox COMMAND ...`: imports the module of the command, runs it, and prints errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterable
from typing import NoReturn

from neox import __version__
from neox.errors import INSTALL, ConfigError, EnvironmentProblem, NeoxError, system_problem
from neox.printing import printable

# command -> (module with add_arguments(parser) and run(args) -> exit code, one-line summary)
COMMANDS = {
    "init": ("neox.cli.init", "write train.py and launch/slurm.sh into a folder"),
    "tokenizer": ("neox.cli.tokenizer", "train a tokenizer"),
    "preprocess": ("neox.cli.preprocess", "turn text into an indexed dataset (.bin, .idx)"),
    "data": ("neox.cli.data", "inspect, verify, merge or compare datasets; show which data a run has read"),
    "config": ("neox.cli.config", "show, explain, compare or convert configs"),
    "plan": ("neox.cli.plan", "predict memory and time of a run, and whether it fits"),
    "train": ("neox.cli.train", "train a model (train.py and the launchers run this)"),
    "generate": ("neox.cli.generate", "continue prompts with a trained model"),
    "evaluate": ("neox.cli.evaluate", "loss and bits per byte of a trained model on held-out data"),
    "export": ("neox.cli.export", "write a checkpoint as a Hugging Face model"),
    "import": ("neox.cli.importer", "convert a Hugging Face model or a checkpoint of GPT-NeoX to a checkpoint"),
    "checkpoint": ("neox.cli.checkpoint", "inspect, verify, hash or convert checkpoints"),
    "verify-resume": (
        "neox.cli.verify_resume",
        "train, kill, resume, and compare with an uninterrupted run, bit for bit",
    ),
    "report": ("neox.cli.report", "write an HTML page about runs"),
    "doctor": ("neox.cli.doctor", "check this machine and the installation"),
}


class CommandParser(argparse.ArgumentParser):
    """A parser that reports its errors like all other errors."""

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message, where=self.prog, do=f"{self.prog} --help")

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse arguments like argparse, but attribute an unknown option to the requested action.

        Raises:
            ConfigError: the arguments are invalid.
        """
        parsed, unknown = self.parse_known_args(args, namespace or argparse.Namespace())
        if unknown:
            self.prog = " ".join([self.prog, *filter(None, [getattr(parsed, "action", None)])])
            where, do = self.prog, f"{self.prog} --help"
            close = nearest_word(unknown[0].partition("=")[0], option_names(self.format_help()))
            raise ConfigError(
                f"unrecognized arguments: {' '.join(unknown)}",
                where=where,
                do=f"did you mean {close}? See {do}" if close else do,
            )
        return parsed


def option_names(help_text: str) -> list[str]:
    """Return the long options that a command's help mentions."""
    import re  # needed for this error only

    return re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text)


def nearest_word(word: str, known: Iterable[str]) -> str | None:
    """Return the option or command that an unknown one most likely means, or None."""
    import difflib  # needed for this error only

    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def usage() -> str:
    """Return the overview for `neox --help`."""
    lines = [
        "usage: neox [--debug] [--version] COMMAND ...",
        "",
        "Pre-training of GPT-style language models.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<15}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "See `neox COMMAND --help`. --debug prints the traceback of an error.",
        "example: neox config show 1-3B.yml --set train.seed=7",
    ]
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[str, argparse.ArgumentParser, list[str]]:
    """Import the module of the command and build its parser.

    Raises:
        ConfigError: there is no such command.
    """
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        close = nearest_word(name, COMMANDS)
        do = f"did you mean neox {close}?" if close else "neox --help"
        raise ConfigError("unknown command", where="argv", got=name, want=f"one of {', '.join(COMMANDS)}", do=do)
    module, summary = COMMANDS[name]
    command = importlib.import_module(module)
    parser = CommandParser(
        prog=f"neox {name}",
        description=command.__doc__ or summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    command.add_arguments(parser)
    parser.set_defaults(neox_run=command.run)
    return name, parser, rest


def report(error: NeoxError, debug: bool) -> int:
    """Print an error and return its exit code."""
    with contextlib.suppress(OSError):  # the terminal may have exited, its disk may be full
        if debug:
            traceback.print_exception(error)
        print(error.line(), file=sys.stderr, flush=True)
    return error.exit_code


def as_problem(error: Exception, command: str) -> NeoxError | None:
    """Convert an exception to an error for the user, such as a missing package. None if it is a bug."""
    if isinstance(error, NeoxError):
        return error
    # from a name on the command line or in a file
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        got, want = printable(error.object[max(error.start - 40, 0) : error.end + 40]), "text that UTF-8 can encode"
        return ConfigError(
            "a name or text has bytes that are not UTF-8",
            where=f"neox {command}",
            got=got,
            want=want,
            do="rename the file or folder",
        )
    if not isinstance(error, ImportError):
        return system_problem(error, f"neox {command}")
    if (error.name or "neox").startswith("neox"):
        return None
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentProblem("package is missing", where=f"neox {command}", got=error.name, do=INSTALL)
    return EnvironmentProblem(
        "package cannot be imported",
        where=f"neox {command}: {error.name}",
        got=str(error)[:300],
        do=f"neox doctor; {INSTALL}",
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or that of the error (docs/troubleshooting.md).

    An error that the user can act on is printed as one line. Anything else is a bug of neox, with a traceback.
    """
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if argv and argv[0] == "--debug":
        argv = argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names need not be UTF-8, and the terminal may support less.
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        leave_stdout()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        problem = as_problem(error, argv[0] if argv else "")
        if problem is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            leave_stdout()  # it may be full, and what is left in its buffer would fail again at the exit
        return code or report(problem, debug)  # a command that has failed has reported why


def run(argv: list[str]) -> int:
    """Print the overview or the version, or run a command. Return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"neox {__version__}")
        return 0
    _, parser, rest = parse(argv)
    args = parser.parse_args(rest)
    return args.neox_run(args)


def leave_stdout() -> None:
    """Discard further output after the reader of a pipe has exited (`| head`), or where its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_standard_streams() -> None:
    """Give a process that was started without standard input, output or error (`>&-`) empty ones.

    Otherwise the next files that it opens, such as a checkpoint, get their numbers, and libraries print into them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def command() -> NoReturn:
    """Run `main` and exit.

    os._exit skips the teardown of the interpreter (about 20 ms of a command that takes 100 ms). Only torch and worker
    processes, whose semaphores would be reported as leaked, need an orderly exit.
    """
    code: int | str | None = 0
    try:
        try:
            code = main()
        except SystemExit as end:  # --help
            code = end.code
        sys.stdout.flush()
    except OSError:  # after --help: the reader has exited, or the disk is full
        leave_stdout()
    if {"torch", "multiprocessing.synchronize"} & sys.modules.keys() or not isinstance(code, int):
        sys.exit(code)
    logging.shutdown()
    with contextlib.suppress(OSError):  # a full disk
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()
