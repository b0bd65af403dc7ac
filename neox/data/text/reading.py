"""Reads text corpora: JSON lines and text files, compressed or not, in blocks of bounded size.

A line that cannot be read becomes a `BadLine` with file, line and reason, and reading continues after it.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import BinaryIO

import orjson
import zstandard

from neox._native import core
from neox.data.text.input_files import codec_of, read_as_lines
from neox.errors import DataError
from neox.files import JsonObject, open_regular
from neox.printing import printable

BLOCK_BYTES = 1 << 20
START_BYTES = 1 << 16  # of a file; its content may decide how the file is read
LONGEST_DOCUMENT = 1 << 28  # bytes of the longest line or text file that is read
LARGEST_WINDOW = 1 << 31  # bytes of memory that a zstd file may ask for, as with `zstd -d --long=31`
NAMED_KEYS = 8  # of a line that lacks the key of the text
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextChunk:
    """Complete lines of a JSON-lines file, starting with line number `line`; or, with line 0, a text file."""

    path: str
    line: int
    content: bytes


@dataclass(frozen=True)
class BadLine:
    """A line, or with line 0 a file, that gives no document. `content` is None if it was too long to store."""

    path: str
    line: int
    reason: str
    content: bytes | None

    @property
    def where(self) -> str:
        """FILE:LINE, or FILE."""
        return f"{printable(self.path)}:{self.line}" if self.line else printable(self.path)


def bad_line_error(bad: BadLine, others: str = "skip (or quarantine)") -> DataError:
    """The error for a bad line that is not left out. If it lacks a key, the error names those that it has.

    Args:
        bad: the line, or the file.
        others: values of --bad-lines that leave it out.
    """
    do, got = f"fix the input, or leave bad lines out: --bad-lines {others}", bad.reason
    if got.startswith("no key") and bad.content is not None:
        names = list(parse_object(bad.content)[0])[:NAMED_KEYS]
        got += f"; the line has {printable(', '.join(map(repr, names))) or 'none'}"
        chat = ", or read conversations with neox preprocess --chat" if "messages" in names else ""
        do = f"name the key with --json-key{chat}; or {do}"
    return DataError("bad line" if bad.line else "bad file", where=bad.where, got=got, do=do)


@dataclass(frozen=True)
class ParsedLines:
    """The result of parsing lines: documents, bad lines, and the number of blank lines."""

    texts: list[str]
    bad: list[BadLine]
    blank: int


def read_blocks(
    files: Iterable[str], block_bytes: int = BLOCK_BYTES, longest: int = LONGEST_DOCUMENT, form: str = "auto"
) -> Iterator[list[TextChunk | BadLine]]:
    """Chunks and bad lines of files, in order, in blocks of about `block_bytes`.

    Holds one block and the longest document in memory.

    Args:
        files: the files to read.
        block_bytes: bytes per block.
        longest: bytes of the longest line or text file.
        form: "jsonl" or "txt" for all files; for "auto" see `neox.data.text.input_files.read_as_lines`.

    Raises:
        DataError: a file cannot be opened or read, or its name does not determine how to read it.
    """
    block: list[TextChunk | BadLine] = []
    size = 0
    for path in files:
        for item in _file_chunks(path, block_bytes, longest, form):
            block.append(item)
            size += len(item.content or b"")
            if size >= block_bytes:
                yield block
                block, size = [], 0
    if block:
        yield block


def _file_chunks(path: str, block_bytes: int, longest: int, form: str) -> Iterator[TextChunk | BadLine]:
    """The content of a file. Its first bytes decide how it is read if its name does not."""
    chunks = _decompressed(path, block_bytes)
    start: list[bytes] = []
    damage = None
    try:
        while sum(map(len, start)) < START_BYTES and (chunk := next(chunks, b"")):
            start.append(chunk)
            del chunk  # a chunk of compressed data may be 100 MB
    except _Damaged as error:
        damage = error
    first_bytes = b"".join(chunk[:START_BYTES] for chunk in start)[:START_BYTES]
    read = _line_chunks if read_as_lines(path, first_bytes, form) else _text_chunk
    yield from read(path, _continued(start, damage, chunks), block_bytes, longest)


def _continued(start: list[bytes], damage: _Damaged | None, chunks: Iterator[bytes]) -> Iterator[bytes]:
    while start:
        yield start.pop(0)  # released before the rest of the file is read
    if damage is not None:
        raise damage
    yield from chunks


def parse(chunk: TextChunk, key: str) -> ParsedLines:
    """Parse a chunk. A JSON line must be an object whose `key` is a string; a text file must be UTF-8."""
    if chunk.line == 0:
        try:
            return ParsedLines([chunk.content.removeprefix(BOM).decode("utf-8")], [], 0)
        except UnicodeDecodeError as error:
            return ParsedLines(
                [],
                [
                    BadLine(
                        chunk.path,
                        0,
                        f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}",
                        chunk.content,
                    )
                ],
                0,
            )
    texts, bad, blank = [], [], 0
    content = chunk.content.removesuffix(b"\n")
    for number, line in enumerate(content.split(b"\n"), chunk.line):
        if not line.strip():
            blank += 1
            continue
        text, reason = parse_line(line, key)
        if reason is None:
            texts.append(text)
        else:
            bad.append(BadLine(chunk.path, number, reason, line))
    return ParsedLines(texts, bad, blank)


def parse_line(line: bytes, key: str) -> tuple[str, str | None]:
    """(text, None), or ("", reason)."""
    value, reason = parse_object(line)
    if reason is not None:
        return "", reason
    if key not in value:
        return "", f"no key {key!r}"
    text = value[key]
    if not isinstance(text, str):
        return "", f"the value of {key!r} is not a string: {type(text).__name__}"
    return (text, None) if is_unicode(text) else ("", LONE_SURROGATE)


LONE_SURROGATE = "not JSON: a lone surrogate in the text"


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_object(line: bytes) -> tuple[JsonObject, str | None]:
    """(object of a JSON line, None), or ({}, reason).

    Accepts what Python's json writes beyond the standard: NaN, Infinity, numbers of any size, escapes of lone
    surrogates.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            value = PYTHON_JSON.decode(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return {}, f"not JSON: {error}"
    return (value, None) if isinstance(value, dict) else ({}, f"a JSON {type(value).__name__} and not an object")


def _integer(digits: str) -> int | float:
    # int() refuses thousands of digits and takes quadratic time
    return int(digits) if len(digits) < 20 else float(digits)


PYTHON_JSON = json.JSONDecoder(parse_int=_integer)


def _decompressed(path: str, size: int) -> Iterator[bytes]:
    """The decompressed content of a file, in parts of about `size` bytes.

    Raises:
        DataError: it cannot be opened or read.
        _Damaged: compressed data is damaged or truncated.
    """
    codec = codec_of(path)
    try:
        with open_regular(path) as file:
            if codec == "zstd":
                yield from _zstd_chunks(file)
            else:
                read = file.read if codec is None else DECOMPRESSORS[codec](file).read1
                while content := read(size):
                    yield content
    except (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _Damaged(damage_of(error)) from error
    except OSError as error:
        if error.errno is None:  # how bz2 reports damage
            raise _Damaged(damage_of(error)) from error
        raise DataError("cannot read input", where=path, got=error.strerror or error) from error


class _Damaged(Exception):
    """Compressed data is truncated, damaged, or asks for too much memory."""


DECOMPRESSORS: dict[str, Callable[[BinaryIO], BufferedIOBase]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def damage_of(error: Exception) -> str:
    """The reason why compressed data cannot be read."""
    if "too much memory" in str(error):
        return f"zstd window is larger than {LARGEST_WINDOW} bytes: compress it with a window of at most --long=31"
    if "memory" in str(error):
        return f"not enough memory to decompress: {error}"
    return f"compressed data is damaged: {error}"


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a zstd file. Unlike the reader of the library, this reports a truncated frame."""
    frame = None
    while part := file.read(1 << 13):  # small, because a hostile frame expands by up to 16,000
        while part:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
            yield frame.decompress(part)
            part = b""
            if frame.eof:
                part, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame is truncated")


def _line_chunks(path: str, chunks: Iterable[bytes], block_bytes: int, longest: int) -> Iterator[TextChunk | BadLine]:
    """Split a JSON-lines file at line ends. A line longer than `longest` is skipped without being stored."""
    parts: list[memoryview] = []  # read since the last chunk; copied once, into the next one
    size, line, skipping = 0, 1, False
    lines_end: tuple[int, int] | None = None  # where the last complete line ends: the part and the byte in it
    try:
        for chunk in chunks:
            if line == 1 and not size and not skipping:
                chunk = chunk.removeprefix(BOM)
            if skipping:
                end = chunk.find(b"\n")
                if end < 0:
                    continue
                chunk, skipping, line = chunk[end + 1 :], False, line + 1
            parts.append(memoryview(chunk))
            size += len(chunk)
            end = chunk.rfind(b"\n") + 1
            if end:
                lines_end = len(parts) - 1, end
            if size < block_bytes:
                continue
            # lines of an earlier part wait until a line ends, unless the line after them is too long
            if lines_end is not None and (end or size > longest):
                part, end = lines_end
                content = b"".join([*parts[:part], parts[part][:end]])
                yield TextChunk(path, line, content)
                line += core.count_lines(content)
                parts[: part + 1] = [parts[part][end:]]
                size, lines_end = sum(map(len, parts)), None
            if size > longest:
                yield BadLine(path, line, f"line is longer than {longest} bytes", None)
                parts, size, skipping = [], 0, True
    except _Damaged as damage:
        rest = b"".join(parts)
        end = rest.rfind(b"\n") + 1
        if end:
            yield TextChunk(path, line, rest[:end])
            line += rest.count(b"\n", 0, end)
        yield BadLine(path, line, str(damage), rest[end:])
        return
    if size:
        yield TextChunk(path, line, b"".join(parts))


def _text_chunk(path: str, chunks: Iterable[bytes], block_bytes: int, longest: int) -> Iterator[TextChunk | BadLine]:
    content = bytearray()
    try:
        for chunk in chunks:
            content += chunk
            if len(content) > longest:
                yield BadLine(path, 0, f"file is longer than {longest} bytes", None)
                return
    except _Damaged as damage:
        yield BadLine(path, 0, str(damage), bytes(content))
        return
    yield TextChunk(path, 0, bytes(content))
