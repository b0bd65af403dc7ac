"""The `tokenizers` library: a tokenizer of its own, here, or for the process that asks (`library_process`, of which this is the other side)."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

from neox.files import read_bytes

if TYPE_CHECKING:
    import tokenizers

LENGTH = struct.Struct("<Q")  # bytes of what follows: a text, or its ids


def load_hf_tokenizer(content: bytes, specials_as_text: bool) -> tokenizers.Tokenizer:
    """A tokenizer that neither pads nor cuts off. Raises bare Exception for every kind of bad file."""
    import tokenizers  # not needed where csrc/data encodes and another process compares

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = specials_as_text
    return tokenizer


def serve(file: str, specials_as_text: bool) -> None:
    """Encode the texts of standard input, until it ends: also when the parent is killed."""
    try:
        tokenizer = load_hf_tokenizer(read_bytes(file), specials_as_text)
    except Exception:  # the parent looks at the file itself, and says what is wrong
        return
    texts, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(head := texts.read(LENGTH.size)) == LENGTH.size:
        ids = tokenizer.encode(texts.read(*LENGTH.unpack(head)).decode(), add_special_tokens=False).ids
        answers.write(LENGTH.pack(4 * len(ids)) + struct.pack(f"{len(ids)}I", *ids))
        answers.flush()
