"""Reading text: every kind of bad input gets its documented result, and the rest of the file is read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from pathlib import Path

import orjson
import pytest
import zstandard

from neox.data.text.input_files import find_files
from neox.data.text.reading import BadLine, TextChunk, parse, read_blocks

PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": lambda content: bz2.compress(content, 1),
    ".xz": lzma.compress,
}


def documents(path: Path, key: str = "text", **limits: int) -> tuple[list[str], list[tuple[int, str]], int]:
    """(texts, [(line, reason)], blank lines) of a file."""
    texts, bad, blank = [], [], 0
    for block in read_blocks([str(path)], **limits):
        for item in block:
            if isinstance(item, BadLine):
                bad.append((item.line, item.reason))
                continue
            parsed = parse(item, key)
            texts += parsed.texts
            bad += [(entry.line, entry.reason) for entry in parsed.bad]
            blank += parsed.blank
    return texts, bad, blank


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not JSON: str is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "not JSON: a lone surrogate in the text"),
        (b'{"text": "a"', "not JSON"),
        (b'{"other": "a"}', "no key 'text'"),
        (b'{"text": 5}', "the value of 'text' is not a string: int"),
        (b'{"text": null}', "the value of 'text' is not a string: NoneType"),
        (b'["text"]', "a JSON list and not an object"),
        (b"5", "a JSON int and not an object"),
        (b"[" * 100_000, "not JSON: depth limit exceeded"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"\x00", "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, line, reason):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    texts, bad, _ = documents(path)
    assert texts == ["first", "last"]
    assert len(bad) == 1 and bad[0][0] == 2 and bad[0][1].startswith(reason)


def test_good_oddities_are_read(tmp_path):
    path = tmp_path / "f.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "bom"}\r',
        b"",
        b"  \r",
        b'{"text": "a\\u0000b"}',
        b'{"text": 1, "text": "twice"}',
        b'{"text": "\\ud83d\\ude00"}',
        b'{"text": ""}',
    ]
    path.write_bytes(b"\n".join([*lines, b'{"text": "no end"}']))
    assert documents(path) == (["bom", "a\0b", "twice", "😀", "", "no end"], [], 2)


@pytest.mark.parametrize("block_bytes", [5, 6, 10, 11, 13])
def test_only_the_start_of_a_file_loses_its_byte_order_mark(tmp_path, block_bytes):
    """The same bytes later in the first line are text, also where a block begins with them."""
    text = "\ufeff" * 40
    path = tmp_path / "f.jsonl"
    path.write_text(f'\ufeff{{"text": "{text}"}}\n{{"text": "{text}"}}\n')
    assert documents(path, block_bytes=block_bytes) == ([text, text], [], 0)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_blocks_and_compression_change_nothing(tmp_path, block_bytes, suffix):
    lines = [f"{'x' * (i * 37 % 200)} {i}" for i in range(40)]
    content = b"".join(orjson.dumps({"text": line}) + b"\n" for line in lines)
    content = content.replace(orjson.dumps({"text": lines[20]}), b"{bad}")
    pack = {**PACK, "": bytes}[suffix]
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(pack(content[:1500]) + pack(content[1500:]))  # two members, two frames
    texts, bad, blank = documents(path, block_bytes=block_bytes)
    assert texts == lines[:20] + lines[21:] and blank == 0
    assert [line for line, _ in bad] == [21]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_damaged_compression_keeps_what_came_before(tmp_path, suffix, damage):
    lines = [f"{os.urandom(40).hex()} {i}" for i in range(5000)]
    content = b"".join(orjson.dumps({"text": line}) + b"\n" for line in lines)
    packed = bytearray(PACK[suffix](content))
    if damage == "truncated":
        packed = packed[:-1000]
    elif damage == "garbage":
        packed = packed[:-1000] + os.urandom(1000)
    else:
        packed[len(packed) * 3 // 4] ^= 255
    good, broken = tmp_path / "a.jsonl", tmp_path / f"b.jsonl{suffix}"
    broken.write_bytes(packed)
    good.write_bytes(b'{"text": "next file"}\n')
    texts, bad, blank = documents(broken, block_bytes=1 << 14)
    assert bad and any(reason.startswith("compressed data is damaged") for _, reason in bad)
    assert bad[-1][0] == len(texts) + len(bad) + blank and texts[:1000] == lines[:1000]
    items = [item for block in read_blocks([str(broken), str(good)]) for item in block]
    assert items[-1] == TextChunk(str(good), 1, b'{"text": "next file"}\n')


def test_a_huge_line_is_skipped_without_being_stored(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"y" * 500_000 + b'"}\n{"text": "b"}\n\n{bad}\n')
    texts, bad, blank = documents(path, block_bytes=1000, longest=10_000)
    assert texts == ["a", "b"] and blank == 1
    assert [(line, reason.split(":")[0]) for line, reason in bad] == [
        (2, "line is longer than 10000 bytes"),
        (5, "not JSON"),
    ]


def test_text_files_are_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline\r\n\nline\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "c.py").write_bytes(b"caf\xe9")
    assert documents(tmp_path / "a.txt")[0] == ["line\r\n\nline\n"]
    assert documents(tmp_path / "b.txt.gz")[0] == ["zipped"]
    assert documents(tmp_path / "c.py") == ([], [(0, "not UTF-8: byte 0xe9 at 3")], 0)
    assert documents(tmp_path / "a.txt", block_bytes=4, longest=5) == ([], [(0, "file is longer than 5 bytes")], 0)


def test_small_files_share_blocks(tmp_path):
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text("x" * 100)
    blocks = list(read_blocks(find_files([str(tmp_path)]), block_bytes=1000))
    assert [len(block) for block in blocks] == [10] * 5


def zstd_frame(window_log: int, content: bytes) -> bytes:
    """A frame of one raw block that asks for a window of 2^window_log bytes."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def test_zstd_windows_up_to_two_gigabytes_are_read_and_larger_ones_named(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_frame(31, b'{"text": "far"}\n'))
    assert documents(path) == (["far"], [], 0)
    path.write_bytes(zstd_frame(32, b'{"text": "too far"}\n'))
    texts, bad, _ = documents(path)
    assert texts == [] and bad[0][1].startswith("zstd window is larger than 2147483648 bytes")


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_bytes(b"{bad}\n")
    ((piece,),) = read_blocks([path])
    (bad,) = parse(piece, "text").bad
    assert bad.where == f"{tmp_path}/caf\\xe9.jsonl:1"
