"""Reading of text corpora: JSON lines and text files, plain, gzip or zstd, in blocks of bounded size.

Nothing is lost with a bad line: what cannot be read becomes a `Bad` with file, line and reason, and reading goes on behind it.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
import zstandard

from neox.data._native import core
from neox.errors import DataError

FOLDER_SUFFIXES = (".jsonl", ".txt")  # files that are taken from a folder unless other suffixes are named
LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")  # read as one JSON object per line; every other file is one document
COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 1 << 20
LONGEST_DOCUMENT = 1 << 28  # bytes of a line or text file that is still read
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Whole lines of a JSON-lines file, the first of them number `line`; or, with line 0, a text file."""

    path: str
    line: int
    content: bytes


@dataclass(frozen=True)
class Bad:
    """A line (or file: line 0) that gives no document. `content` is None where it was too long to keep."""

    path: str
    line: int
    reason: str
    content: bytes | None

    @property
    def where(self) -> str:
        """FILE:LINE, or FILE."""
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True)
class Parsed:
    """What lines gave: documents, bad lines, and how many lines were blank."""

    texts: list[str]
    bad: list[Bad]
    blank: int


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = FOLDER_SUFFIXES) -> list[str]:
    """Files named directly, and those in named folders (at any depth, sorted) that end in one of `suffixes`, compressed or not.

    Raises:
        DataError: something named is not there, is no file or folder, or a folder has no such file.
    """
    files: list[str] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += _files_of_folder(path, suffixes)
        elif path.is_file():
            files.append(name)
        elif path.exists():
            raise DataError("input is neither a file nor a folder", where=name)
        else:
            raise DataError("no such input", where=name, got="a dangling link" if path.is_symlink() else None, want="a file or a folder", do="check --input")
    return files


def _files_of_folder(folder: Path, suffixes: Sequence[str]) -> list[str]:
    found, others = [], 0
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            if _plain_name(name).endswith(tuple(suffixes)) and os.path.isfile(path):
                found.append(path)
            else:
                others += 1
    if not found:
        want = f"files that end in {', '.join(suffixes)} (also with {' or '.join(COMPRESSED)})"
        raise DataError("folder has no input files", where=folder, got=f"{others} other files", want=want, do="name the suffix: --suffix .py")
    return found


def _refuse_folder(error: OSError) -> None:
    raise DataError("cannot read folder", where=error.filename, got=error.strerror) from error


def _plain_name(path: str) -> str:
    """The name without its compression suffix."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in COMPRESSED else path


def read_blocks(files: Iterable[str], block_bytes: int = BLOCK_BYTES, longest: int = LONGEST_DOCUMENT) -> Iterator[list[Piece | Bad]]:
    """Pieces and bad lines in order, gathered into blocks of about `block_bytes`. Memory: a block and the longest document.

    Raises:
        DataError: a file cannot be opened or read.
    """
    block: list[Piece | Bad] = []
    size = 0
    for path in files:
        lines = _plain_name(path).endswith(LINES_SUFFIXES)
        for item in _line_pieces(path, block_bytes, longest) if lines else _text_piece(path, block_bytes, longest):
            block.append(item)
            size += len(item.content or b"")
            if size >= block_bytes:
                yield block
                block, size = [], 0
    if block:
        yield block


def parse(piece: Piece, key: str) -> Parsed:
    """The documents of a piece. A JSON line must be an object whose `key` is a string; a text file must be UTF-8."""
    if piece.line == 0:
        try:
            return Parsed([piece.content.removeprefix(BOM).decode("utf-8")], [], 0)
        except UnicodeDecodeError as error:
            return Parsed([], [Bad(piece.path, 0, f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}", piece.content)], 0)
    texts, bad, blank = [], [], 0
    content = piece.content.removesuffix(b"\n")
    for number, line in enumerate(content.split(b"\n"), piece.line):
        if not line.strip():
            blank += 1
            continue
        text, reason = parse_line(line, key)
        if reason is None:
            texts.append(text)
        else:
            bad.append(Bad(piece.path, number, reason, line))
    return Parsed(texts, bad, blank)


def parse_line(line: bytes, key: str) -> tuple[str, str | None]:
    """(text, None), or ("", what is wrong)."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return "", f"not JSON: {error}"
    if not isinstance(value, dict):
        return "", f"a JSON {type(value).__name__} and not an object"
    if key not in value:
        return "", f"no key {key!r}"
    text = value[key]
    return (text, None) if isinstance(text, str) else ("", f"key {key!r} is a {type(text).__name__} and not a string")


def _chunks(path: str, size: int) -> Iterator[bytes]:
    """The decompressed content. Raises DataError when it cannot be opened, _Damaged when compressed data are damaged or cut short."""
    try:
        with open(path, "rb") as file:
            if path.endswith(".zst"):
                yield from _zstd_chunks(file)
            else:
                source = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
                while chunk := source.read1(size) if path.endswith(".gz") else source.read(size):
                    yield chunk
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise _Damaged(f"compressed data are damaged: {error}") from error
    except OSError as error:
        raise DataError("cannot read input", where=path, got=error.strerror or error) from error


class _Damaged(Exception):
    """Compressed data end early or are not what they claim."""


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a zstd file. The library's own reader takes a cut-off frame for the end of the file; this does not."""
    frame = None
    while piece := file.read(1 << 13):  # small: a hostile frame expands by up to 16,000
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece = b""
            if frame.eof:
                piece, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame is cut off")


def _line_pieces(path: str, block_bytes: int, longest: int) -> Iterator[Piece | Bad]:
    """Cut a JSON-lines file at line ends. A line longer than `longest` is passed over without being kept."""
    parts: list[memoryview] = []  # what was read since the last piece; copied once, into the next one
    size, line, skipping = 0, 1, False
    try:
        for chunk in _chunks(path, block_bytes):
            if line == 1 and not size and not skipping:
                chunk = chunk.removeprefix(BOM)
            if skipping:
                end = chunk.find(b"\n")
                if end < 0:
                    continue
                chunk, skipping, line = chunk[end + 1 :], False, line + 1
            parts.append(memoryview(chunk))
            size += len(chunk)
            if size < block_bytes:
                continue
            end = chunk.rfind(b"\n") + 1
            if end:
                parts[-1] = parts[-1][:end]
                content = b"".join(parts)
                yield Piece(path, line, content)
                line += core.count_lines(content)
                parts, size = [memoryview(chunk)[end:]], len(chunk) - end
            if size > longest:
                yield Bad(path, line, f"line is longer than {longest} bytes", None)
                parts, size, skipping = [], 0, True
    except _Damaged as damage:
        rest = b"".join(parts)
        end = rest.rfind(b"\n") + 1
        if end:
            yield Piece(path, line, rest[:end])
            line += rest.count(b"\n", 0, end)
        yield Bad(path, line, str(damage), rest[end:])
        return
    if size:
        yield Piece(path, line, b"".join(parts))


def _text_piece(path: str, block_bytes: int, longest: int) -> Iterator[Piece | Bad]:
    content = bytearray()
    try:
        for chunk in _chunks(path, block_bytes):
            content += chunk
            if len(content) > longest:
                yield Bad(path, 0, f"file is longer than {longest} bytes", None)
                return
    except _Damaged as damage:
        yield Bad(path, 0, str(damage), bytes(content))
        return
    yield Piece(path, 0, bytes(content))
