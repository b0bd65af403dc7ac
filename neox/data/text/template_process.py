"""Client of the process that renders a chat template. A template that loops ends that process and not this one."""

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
from typing import BinaryIO, cast

from neox.errors import ConfigError, EnvironmentProblem
from neox.files import JsonObject, JsonValue

ROOT = str(Path(__file__).resolve().parents[3])  # folder of this package, also in an editable installation
LENGTH = struct.Struct("<Q")  # bytes of the next message
START = (
    "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from neox.data.text.chat_template import serve; "
    "serve()"
)
MAX_ENDED = 3  # consecutive conversations that may end the process

Messages = list[JsonObject]
Span = tuple[int, int]


class RefusedConversation(Exception):
    """A conversation that the template does not render. The message is the reason."""


def send(stream: BinaryIO, message: object) -> None:
    """Write the length of a JSON value, and the value with lone surrogates escaped.

    Raises:
        OSError, RecursionError: it cannot be written.
    """
    content = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[JsonValue, int] | None:
    """The next message of `send` and its bytes; None if the other side has exited."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    content = stream.read(*LENGTH.unpack(head))
    return (json.loads(content), len(content)) if len(content) == LENGTH.unpack(head)[0] else None


class TemplateProcess:
    """Renders conversations by a chat template. A context manager.

    Args:
        text: the template (Jinja).
        special_tokens: name in the template -> text of a special token.

    Raises:
        ConfigError: the template cannot be compiled.
        EnvironmentProblem: no process can be started.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]):
        self._start = [text, special_tokens]
        self._ended = 0
        self._process = self._started()

    def _started(self) -> subprocess.Popen:
        command = [sys.executable, "-I", "-S", "-c", START, os.pathsep.join([ROOT, *sys.path])]
        try:
            # in a new session, so that Ctrl-C reaches only the parent; the process ends with its parent
            process = subprocess.Popen(
                command,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise EnvironmentProblem(
                "cannot start a process for the chat template", where="--chat-template", got=error.strerror
            ) from error
        with contextlib.suppress(OSError):  # it has exited, which `receive` detects
            send(pipes(process)[0], self._start)
        found = receive(pipes(process)[1])
        if found is None or found[0] is not None:
            reason = how_it_ended(process) if found is None else found[0]
            end(process)
            raise ConfigError(
                "chat template cannot be used",
                where="--chat-template",
                got=reason,
                want="a Jinja template that transformers accepts",
            )
        return process

    def render_with_answers(self, messages: Messages, more: JsonObject) -> tuple[str, list[Span]]:
        """Render a conversation and locate the answers of the assistant; see `Template.render_with_answers`.

        Raises:
            RefusedConversation: the template fails, takes too long, or takes too much memory.
            ConfigError: the template ended its process for several consecutive conversations.
        """
        try:
            requests, answers = pipes(self._process)
            send(requests, [messages, more])
            found = receive(answers)
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
        if self._ended == MAX_ENDED:
            raise ConfigError(
                "chat template cannot be used",
                where="--chat-template",
                got=f"{reason}, for {MAX_ENDED} consecutive conversations",
            )
        self._process = self._started()
        raise RefusedConversation(f"chat template {reason}")

    def close(self) -> None:
        """End the process."""
        end(self._process)

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pipes(process: subprocess.Popen) -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output of a process that was started with pipes."""
    return cast("BinaryIO", process.stdin), cast("BinaryIO", process.stdout)


def how_it_ended(process: subprocess.Popen) -> str:
    """Why a process has exited."""
    code = process.wait()
    if code in (-signal.SIGXCPU, -signal.SIGKILL):  # SIGKILL at the hard limit
        return "takes too long"
    return f"ended its process (signal {-code})" if code < 0 else f"ended its process (exit code {code})"


def end(process: subprocess.Popen) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    for stream in pipes(process):
        with contextlib.suppress(OSError):
            stream.close()
    process.wait()
