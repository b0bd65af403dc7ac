"""Progress of a long run, so that a killed run can be resumed: PREFIX.progress.json next to the unfinished files."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from neox.data.store.indexed import IndexedDataset
from neox.data.store.sidecar import Sidecar
from neox.errors import DataError
from neox.files import JsonObject, read_bytes, sync_dir, write_durably
from neox.printing import json_line, printable

FORMAT = "neox.progress"
VERSION = 1
# of a summary, stored in the sidecar
SOURCE_FIELDS = ("files", "text_bytes", "blank_lines", "empty_documents", "bad_lines", "bad_reasons")


@dataclass(frozen=True)
class ResumePoint:
    """What is durable.

    Attributes:
        blocks: blocks of the input that are done.
        writer: state of the writer; see `IndexedWriter.sync`.
        quarantine_bytes: bytes of the quarantine file.
        summary: the fields of the summary.
    """

    blocks: int
    writer: tuple[int, int, int]
    quarantine_bytes: int
    summary: JsonObject


class InputIdentity:
    """What a dataset is made from: input files in their present state, and settings.

    Args:
        files: input files.
        settings: settings that the dataset depends on.
        block_bytes: bytes per block of input, on which only the progress depends.

    Attributes:
        identity: hash of names, sizes and times of the files, the settings and block_bytes.
        source: the same without times and block_bytes. It identifies the input in a sidecar, and is the same for
            copies.
    """

    def __init__(self, files: Sequence[str], settings: Mapping[str, object], block_bytes: int):
        stats = [(printable(file), os.stat(file)) for file in files]
        self.identity = _hash(
            [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], {**settings, "block_bytes": block_bytes}
        )
        self.source = _hash([[name, stat.st_size] for name, stat in stats], settings)


def _hash(files: list[list[object]], settings: Mapping[str, object]) -> str:
    return hashlib.sha256(orjson.dumps([files, dict(settings)], option=orjson.OPT_SORT_KEYS)).hexdigest()


class ProgressFile:
    """Stores the progress of a run.

    Args:
        out: prefix of the dataset.
        inputs: what the output depends on. A run resumes only from the progress of a run with the same identity.
        seconds: time between two saves.
    """

    def __init__(self, out: str, inputs: InputIdentity, seconds: float):
        self.path = Path(f"{out}.progress.json")
        self._inputs = inputs
        self._seconds = seconds
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self._seconds

    def save(self, point: ResumePoint) -> None:
        """Write the progress durably.

        Raises:
            DiskError: it cannot be written.
        """
        content = {"format": FORMAT, "version": VERSION, "identity": self._inputs.identity, **asdict(point)}
        write_durably(self.path, json_line(content).encode())
        self._saved = time.monotonic()

    def read(self) -> ResumePoint | None:
        """The progress of an earlier run; None if there is none.

        Raises:
            DataError: it cannot be read, or belongs to another input, tokenizer or set of options.
        """
        do = "start again without --resume"
        try:
            content = orjson.loads(read_bytes(self.path))
            same = (content["format"], content["version"]) == (FORMAT, VERSION) and content[
                "identity"
            ] == self._inputs.identity
            documents, tokens, largest_id = content["writer"]
            point = ResumePoint(
                content["blocks"], (documents, tokens, largest_id), content["quarantine_bytes"], content["summary"]
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("progress of an earlier run cannot be read", where=self.path, got=error, do=do) from error
        if same:
            return point
        raise DataError(
            "progress belongs to another run",
            where=self.path,
            got="other input files, tokenizer or options",
            want="the same",
            do=do,
        )

    def remove(self) -> None:
        """Remove the file, because the run has finished or starts from the beginning."""
        if self.path.exists():
            self.path.unlink()
            sync_dir(self.path.parent)


def finished_sidecar(out: str, source: str, files: Sequence[str]) -> Sidecar | None:
    """The sidecar of the finished dataset OUT, if it was made from `source` and no file changed since; else None.

    A run that was killed after it removed its progress, or is started again after it finished, has nothing to resume
    from.
    """
    try:
        written = os.stat(f"{out}.idx").st_mtime_ns
        sidecar = IndexedDataset(out).sidecar
    except (OSError, DataError):
        return None
    if (
        sidecar is None
        or sidecar.source is None
        or sidecar.source.keys() != {"hash", *SOURCE_FIELDS}
        or sidecar.source["hash"] != source
    ):
        return None
    return sidecar if all(os.stat(file).st_mtime_ns <= written for file in files) else None
