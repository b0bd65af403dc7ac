"""PREFIX.json: round trip, damage is an error, and files of others are left alone."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from neox.data.store.sidecar import Sidecar, is_foreign, read_sidecar, sidecar_path, write_sidecar
from neox.errors import DataError

EXAMPLE = Sidecar("uint16", 3, 2, 100, 99, 200, 2**64 - 1, (1, 2**63), 128, "ab", 300, 0, {"hash": "cd", "files": 2})


def test_round_trip(tmp_path):
    prefix = str(tmp_path / "d")
    assert read_sidecar(prefix) is None
    for sidecar in (
        EXAMPLE,
        replace(EXAMPLE, tokenizer_hash=None, vocab_size=None, eod_id=None, block_sums=(), source=None),
    ):
        write_sidecar(prefix, sidecar)
        assert read_sidecar(prefix) == sidecar


def test_the_content_of_the_file_is_pinned():
    """Datasets that exist have these keys."""
    content = EXAMPLE.to_json()
    assert content.endswith(b"}\n") and b'\n  "version": 1,\n' in content
    assert orjson.loads(content) == {
        "format": "neox.indexed",
        "version": 1,
        "dtype": "uint16",
        "sequences": 3,
        "documents": 2,
        "tokens": 100,
        "largest_id": 99,
        "tokenizer": {"hash": "ab", "vocab_size": 300, "eod_id": 0},
        "source": {"hash": "cd", "files": 2},
        "idx": {"xxh64": "ffffffffffffffff"},
        "bin": {"bytes": 200, "block_bytes": 128, "xxh64": ["0000000000000001", "8000000000000000"]},
    }


def test_the_largest_numbers_and_smallest_blocks_are_read():
    for changed in (replace(EXAMPLE, num_tokens=2**63 - 1), replace(EXAMPLE, block_bytes=1, largest_id=-1)):
        assert Sidecar.from_json(changed.to_json()) == changed


def damaged() -> list[bytes]:
    whole = orjson.loads(EXAMPLE.to_json())
    changed = [{k: v for k, v in whole.items() if k != key} for key in whole if key != "source"]
    changed += [
        {**whole, key: value}
        for key in whole
        for value in (None, [], "x", True, 1.5)
        if (key, value) not in (("dtype", "x"), ("source", None))
    ]
    changed += [
        {**whole, "bin": {**whole["bin"], "xxh64": [digits]}} for digits in ("zz", "1" * 17, "0x" + "1" * 14, "1" * 15)
    ]
    changed += [{**whole, "bin": {**whole["bin"], "block_bytes": size}} for size in (0, -5, 2**63)]
    changed += [{**whole, "idx": {"xxh64": "1" * 24}}, {**whole, "tokens": 2**63}, {**whole, "version": 2}]
    return [orjson.dumps(value) for value in changed] + [
        EXAMPLE.to_json()[:-5],
        EXAMPLE.to_json()[:40],
        EXAMPLE.to_json().replace(b"neox.", b"meox."),
    ]


@pytest.mark.parametrize("content", damaged())
def test_damage_is_an_error_that_names_the_file(tmp_path, content):
    prefix = str(tmp_path / "d")
    sidecar_path(prefix).write_bytes(content)
    with pytest.raises(DataError, match=r"sidecar is damaged; where=.*d\.json"):
        read_sidecar(prefix)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"text": "a corpus"}\n', b"x" * 10_000])
def test_a_file_of_others_is_not_a_sidecar(tmp_path, content):
    prefix = str(tmp_path / "d")
    sidecar_path(prefix).write_bytes(content)
    assert is_foreign(sidecar_path(prefix)) and read_sidecar(prefix) is None
    assert not is_foreign(tmp_path / "missing.json")
    write_sidecar(str(tmp_path / "other"), EXAMPLE)
    assert not is_foreign(tmp_path / "other.json")


def test_unreadable_sidecar(tmp_path):
    sidecar_path(str(tmp_path / "d")).mkdir()
    with pytest.raises(DataError, match="cannot read sidecar"):
        read_sidecar(str(tmp_path / "d"))
