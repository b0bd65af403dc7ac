"""Text that a run tokenizes itself (`data.text`): once, into a dataset that is keyed by the content of the files and the tokenizer."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from neox._native import core
from neox.data.store.indexed import IndexedDataset
from neox.data.text.encoding import Encoding
from neox.data.text.input_files import find_files
from neox.data.text.preprocess import preprocess
from neox.data.text.tokenizer import file_hash
from neox.errors import DataError, DiskError
from neox.files import locked
from neox.printing import printable

log = logging.getLogger("neox.data")


def tokenized(paths: Sequence[str], tokenizer: str, eod_token: str | None, folder: Path) -> str:
    """Prefix of the dataset that text files and folders give, made by the first process that asks; the others wait for it.

    Args:
        paths: as `neox preprocess --input` takes them; a bad line is an error.
        tokenizer: `tokenizers` JSON file. eod_token: see `Tokenizer`.
        folder: where the datasets are kept.

    Raises:
        DataError: a file is not there or has a bad line, or there are no documents. DiskError: the folder cannot be written.
    """
    files = find_files(paths)
    prefix = folder / text_key(files, tokenizer, eod_token)
    if is_complete(prefix):
        return str(prefix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(prefix.with_suffix(".lock")):
            if not is_complete(prefix):
                workers = len(os.sched_getaffinity(0))
                summary = preprocess(files, prefix, Encoding(tokenizer, eod_token), workers=workers if workers > 1 else 0, overwrite=True)
                log.info("%s: %d documents, %d tokens in %.1f s", prefix, summary.documents, summary.tokens, summary.seconds)
    except OSError as error:
        raise DiskError("cannot keep tokenized text", where=folder, got=error.strerror, do="set data.text_cache to a folder that can be written") from error
    return str(prefix)


def text_key(files: Sequence[str], tokenizer: str, eod_token: str | None) -> str:
    """Name of what files give: a hash of their content, of how their names say they are read, and of the tokenizer.

    Raises:
        DataError: a file cannot be read.
    """
    content = [[printable("".join(Path(file).suffixes[-2:])), os.path.getsize(file), f"{core.file_checksum(os.fsencode(file)):016x}"] for file in files]
    return hashlib.sha256(orjson.dumps(["neox-text-1", content, file_hash(tokenizer), eod_token])).hexdigest()[:24]


def is_complete(prefix: Path) -> bool:
    """Whether the dataset is there and undamaged: all three files, the last of which is written last."""
    if not Path(f"{prefix}.json").exists():
        return False
    try:
        return IndexedDataset(prefix).sidecar is not None
    except DataError as error:
        log.warning("tokenized text is damaged and is made anew (%s)", error.line())
        return False
