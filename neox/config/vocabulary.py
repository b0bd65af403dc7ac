"""The size of a vocabulary, and the ids of its tokens, read from a tokenizer's file."""

from __future__ import annotations

from neox.files import read_json


def tokenizer_vocab_size(file: str) -> int:
    """Largest id + 1 of a `tokenizers` JSON file, added tokens included. Raises as `tokenizer_ids`."""
    return max(tokenizer_ids(file).values()) + 1


def tokenizer_ids(file: str) -> dict[str, int]:
    """token -> id of a `tokenizers` JSON file, added tokens included.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tokenizer.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no `model` in it")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    elif isinstance(vocabulary, list):
        ids = {str(entry[0] if isinstance(entry, list) and entry else entry): number for number, entry in enumerate(vocabulary)}
    else:
        raise ValueError("no `model.vocab` in it")
    ids |= {str(token.get("content")): token.get("id") for token in content.get("added_tokens") or [] if isinstance(token, dict)}
    if not ids or not all(type(number) is int and number >= 0 for number in ids.values()):
        raise ValueError("its ids are no numbers")
    return ids
