"""The size of a vocabulary, read from a tokenizer's file."""

from __future__ import annotations

import json


def tokenizer_vocab_size(file: str) -> int:
    """Largest id + 1 of a `tokenizers` JSON file, added tokens included.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tokenizer.
    """
    with open(file, encoding="utf-8") as handle:
        content = json.load(handle)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no `model` in it")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = list(range(len(vocabulary)))
    else:
        raise ValueError("no `model.vocab` in it")
    ids += [token.get("id") for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    if not ids or not all(type(number) is int and number >= 0 for number in ids):
        raise ValueError("its ids are no numbers")
    return max(ids) + 1
