"""The `tokenizers` library, here or in a process of its own: loading it takes a tenth of a second in which no other thread of its process can run Python."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

LENGTH = struct.Struct("<Q")  # bytes of what follows: a text, or its ids
ROOT = str(Path(__file__).resolve().parents[2])  # where this package is, of an editable installation too
START = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from neox.data.library import serve; serve(sys.argv[2], sys.argv[3] == 'text')"


def load_library(content: bytes, specials_as_text: bool) -> tokenizers.Tokenizer:
    """A tokenizer that neither pads nor cuts off. Raises bare Exception for every kind of bad file."""
    import tokenizers  # not needed where csrc/data encodes and another process compares

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = specials_as_text
    return tokenizer


class LibraryProcess:
    """Encodes texts by the library in another process, which is loading while this one does something else. A context manager.

    Args:
        file: `tokenizers` JSON file. A bad one is found by `encode` alone, and why it is bad by `load_library`.
        specials_as_text: special tokens that occur in the text are encoded as text.
    """

    def __init__(self, file: str, specials_as_text: bool):
        arguments = [os.pathsep.join([ROOT, *sys.path]), file, "text" if specials_as_text else "match"]
        command = [sys.executable, "-I", "-S", "-c", START, *arguments]
        # in a session of its own, since Ctrl-C is for the parent, with which it ends
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text; None: the process is gone, or cannot read the file."""
        content = text.encode()
        try:
            self._process.stdin.write(LENGTH.pack(len(content)) + content)
            self._process.stdin.flush()
            head = self._process.stdout.read(LENGTH.size)
            body = self._process.stdout.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
        except OSError:
            return None
        ids = memoryview(body).cast("I").tolist() if len(body) % 4 == 0 else []
        return ids if len(head) == LENGTH.size and 4 * len(ids) == LENGTH.unpack(head)[0] else None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> LibraryProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def serve(file: str, specials_as_text: bool) -> None:
    """Encode the texts of standard input, until it ends: also when the parent is killed."""
    try:
        tokenizer = load_library(Path(file).read_bytes(), specials_as_text)
    except Exception:  # the parent looks at the file itself, and says what is wrong
        return
    texts, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := texts.read(LENGTH.size)) == LENGTH.size:
        ids = tokenizer.encode(texts.read(*LENGTH.unpack(head)).decode(), add_special_tokens=False).ids
        answers.write(LENGTH.pack(4 * len(ids)) + struct.pack(f"{len(ids)}I", *ids))
        answers.flush()
