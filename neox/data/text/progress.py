"""How far a long run has come, so that one that was killed can go on: PREFIX.progress.json beside the unfinished files."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import orjson

from neox.data.store.indexed import IndexedDataset
from neox.data.store.sidecar import Sidecar
from neox.errors import DataError
from neox.files import read_bytes, sync_dir, write_durably
from neox.printing import json_line, printable

FORMAT = "neox.progress"
VERSION = 1
SOURCE_FIELDS = ("files", "text_bytes", "blank_lines", "empty_documents", "bad_lines", "bad_reasons")  # of a summary: kept in the sidecar


@dataclass(frozen=True)
class ResumePoint:
    """What is durable: blocks of the input that are done, the state of the writer, bytes of the quarantine, the counts so far."""

    blocks: int
    writer: tuple[int, int, int]
    quarantine_bytes: int
    summary: dict[str, object]


class ProgressFile:
    """Keeps the progress of a run in a file.

    Args:
        out: prefix of the dataset.
        origin: everything that the output depends on; a run goes on only with the progress of one of the same identity.
        seconds: time between two notes.
    """

    def __init__(self, out: str, origin: InputIdentity, seconds: float):
        self.path = Path(f"{out}.progress.json")
        self._origin = origin
        self._seconds = seconds
        self._noted = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a note."""
        return time.monotonic() - self._noted >= self._seconds

    def note(self, progress: ResumePoint) -> None:
        """Write the progress durably. Raises DiskError."""
        content = {"format": FORMAT, "version": VERSION, "identity": self._origin.identity, **asdict(progress)}
        write_durably(self.path, json_line(content).encode())
        self._noted = time.monotonic()

    def read(self) -> ResumePoint | None:
        """The progress of a run before this one; None when there is none.

        Raises:
            DataError: it cannot be read, or belongs to another input, tokenizer or set of options.
        """
        do = "start again without --resume"
        try:
            content = orjson.loads(read_bytes(self.path))
            same = (content["format"], content["version"]) == (FORMAT, VERSION) and content["identity"] == self._origin.identity
            documents, tokens, largest_id = content["writer"]
            progress = ResumePoint(content["blocks"], (documents, tokens, largest_id), content["quarantine_bytes"], content["summary"])
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
            sync_dir(self.path.parent)


class InputIdentity:
    """What a dataset is made from: input files, as they are now, and settings.

    Args:
        settings: gives the settings that the dataset depends on; called when a hash is first asked for.
        block_bytes: how the input is cut, on which only the progress depends.
    """

    def __init__(self, files: Sequence[str], settings: Callable[[], dict[str, object]], block_bytes: int):
        self._files = [(os.fspath(file), os.stat(file)) for file in files]
        self._settings = cache(settings)
        self._block_bytes = block_bytes

    def prepare(self) -> None:
        """Make the hashes, once, so that they are there when they are asked for."""
        _ = self.identity, self.source

    @cached_property
    def identity(self) -> str:
        """A hash of the names, sizes and times of the files, of the settings and of block_bytes."""
        return _hash([[printable(file), stat.st_size, stat.st_mtime_ns] for file, stat in self._files], {**self._settings(), "block_bytes": self._block_bytes})

    @cached_property
    def source(self) -> str:
        """As `identity` without times and block_bytes: what names the input in a sidecar, which a later run on untouched copies is to give again."""
        return _hash([[printable(file), stat.st_size] for file, stat in self._files], self._settings())


def _hash(files: list[list[object]], settings: dict[str, object]) -> str:
    return hashlib.sha256(orjson.dumps([files, settings], option=orjson.OPT_SORT_KEYS)).hexdigest()


def finished_sidecar(out: str, source: str, files: Sequence[str]) -> Sidecar | None:
    """The sidecar of the finished dataset OUT, where it was made of `source` and no file was written since; else None.

    A run that is killed after its last note is gone, or started again when it is done already, has nothing to go on with.
    """
    try:
        written = os.stat(f"{out}.idx").st_mtime_ns
        whole = IndexedDataset(out).sidecar
    except (OSError, DataError):
        return None
    if whole is None or whole.source is None or whole.source.keys() != {"hash", *SOURCE_FIELDS} or whole.source["hash"] != source:
        return None
    return whole if all(os.stat(file).st_mtime_ns <= written for file in files) else None
