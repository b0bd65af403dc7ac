"""PREFIX.json: what an indexed dataset was made from, and checksums that detect damage.

Only neox writes it. A dataset from elsewhere has none and works without.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import orjson

from neox.errors import DataError
from neox.files import JsonObject, open_regular, read_bytes, write_durably

FORMAT = "neox.indexed"
VERSION = 1
BLOCK_BYTES = 1 << 20
HEAD_BYTES = 1 << 12
MARKS = (FORMAT.encode(), b'"largest_id"')  # one of them is in the head of every sidecar, also of a damaged one

T = TypeVar("T")


@dataclass(frozen=True)
class Sidecar:
    """The content of PREFIX.json.

    Attributes:
        dtype: numpy name of the token type.
        num_sequences: number of sequences; num_documents and num_tokens likewise.
        largest_id: largest token id in the data; -1 without tokens.
        bin_bytes: size of .bin.
        idx_sum: XXH64 of .idx.
        block_sums: XXH64 of each block of .bin.
        block_bytes: bytes of .bin per checksum.
        tokenizer_hash: hash of the tokenizer that made the data; None if unknown, as are vocab_size and eod_id.
        source: what `neox preprocess` read: the counts of its summary, and `hash`, which identifies input and options.
            None if unknown.
    """

    dtype: str
    num_sequences: int
    num_documents: int
    num_tokens: int
    largest_id: int
    bin_bytes: int
    idx_sum: int
    block_sums: tuple[int, ...]
    block_bytes: int = BLOCK_BYTES
    tokenizer_hash: str | None = None
    vocab_size: int | None = None
    eod_id: int | None = None
    source: JsonObject | None = None

    def to_json(self) -> bytes:
        """The bytes of the file."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "sequences": self.num_sequences,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "largest_id": self.largest_id,
            "tokenizer": {"hash": self.tokenizer_hash, "vocab_size": self.vocab_size, "eod_id": self.eod_id},
            "source": self.source,
            "idx": {"xxh64": f"{self.idx_sum:016x}"},
            "bin": {
                "bytes": self.bin_bytes,
                "block_bytes": self.block_bytes,
                "xxh64": [f"{value:016x}" for value in self.block_sums],
            },
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Sidecar:
        """Parse a sidecar and check its types.

        Raises:
            ValueError, KeyError, TypeError: not a sidecar; the message names the wrong part.
        """
        data = orjson.loads(content)
        if not isinstance(data, dict) or data.get("format") != FORMAT or _typed(data.get("version"), int) != VERSION:
            raise ValueError(f"not a {FORMAT} file of version {VERSION}")
        tokenizer, bin_part = data["tokenizer"], data["bin"]
        if _typed(bin_part["block_bytes"], int) < 1:
            raise ValueError(f"blocks of {bin_part['block_bytes']} bytes")
        return cls(
            dtype=_typed(data["dtype"], str),
            num_sequences=_typed(data["sequences"], int),
            num_documents=_typed(data["documents"], int),
            num_tokens=_typed(data["tokens"], int),
            largest_id=_typed(data["largest_id"], int),
            bin_bytes=_typed(bin_part["bytes"], int),
            idx_sum=_checksum(data["idx"]["xxh64"]),
            block_sums=tuple(map(_checksum, _typed(bin_part["xxh64"], list))),
            block_bytes=_typed(bin_part["block_bytes"], int),
            tokenizer_hash=_typed_or_none(tokenizer["hash"], str),
            vocab_size=_typed_or_none(tokenizer["vocab_size"], int),
            eod_id=_typed_or_none(tokenizer["eod_id"], int),
            source=_typed_or_none(data.get("source"), dict),
        )


def _typed(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit 64 bits")
    return value


def _typed_or_none(value: object, kind: type[T]) -> T | None:
    return None if value is None else _typed(value, kind)


def _checksum(value: object) -> int:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{16}", value) is None:
        raise ValueError(f"{value!r} is not 16 hexadecimal digits")
    return int(value, 16)


def sidecar_path(prefix: str) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def is_foreign(path: Path) -> bool:
    """Whether a file exists and is not a sidecar, such as a corpus `data.json` next to `data.bin`.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return False
    return not any(mark in head for mark in MARKS)


def write_sidecar(prefix: str, sidecar: Sidecar) -> None:
    """Write PREFIX.json durably.

    Raises:
        DiskError: it cannot be written.
    """
    write_durably(sidecar_path(prefix), sidecar.to_json())


def read_sidecar(prefix: str) -> Sidecar | None:
    """Read PREFIX.json; None if it does not exist or is somebody else's file.

    Raises:
        DataError: it cannot be read or is damaged.
    """
    path = sidecar_path(prefix)
    try:
        return None if is_foreign(path) else Sidecar.from_json(read_bytes(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError("cannot read sidecar", where=path, got=error.strerror) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "sidecar is damaged", where=path, got=error, do="restore it, or delete it to continue without checksums"
        ) from error
