"""How far a long run has come, so that one that was killed can go on: PREFIX.progress.json beside the unfinished files."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from neox.data.files import sync_folder, write_durably
from neox.errors import DataError

FORMAT = "neox.progress"
VERSION = 1


@dataclass(frozen=True)
class Progress:
    """What is durable: blocks of the input that are done, the state of the writer, bytes of the quarantine, the counts so far."""

    blocks: int
    writer: tuple[int, int, int]
    quarantine_bytes: int
    summary: dict[str, object]


class ProgressFile:
    """Keeps the progress of a run in a file.

    Args:
        out: prefix of the dataset.
        identity: hash of everything that the output depends on; a run goes on only with the progress of an equal one.
        seconds: time between two notes.
    """

    def __init__(self, out: str, identity: str, seconds: float):
        self.path = Path(f"{out}.progress.json")
        self._identity = identity
        self._seconds = seconds
        self._noted = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a note."""
        return time.monotonic() - self._noted >= self._seconds

    def note(self, progress: Progress) -> None:
        """Write the progress durably. Raises DiskError."""
        content = {"format": FORMAT, "version": VERSION, "identity": self._identity, **asdict(progress)}
        write_durably(self.path, orjson.dumps(content, option=orjson.OPT_INDENT_2))
        self._noted = time.monotonic()

    def read(self) -> Progress | None:
        """The progress of a run before this one; None when there is none.

        Raises:
            DataError: it cannot be read, or belongs to another input, tokenizer or set of options.
        """
        do = "start again without --resume"
        try:
            content = orjson.loads(self.path.read_bytes())
            same = (content["format"], content["version"]) == (FORMAT, VERSION) and content["identity"] == self._identity
            documents, tokens, largest_id = content["writer"]
            progress = Progress(content["blocks"], (documents, tokens, largest_id), content["quarantine_bytes"], content["summary"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("progress of an earlier run cannot be read", where=self.path, got=error, do=do) from error
        if same:
            return progress
        raise DataError("progress is that of another run", where=self.path, got="other input files, tokenizer or options", want="the same", do=do)

    def remove(self) -> None:
        """The run is done, or starts anew."""
        if self.path.exists():
            self.path.unlink()
            sync_folder(self.path.parent)


def identity_of(files: Sequence[str], settings: dict[str, object]) -> str:
    """A hash of the names, sizes and times of the input files and of the settings."""
    stats = [(file, os.stat(file)) for file in files]
    listed = [[os.fspath(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return hashlib.sha256(orjson.dumps([listed, settings], option=orjson.OPT_SORT_KEYS)).hexdigest()
