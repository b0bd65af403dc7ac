"""PREFIX.json: what made an indexed dataset, and checksums that find damage. A dataset from elsewhere has none and works without."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import orjson

from neox.errors import DataError
from neox.files import read_bytes, write_durably

FORMAT = "neox.indexed"
VERSION = 1
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """The content of PREFIX.json.

    Args:
        dtype: numpy name of the token type.
        num_sequences, num_documents, num_tokens: counts.
        largest_id: largest token id in the data; -1 without tokens.
        tokenizer_hash, vocab_size, eod_id: of the tokenizer that made the data; None where not known.
        block_bytes: bytes of .bin under one checksum; block_sums: XXH64 of each block.
        bin_bytes: size of .bin. idx_sum: XXH64 of .idx.
        source: what `neox preprocess` read, by the fields of its summary, and `hash`, which names input and options; None where not known.
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
    source: dict[str, object] | None = None

    def to_json(self) -> bytes:
        """The file's bytes."""
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
            "bin": {"bytes": self.bin_bytes, "block_bytes": self.block_bytes, "xxh64": [f"{value:016x}" for value in self.block_sums]},
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> Sidecar:
        """Parse and check the types of a sidecar.

        Raises:
            ValueError, KeyError, TypeError: not a sidecar; the message says which part.
        """
        data = orjson.loads(content)
        if not isinstance(data, dict) or data.get("format") != FORMAT or _typed(data.get("version"), int) != VERSION:
            raise ValueError(f"not a {FORMAT} file of version {VERSION}")
        made_by, bin_part = data["tokenizer"], data["bin"]
        if _typed(bin_part["block_bytes"], int) < 1:
            raise ValueError(f"blocks of {bin_part['block_bytes']} bytes")
        return cls(
            dtype=_typed(data["dtype"], str),
            num_sequences=_typed(data["sequences"], int),
            num_documents=_typed(data["documents"], int),
            num_tokens=_typed(data["tokens"], int),
            largest_id=_typed(data["largest_id"], int),
            bin_bytes=_typed(bin_part["bytes"], int),
            idx_sum=_sum(data["idx"]["xxh64"]),
            block_sums=tuple(map(_sum, _typed(bin_part["xxh64"], list))),
            block_bytes=_typed(bin_part["block_bytes"], int),
            tokenizer_hash=_typed(made_by["hash"], str, type(None)),
            vocab_size=_typed(made_by["vocab_size"], int, type(None)),
            eod_id=_typed(made_by["eod_id"], int, type(None)),
            source=_typed(data.get("source"), dict, type(None)),
        )


def _typed(value: object, *types: type):
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not {' or '.join(t.__name__ for t in types)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} is no number of 64 bits")
    return value


def _sum(value: object) -> int:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{16}", value) is None:
        raise ValueError(f"{value!r} is not 16 hexadecimal digits")
    return int(value, 16)


def sidecar_path(prefix: str) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def write_sidecar(prefix: str, sidecar: Sidecar) -> None:
    """Write PREFIX.json durably. Raises DiskError."""
    write_durably(sidecar_path(prefix), sidecar.to_json())


def read_sidecar(prefix: str) -> Sidecar | None:
    """Read PREFIX.json; None when there is none.

    Raises:
        DataError: it is there and cannot be read or is damaged.
    """
    path = sidecar_path(prefix)
    try:
        return Sidecar.from_json(read_bytes(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError("cannot read sidecar", where=path, got=error.strerror) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("sidecar is damaged", where=path, got=error, do="restore it, or delete it to do without checksums") from error
