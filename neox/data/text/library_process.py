"""The `tokenizers` library in a process of its own: loading it takes a tenth of a second in which no other thread of its process can run Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from neox.data.text.hf_tokenizers import LENGTH

ROOT = str(Path(__file__).resolve().parents[3])  # where this package is, of an editable installation too
START = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from neox.data.text.hf_tokenizers import serve; serve(sys.argv[2], sys.argv[3] == 'text')"


class LibraryProcess:
    """Encodes texts by the library in another process, which is loading while this one does something else. A context manager.

    Args:
        file: `tokenizers` JSON file. A bad one is found by `encode` alone, and why it is bad by `load_hf_tokenizer`.
        specials_as_text: special tokens that occur in the text are encoded as text.
    """

    def __init__(self, file: str, specials_as_text: bool):
        arguments = [os.pathsep.join([ROOT, *sys.path]), file, "text" if specials_as_text else "match"]
        command = [sys.executable, "-I", "-S", "-c", START, *arguments]
        # in a session of its own, since Ctrl-C is for the parent, with which it ends
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        except OSError:
            self._process = None  # no more processes are to be had

    @property
    def pid(self) -> int | None:
        """Of the process; None: it could not be started."""
        return None if self._process is None else self._process.pid

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text; None: the process is gone, or cannot read the file."""
        if self._process is None:
            return None
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
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> LibraryProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
