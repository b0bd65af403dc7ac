"""Reading text at its limits: longest lines and files, blocks, the first bytes of a file, values of JSON lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from neox.data.text.reading import (
    BLOCK_BYTES,
    LONGEST_DOCUMENT,
    START_BYTES,
    BadLine,
    TextChunk,
    bad_line_error,
    damage_of,
    is_unicode,
    parse,
    parse_line,
    parse_object,
    read_blocks,
)
from neox.errors import DataError


def items(path: Path, **options: object) -> list[TextChunk | BadLine]:
    return [item for block in read_blocks([str(path)], **options) for item in block]


def lines(*sizes: int) -> bytes:
    """Lines of these lengths without their ends."""
    return b"".join(b"x" * size + b"\n" for size in sizes)


def test_limits_are_those_of_the_documentation():
    assert (BLOCK_BYTES, START_BYTES, LONGEST_DOCUMENT) == (1 << 20, 1 << 16, 1 << 28)


@pytest.mark.parametrize(
    ("content", "chunks"),
    [
        (lines(3, 3), [(1, lines(3, 3))]),  # below a block
        (lines(4, 4), [(1, lines(4, 4))]),
        (lines(4, 4) + b"yy", [(1, lines(4, 4)), (3, b"yy")]),
        (lines(9, 2, 9, 9), [(1, lines(9)), (2, lines(2)), (3, lines(9)), (4, lines(9))]),
        (b"y" * 30 + b"\n" + lines(1), [(1, b"y" * 30 + b"\n" + lines(1))]),  # the last read ends both
        (b"\n\n\n", [(1, b"\n\n\n")]),
        (b"", []),
    ],
)
def test_lines_are_cut_at_their_ends_and_counted(tmp_path, content, chunks):
    """Blocks of ten bytes."""
    (tmp_path / "a.jsonl").write_bytes(content)
    found = items(tmp_path / "a.jsonl", block_bytes=10)
    assert found == [TextChunk(str(tmp_path / "a.jsonl"), *chunk) for chunk in chunks]


@pytest.mark.parametrize("over", [0, 1])
def test_the_longest_line_and_the_longest_file_are_read(tmp_path, over):
    """A line ends with its file here: what follows it would be in the same read."""
    text = "z" * (100 + over)
    (tmp_path / "a.txt").write_text(text)
    found = items(tmp_path / "a.txt", block_bytes=10, longest=100)
    whole = TextChunk(str(tmp_path / "a.txt"), 0, text.encode())
    assert found == [BadLine(whole.path, 0, "file is longer than 100 bytes", None) if over else whole]
    (tmp_path / "a.jsonl").write_text(text)
    found = items(tmp_path / "a.jsonl", block_bytes=10, longest=100)
    whole = TextChunk(str(tmp_path / "a.jsonl"), 1, text.encode())
    assert found == [BadLine(whole.path, 1, "line is longer than 100 bytes", None) if over else whole]


def test_lines_after_one_that_is_too_long_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    for block_bytes in (1, 4, 7, 64):
        path.write_bytes(lines(2) + b"L" * 300 + b"\n" + lines(3) + b"M" * 300 + b"\n" + lines(4, 5))
        found = items(path, block_bytes=block_bytes, longest=64)
        assert [(item.line, item.reason) for item in found if isinstance(item, BadLine)] == [
            (2, "line is longer than 64 bytes"),
            (4, "line is longer than 64 bytes"),
        ]
        kept = {item.line: item.content for item in found if isinstance(item, TextChunk)}
        assert b"".join(kept.values()) == lines(2, 3, 4, 5) and {1, 3, 5} <= kept.keys() <= {1, 3, 5, 6}
        path.write_bytes(b"L" * 300)  # no end
        assert [item.line for item in items(path, block_bytes=block_bytes, longest=64)] == [1]


@pytest.mark.parametrize("size", [100, 101])
def test_lines_that_are_read_together_with_the_start_of_a_long_one_stay(tmp_path, size):
    """A compressed file is read in parts smaller than a block: here each is a member of the file."""
    path = tmp_path / "a.jsonl.gz"
    members = (lines(3, 4) + b"L" * 5, b"L" * 70, b"L" * (size - 75), b"\n" + lines(5))
    path.write_bytes(b"".join(map(gzip.compress, members)))
    found = items(path, block_bytes=64, longest=100)
    kept = b"".join(item.content for item in found if isinstance(item, TextChunk))
    assert kept == lines(3, 4) + (lines(5) if size > 100 else b"L" * 100 + b"\n" + lines(5))
    bad = [BadLine(str(path), 3, "line is longer than 100 bytes", None)]
    assert [item for item in found if isinstance(item, BadLine)] == (bad if size > 100 else [])
    line = 1
    for item in found:
        assert item.line == line
        line += 1 if isinstance(item, BadLine) else item.content.count(b"\n")


def test_a_block_ends_when_it_is_full(tmp_path):
    files = []
    for number, size in enumerate((4, 5, 1, 10, 3)):
        files.append(str(tmp_path / f"{number}.txt"))
        Path(files[-1]).write_bytes(b"x" * size)
    blocks = list(read_blocks(files, block_bytes=10))
    assert [[len(item.content) for item in block] for block in blocks] == [[4, 5, 1], [10], [3]]
    assert list(read_blocks([])) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_without_a_suffix_is_judged_by_its_first_bytes_and_read_from_its_start(tmp_path, compressed):
    """In reads smaller than what decides."""
    content = b'{"text": "a"}\n' * 10
    path = tmp_path / ("part-0.gz" if compressed else "part-0")
    path.write_bytes(gzip.compress(content) if compressed else content)
    found = items(path, block_bytes=50)
    assert b"".join(item.content for item in found) == content and found[0].line == 1
    path.write_bytes(gzip.compress(b"text\n" + content) if compressed else b"text\n" + content)
    (whole,) = items(path, block_bytes=50)
    assert (whole.line, whole.content) == (0, b"text\n" + content)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst"])
def test_a_file_that_is_cut_off_at_once_is_one_bad_item(tmp_path, name):
    packed = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' * 100)
    (tmp_path / name).write_bytes(packed[:8])
    (bad,) = items(tmp_path / name)
    assert isinstance(bad, BadLine) and bad.line == ("jsonl" in name) and bad.content == b""
    assert bad.reason == "compressed data is damaged: the last frame is truncated"
    (tmp_path / name).write_bytes(b"")
    found = items(tmp_path / name)
    assert found == ([] if "jsonl" in name else [TextChunk(str(tmp_path / name), 0, b"")])


def test_a_folder_or_a_missing_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    for path, got in (("a.jsonl", "a folder"), ("b.jsonl", "No such file")):
        with pytest.raises(DataError, match=rf"cannot read input; where=.*{path}; got={got}"):
            items(tmp_path / path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Frame requires too much memory for decoding"), "zstd window is larger than 2147483648 bytes: "),
        (ValueError("Allocation error : not enough memory"), "not enough memory to decompress: Allocation error"),
        (EOFError("ended"), "compressed data is damaged: ended"),
    ],
)
def test_why_compressed_data_cannot_be_read(error, reason):
    assert damage_of(error).startswith(reason)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b'{"n": 123456789012345678901, "x": NaN}', 123456789012345678901.0),
        (b'{"n": 1234567890123456789, "x": NaN}', 1234567890123456789),
        (b'{"n": 12345678901234567890, "x": NaN}', 12345678901234567890.0),
        (b'{"n": -12, "x": Infinity}', -12),
        (b'{"n": 1.5, "x": -Infinity}', 1.5),
    ],
)
def test_numbers_beyond_the_standard(line, value):
    found, reason = parse_object(line)
    assert reason is None and found["n"] == value and type(found["n"]) is type(value)


def test_texts_and_keys_of_a_line():
    assert parse_line(b'{"body": "b", "text": "t"}', "body") == ("b", None)
    assert parse_line(b'{"body": "b"}', "text") == ("", "no key 'text'")
    assert parse_line(b'{"text": [1]}', "text") == ("", "the value of 'text' is not a string: list")
    assert parse_line(b'{"text": true}', "text") == ("", "the value of 'text' is not a string: bool")
    assert parse_line(b'"text"', "text") == ("", "a JSON str and not an object")
    assert parse_line(json.dumps({"text": "\ud83d"}).encode(), "text") == ("", "not JSON: a lone surrogate in the text")
    assert [is_unicode(text) for text in ("", "é😀", "a\udc00")] == [True, True, False]


def test_a_bad_file_is_named_as_one():
    for bad, message in (
        (BadLine("a.jsonl", 7, "why", None), "bad line; where=a.jsonl:7; got=why"),
        (BadLine("a.txt", 0, "why", None), "bad file; where=a.txt; got=why"),
    ):
        with pytest.raises(DataError, match=f"{message}; do=fix the input, or leave bad lines out: --bad-lines skip"):
            raise bad_line_error(bad)


def test_a_line_without_the_key_names_those_that_it_has():
    def error(content: bytes, *others: str) -> str:
        return bad_line_error(BadLine("a.jsonl", 1, "no key 'text'", content), *others).line()

    assert error(b'{"content": "a", "id": 1}') == (
        "error[3] bad line; where=a.jsonl:1; got=no key 'text'; the line has 'content', 'id'; "
        "do=name the key with --json-key; or fix the input, or leave bad lines out: --bad-lines skip (or quarantine)"
    )
    assert "has none; do=" in error(b"{}") and "or leave bad lines out: --bad-lines skip" in error(b"{}", "skip")
    assert "--json-key, or read conversations with neox preprocess --chat; or" in error(b'{"messages": []}')
    many = error(b"{" + b", ".join(b'"k%d": 0' % i for i in range(30)) + b"}")
    assert "'k7'; do=" in many and "'k8'" not in many
    with_escape = error(b'{"a\\u001b[2J": 1}')
    assert "\x1b" not in with_escape


def test_lines_of_a_chunk_are_numbered_from_its_own(tmp_path):
    chunk = TextChunk("dir/a.jsonl", 41, b'{"text": "a"}\n\n{"text": 1}\n \t\n{"text": "b"}\n{')
    found = parse(chunk, "text")
    assert found.texts == ["a", "b"] and found.blank == 2
    assert [(bad.line, bad.where, bad.content) for bad in found.bad] == [
        (43, "dir/a.jsonl:43", b'{"text": 1}'),
        (46, "dir/a.jsonl:46", b"{"),
    ]
    (bad,) = parse(TextChunk("a.txt", 0, b"caf\xe9"), "text").bad
    assert (bad.where, bad.reason, bad.content) == ("a.txt", "not UTF-8: byte 0xe9 at 3", b"caf\xe9")
    (bad,) = parse(TextChunk("a.txt", 0, b"\xef\xbb\xbf\x05\xff"), "text").bad
    assert bad.reason.startswith("not UTF-8: byte 0xff at ")
