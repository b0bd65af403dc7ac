"""Tokenizes the text of a run (`data.text`) once, into a dataset keyed by the content of files and tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson

from neox._native import core
from neox.data.store.indexed import IndexedDataset
from neox.data.text.encoding import Encoding
from neox.data.text.preprocess import Options, preprocess
from neox.data.text.tokenizer import file_hash
from neox.errors import DataError, DiskError
from neox.files import locked
from neox.printing import printable

log = logging.getLogger("neox.data")


@dataclass(frozen=True)
class RunText:
    """The text of a run.

    Attributes:
        files: the files that `data.text` names.
        tokenizer: `tokenizers` JSON file.
        eod_token: see `Tokenizer`.
        folder: where the dataset is stored.
    """

    files: Sequence[str]
    tokenizer: str
    eod_token: str | None
    folder: Path

    @cached_property
    def key(self) -> str:
        """Name of the dataset: a hash of the content and the suffixes of the files, and of the tokenizer.

        Raises:
            DataError: a file cannot be read.
        """
        content = [
            [
                printable("".join(Path(file).suffixes[-2:])),
                os.path.getsize(file),
                f"{core.file_checksum(os.fsencode(file)):016x}",
            ]
            for file in self.files
        ]
        return hashlib.sha256(
            orjson.dumps(["neox-text-1", content, file_hash(self.tokenizer), self.eod_token])
        ).hexdigest()[:24]


def tokenize(text: RunText) -> str:
    """Build the dataset unless it exists; the other processes of the run wait for the first one.

    Returns:
        Its prefix.

    Raises:
        DataError: a file is missing or has a bad line, or there are no documents.
        DiskError: the folder cannot be written.
    """
    folder, prefix = text.folder, text.folder / text.key
    if is_complete(prefix):
        return str(prefix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(prefix.with_suffix(".lock")):
            if not is_complete(prefix):
                workers = len(os.sched_getaffinity(0))
                encoding = Encoding(text.tokenizer, text.eod_token)
                options = Options(workers=workers if workers > 1 else 0, overwrite=True)
                summary = preprocess(text.files, prefix, encoding, options)
                log.info(
                    "%s: %d documents, %d tokens in %.1f s", prefix, summary.documents, summary.tokens, summary.seconds
                )
    except OSError as error:
        raise DiskError(
            "cannot store tokenized text",
            where=folder,
            got=error.strerror,
            do="set data.text_cache to a writable folder",
        ) from error
    return str(prefix)


def is_complete(prefix: Path) -> bool:
    """Whether the dataset exists and is undamaged. Its sidecar is written last."""
    if not Path(f"{prefix}.json").exists():
        return False
    try:
        return IndexedDataset(prefix).sidecar is not None
    except DataError as error:
        log.warning("tokenized text is damaged and is rebuilt (%s)", error.line())
        return False
