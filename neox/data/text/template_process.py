"""The process that renders a chat template, from the side that asks. A template that loops ends it, and not this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from neox.errors import ConfigError, EnvironmentProblem

ROOT = str(Path(__file__).resolve().parents[3])  # where this package is, of an editable installation too
LENGTH = struct.Struct("<Q")  # bytes of the message that follows
START = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from neox.data.text.chat_template import serve; serve()"
MOST_ENDED = 3  # conversations in a row that may end the process

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class RefusedConversation(Exception):
    """A conversation that the template does not render; the message says why."""


def send(stream: BinaryIO, message: Any) -> None:
    """Write a JSON value and its length. A lone surrogate is escaped. Raises OSError, RecursionError."""
    content = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[Any, int] | None:
    """What `send` wrote, and its bytes; None: the other side is gone."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    content = stream.read(*LENGTH.unpack(head))
    return (json.loads(content), len(content)) if len(content) == LENGTH.unpack(head)[0] else None


class TemplateProcess:
    """Renders conversations by a chat template. A context manager; what `answers` gives is in the order of the calls.

    Args:
        text: the template (Jinja). special_tokens: names that it may use for them, and their texts.

    Raises:
        ConfigError: the template cannot be compiled. EnvironmentProblem: no process can be started.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]):
        self._start = [text, special_tokens]
        self._ended = 0
        self._process = self._started()

    def _started(self) -> subprocess.Popen:
        command = [sys.executable, "-I", "-S", "-c", START, os.pathsep.join([ROOT, *sys.path])]
        try:
            # in a session of its own, since Ctrl-C is for the parent, with which it ends
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(command, start_new_session=True, **pipes)
        except OSError as error:
            raise EnvironmentProblem("cannot start a process for the chat template", where="--chat-template", got=error.strerror) from error
        with contextlib.suppress(OSError):  # it has ended: `receive` finds that
            send(process.stdin, self._start)
        found = receive(process.stdout)
        if found is None or found[0] is not None:
            reason = how_it_ended(process) if found is None else found[0]
            end(process)
            raise ConfigError("chat template cannot be used", where="--chat-template", got=reason, want="a Jinja template as transformers takes it")
        return process

    def render_with_answers(self, messages: Messages, more: dict[str, Any]) -> tuple[str, list[Span]]:
        """The text of a conversation and where in it the assistant speaks; see `Template.answers`.

        Raises:
            RefusedConversation: the template fails, takes too long, or takes too much memory.
            ConfigError: it has ended its process for several conversations in a row.
        """
        try:
            send(self._process.stdin, [messages, more])
            found = receive(self._process.stdout)
        except RecursionError:
            raise RefusedConversation("messages are nested too deeply") from None
        except OSError:
            found = None
        if found is None:
            return self._failed()
        self._ended = 0
        if "refused" in found[0]:
            raise RefusedConversation(found[0]["refused"])
        return found[0]["text"], [tuple(span) for span in found[0]["spans"]]

    def _failed(self) -> tuple[str, list[Span]]:
        reason = how_it_ended(self._process)
        end(self._process)
        self._ended += 1
        if self._ended == MOST_ENDED:
            raise ConfigError("chat template cannot be used", where="--chat-template", got=f"{reason}, for {MOST_ENDED} conversations in a row")
        self._process = self._started()
        raise RefusedConversation(f"chat template {reason}")

    def close(self) -> None:
        """End the process."""
        end(self._process)

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def how_it_ended(process: subprocess.Popen) -> str:
    """Why a process that no longer answers has ended."""
    code = process.wait()
    if code in (-signal.SIGXCPU, -signal.SIGKILL):  # SIGKILL: at the hard limit
        return "takes too long"
    return f"ended its process (signal {-code})" if code < 0 else f"ended its process (exit code {code})"


def end(process: subprocess.Popen) -> None:
    """End a process and close its pipes."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()
    process.wait()
