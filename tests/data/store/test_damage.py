"""Datasets with damage in one of the three files: refused with the file named, or read exactly as before.
`make fuzz` does 20,000 of them.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import DataError

INTERESTING = [0, 1, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def damaged(content: bytes, random: random.Random) -> bytes:
    """The content with one bit, byte, number or stretch changed, or cut short or lengthened."""
    changed = bytearray(content)
    at = random.randrange(len(changed))
    match random.randrange(7):
        case 0:
            changed[at] ^= 1 << random.randrange(8)
        case 1:
            changed[at] = random.randrange(256)
        case 2:
            number = random.choice(INTERESTING).to_bytes(8, "little")
            changed[at : at + 8] = number[: len(changed[at : at + 8])]
        case 3:
            del changed[at:]
        case 4:
            del changed[at : at + random.randrange(1, 40)]
        case 5:
            changed[at:at] = random.randbytes(random.randrange(1, 40))
        case _:
            start = random.randrange(len(content))
            changed[at : at + 16] = content[start : start + 16]
    return bytes(changed)


def everything(prefix: Path) -> list[list[int]]:
    """All documents, as the loader reads them."""
    dataset = IndexedDataset(prefix)
    sequences = [dataset.read(dataset.first_token(i), int(size))[0].tolist() for i, size in enumerate(dataset.sizes)]
    return [
        sequences[first:last]
        for first, last in zip(dataset.documents[:-1].tolist(), dataset.documents[1:].tolist(), strict=True)
    ]


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.fuzz)])
def test_damage_is_refused_or_harmless(tmp_path, count):
    rng = random.Random(count)
    prefix = tmp_path / "d"
    with IndexedWriter(prefix, "uint16", tokenizer_hash="ab" * 32, vocab_size=50_000, eod_id=0) as writer:
        for length in (5, 1, 0, 900, 40, 7, 7, 1500):
            writer.add(np.arange(length) * 31 % 50_000)
            if length != 7 or writer.num_tokens > 960:
                writer.end_document()
    files = [Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin", ".json")]
    whole = {file: file.read_bytes() for file in files}
    wanted = everything(prefix)
    refused = 0
    for _ in range(count):
        file = rng.choice(files)
        content = damaged(whole[file], rng)
        file.write_bytes(content)
        try:
            assert everything(prefix) == wanted, (file, content)
        except DataError as error:
            refused += 1
            named = [other.name for other in files if str(other) in error.line()]
            assert named, error.line()
            assert content != whole[file], error.line()
        file.write_bytes(whole[file])
    assert everything(prefix) == wanted and refused > count // 2
