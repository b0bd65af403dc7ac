"""Reading of input files: regular files of bounded size. A FIFO without a writer does not block, a device does not fill the memory."""

from __future__ import annotations

import json
import os
import stat
from errno import EFBIG, EINVAL, EISDIR
from typing import Any, BinaryIO

import orjson

LARGEST_FILE = 1 << 28  # bytes of a tokenizer, index of shards, or list of prompts; published tokenizers are below 40 MB
LARGEST_CONFIG = 1 << 24  # bytes of a config, template or manifest

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened or is something else; `strerror` names what it is.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer must not block
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "a special file")
            raise OSError(EISDIR if stat.S_ISDIR(mode) else EINVAL, f"{kind}, not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check a file that a library opens by its name. Raises OSError as `open_regular`."""
    open_regular(path).close()


def read_bytes(path: str | os.PathLike[str], limit: int = LARGEST_FILE) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger; `strerror` says which.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_CONFIG) -> str:
    """The content of a UTF-8 file. Raises OSError as `read_bytes`, and ValueError for bytes that are not UTF-8."""
    return read_bytes(path, limit).decode("utf-8").replace("\r\n", "\n")


def read_json(path: str | os.PathLike[str], limit: int = LARGEST_FILE) -> Any:
    """The value of a JSON file, NaN and Infinity included.

    Raises:
        OSError: as `read_bytes`.
        ValueError: not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes) -> Any:
    """The value of JSON text in UTF-8. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path as text that every encoding of Unicode takes: a byte of a name that is not UTF-8 becomes \xNN, a lone surrogate \uNNNN."""
    text = os.fspath(path)
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return "".join(map(_printable_letter, text))


def json_line(value: Any) -> str:
    """A value as JSON on one line, for output; names that are not UTF-8 as `printable` writes them."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return orjson.dumps(_printable_value(value)).decode()


def _printable_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {_printable_value(key): _printable_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable_value(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _printable_letter(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python names a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if 0xD800 <= code <= 0xDFFF else letter
